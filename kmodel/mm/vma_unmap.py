"""Taking mappings away.

Models:      mm/vma.c, do_vmi_munmap, do_vmi_align_munmap, vms_gather_munmap_vmas, vms_complete_munmap_vmas,
             vms_clean_up_area, reattach_vmas (7.2)
Guards:      mmap_lock (write); page tables and files go after a downgrade where the caller asked for it
Invariants:  U1 every VMA is write-locked and detached before the one store that clears the range
             U2 an error undoes the detaching, not the splits
Leaves out:  userfaultfd, mlock accounting, the side tree (a list)
Read next:   mm/mmap.py
"""

from errno import EINVAL, ENOMEM, EPERM

import attrs

from kmodel.mm import hooks, mm_struct
from kmodel.mm.anon_vma import unlink_anon_vmas
from kmodel.mm.flags import PAGE_ALIGN, TASK_SIZE, VM_SEALED, offset_in_page
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap_lock import (
    mmap_assert_write_locked,
    mmap_read_unlock,
    mmap_write_downgrade,
    mmap_write_unlock,
)
from kmodel.mm.vma import VmAreaStruct, vma_pages
from kmodel.mm.vma_iter import VmaIterator, vma_find, vma_iter_clear_gfp, vma_iter_init, vma_iter_set
from kmodel.mm.vma_lock import vma_mark_attached, vma_mark_detached, vma_start_write
from kmodel.mm.vma_prepare import __split_vma, remove_vma, unlink_file_vma


@attrs.define(eq=False)
class VmaMunmapStruct:
    """One unmapping (struct vma_munmap_struct)."""

    mm: MmStruct
    start: int
    end: int
    vmas: list[VmAreaStruct] = attrs.field(factory=list)
    nr_pages: int = 0
    ptes_cleared: bool = False
    unlock: bool = False


def vms_gather_munmap_vmas(vms: VmaMunmapStruct, vma: VmAreaStruct) -> int:
    """Split at both ends, write-lock and detach everything between; 0 or an error. `vma` is the first."""
    vmi = vma_iter_init(vms.mm, vms.start)
    if vms.start > vma.vm_start:
        # A hole in one VMA makes two: the count must not pass the limit for good. (For a moment it may.)
        if vms.end < vma.vm_end and vms.mm.map_count >= mm_struct.sysctl_max_map_count:
            return -ENOMEM
        if vma.vm_flags & VM_SEALED:
            return -EPERM
        error = __split_vma(vmi, vma, vms.start, True)
        if error:
            return error
    vma_iter_set(vmi, vms.start)
    while (found := vma_find(vmi, vms.end)) is not None:
        error = -EPERM if found.vm_flags & VM_SEALED else 0
        if not error and found.vm_end > vms.end:
            error = __split_vma(vmi, found, vms.end, False)
        if error:
            reattach_vmas(vms)
            return error
        vma_start_write(found)
        vma_mark_detached(found)
        vms.vmas.append(found)
        vms.nr_pages += vma_pages(found)
        vma_iter_set(vmi, found.vm_end)
    return 0


def reattach_vmas(vms: VmaMunmapStruct) -> None:
    """The unmapping failed: the VMAs stay, in pieces maybe (U2)."""
    for vma in vms.vmas:
        vma_mark_attached(vma)
    vms.vmas.clear()


def vms_clear_ptes(vms: VmaMunmapStruct) -> None:
    """Drop the pages, and the reverse maps that lead to them. Once."""
    if vms.ptes_cleared:
        return
    vms.ptes_cleared = True
    for vma in vms.vmas:
        if vma.vm_file is not None:
            hooks.uprobe_munmap(vma, vma.vm_start, vma.vm_end)
    if vms.vmas:
        hooks.zap_pages(vms.mm, vms.start, vms.end)
    for vma in vms.vmas:
        unlink_anon_vmas(vma)
        unlink_file_vma(vma)


def vms_complete_munmap_vmas(vms: VmaMunmapStruct) -> None:
    """The range is out of the tree: let go of what was there. With vms.unlock, mmap_lock is released."""
    mm = vms.mm
    mm.map_count -= len(vms.vmas)
    mm.total_vm -= vms.nr_pages
    if vms.unlock:
        # Nobody can find them any more; readers of other mappings need not wait for the rest.
        mmap_write_downgrade(mm)
    vms_clear_ptes(vms)
    for vma in vms.vmas:
        remove_vma(vma)
    if vms.unlock:
        mmap_read_unlock(mm)


def do_vmi_align_munmap(
    vmi: VmaIterator, vma: VmAreaStruct, mm: MmStruct, start: int, end: int, unlock: bool
) -> int:
    """Unmap [start, end), whose first VMA is `vma`: 0 (then, with `unlock`, mmap_lock is released) or an
    error.
    """
    vms = VmaMunmapStruct(mm, start, end, unlock=unlock)
    error = vms_gather_munmap_vmas(vms, vma)
    if error:
        return error
    error = vma_iter_clear_gfp(vmi, start, end)
    if error:
        reattach_vmas(vms)
        return error
    vms_complete_munmap_vmas(vms)
    return 0


def do_munmap(mm: MmStruct, start: int, length: int, unlock: bool = False) -> int:
    """Unmap whatever is in the range: 0 or an error. mmap_lock (write); with `unlock` it is released on
    success.
    """
    mmap_assert_write_locked(mm)
    if offset_in_page(start) or start > TASK_SIZE or length > TASK_SIZE - start:
        return -EINVAL
    end = start + PAGE_ALIGN(length)
    if end == start:
        return -EINVAL
    vmi = vma_iter_init(mm, start)
    vma = vma_find(vmi, end)
    if vma is None:
        if unlock:
            mmap_write_unlock(mm)
        return 0
    return do_vmi_align_munmap(vmi, vma, mm, start, end, unlock)
