"""mremap(2): shrink, grow, move.

Models:      mm/mremap.c, check_mremap_params, check_prep_vma, mremap_to, mremap_at, remap_move, move_vma;
             dontunmap_complete; mm/vma.c, copy_vma (7.2)
Guards:      mmap_lock (write); the source VMA is write-locked before its pages move
Invariants:  G2 of mm/vma_merge.py
Leaves out:  page tables (a hook moves what uprobes keep), userfaultfd, mlock accounting
Read next:   mm/brk.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EFAULT, EINTR, EINVAL, ENOMEM, EPERM

import attrs

from kmodel.core import guards
from kmodel.fs import get_file, task_work_run
from kmodel.mm import hooks, mm_struct
from kmodel.mm.anon_vma import anon_vma_clone, unlink_anon_vmas
from kmodel.mm.flags import (
    MAP_FIXED,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE_ALIGN,
    PAGE_SHIFT,
    TASK_SIZE,
    VM_ACCOUNT,
    VM_DONTEXPAND,
    VM_LOCKED,
    VM_MAYSHARE,
    VM_PFNMAP,
    VM_SEALED,
    VM_SHARED,
    offset_in_page,
)
from kmodel.mm.maple_node import ULONG_MAX
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap import _raise
from kmodel.mm.mmap_lock import mmap_write_lock_killable, mmap_write_unlock
from kmodel.mm.unmapped_area import get_unmapped_area, round_hint_to_min
from kmodel.mm.vma import (
    VmAreaStruct,
    vm_area_dup,
    vm_area_free,
    vm_flags_clear,
    vm_flags_set,
    vma_is_anonymous,
    vma_set_range,
)
from kmodel.mm.vma_iter import (
    find_vma,
    find_vma_intersection,
    find_vma_prev,
    vma_iter_init,
    vma_iter_prealloc,
    vma_iter_store_new,
    vma_lookup,
)
from kmodel.mm.vma_lock import vma_start_write
from kmodel.mm.vma_merge import vma_merge_extend, vma_merge_new_range, vmg_of
from kmodel.mm.vma_prepare import vma_link_file
from kmodel.mm.vma_unmap import do_munmap

_SKIP = guards.register(
    "no-skip-vma-uprobe", "H75: a merge installs a breakpoint where a page that has one is about to be moved"
)

_BESIDE = guards.register(
    "mremap-beside-register",
    "what Linux 7.2 does, rather than a guard: mremap(2) moves a mapping between the scan of a registration "
    "and its visit, which then misses it. Without it mremap(2) keeps registrations out as fork(2) does",
)

_unaccounts = False


@contextmanager
def older_dontunmap() -> Iterator[None]:
    """Run the block with the MREMAP_DONTUNMAP of 6.18 and before: what it leaves behind loses VM_ACCOUNT."""
    global _unaccounts
    before, _unaccounts = _unaccounts, True
    try:
        yield
    finally:
        _unaccounts = before


@attrs.define(eq=False)
class VmaRemapStruct:
    """One call of mremap (struct vma_remap_struct)."""

    mm: MmStruct
    addr: int
    old_len: int
    new_len: int
    flags: int
    new_addr: int
    vma: VmAreaStruct | None = None

    @property
    def implies_new_addr(self) -> bool:
        return bool(self.flags & (MREMAP_FIXED | MREMAP_DONTUNMAP))


def mremap(mm: MmStruct, old_addr: int, old_len: int, new_len: int, flags: int, new_addr: int = 0) -> int:
    """Resize or move the mapping at old_addr; its address afterwards. OSError with the kernel's errno."""
    old_len, new_len = PAGE_ALIGN(old_len) & ULONG_MAX, PAGE_ALIGN(new_len) & ULONG_MAX
    vrm = VmaRemapStruct(mm, old_addr, old_len, new_len, flags, new_addr)
    error = check_mremap_params(vrm)
    if error:
        _raise(error)
    if guards.any_removed and _BESIDE in guards.removed:
        hooks.uprobe_start_dup_mmap()
        result = _locked(vrm)
        hooks.uprobe_end_dup_mmap()
    else:
        result = _locked(vrm)
    task_work_run()
    return _raise(result)


def _locked(vrm: VmaRemapStruct) -> int:
    if mmap_write_lock_killable(vrm.mm):
        return -EINTR
    result = do_mremap(vrm)
    mmap_write_unlock(vrm.mm)
    return result


def check_mremap_params(vrm: VmaRemapStruct) -> int:
    """What can be refused without looking at a mapping."""
    if vrm.flags & ~(MREMAP_FIXED | MREMAP_MAYMOVE | MREMAP_DONTUNMAP) or offset_in_page(vrm.addr):
        return -EINVAL
    if not 0 < vrm.new_len <= TASK_SIZE:
        return -EINVAL
    if not vrm.implies_new_addr:
        return 0
    if vrm.new_addr > TASK_SIZE - vrm.new_len or offset_in_page(vrm.new_addr):
        return -EINVAL
    if not vrm.flags & MREMAP_MAYMOVE:
        return -EINVAL
    if vrm.flags & MREMAP_DONTUNMAP and vrm.old_len != vrm.new_len:
        return -EINVAL
    if (vrm.addr + vrm.old_len) & ULONG_MAX > vrm.new_addr and vrm.new_addr + vrm.new_len > vrm.addr:
        return -EINVAL  # they overlap
    return 0


def do_mremap(vrm: VmaRemapStruct) -> int:
    """The address or a negative errno. mmap_lock (write)."""
    # Moving may split one VMA in three at both ends for a moment; nothing is unmapped before that is known.
    if vrm.implies_new_addr and vrm.mm.map_count + 2 >= mm_struct.sysctl_max_map_count - 3:
        return -ENOMEM
    if vrm.flags & MREMAP_FIXED and vrm.old_len == vrm.new_len:
        return remap_move(vrm)
    vrm.vma = vma_lookup(vrm.mm, vrm.addr)
    error = check_prep_vma(vrm)
    if error:
        return error
    return mremap_to(vrm) if vrm.implies_new_addr else mremap_at(vrm)


def check_prep_vma(vrm: VmaRemapStruct) -> int:
    """What the source mapping does not allow."""
    vma = vrm.vma
    if vma is None:
        return -EFAULT
    if vma.vm_flags & VM_SEALED:
        return -EPERM
    if vrm.new_len <= vrm.old_len and not vrm.implies_new_addr:
        return 0
    if not vrm.old_len and not vma.vm_flags & (VM_SHARED | VM_MAYSHARE):
        return -EINVAL
    if vrm.flags & MREMAP_DONTUNMAP and vma.vm_flags & (VM_DONTEXPAND | VM_PFNMAP):
        return -EINVAL
    # What moves or grows may not reach across the end of a mapping; what only goes away may.
    kept = min(vrm.old_len, vrm.new_len)
    if kept > vma.vm_end - vrm.addr:
        return -EFAULT
    if vrm.new_len > kept and vma.vm_flags & (VM_DONTEXPAND | VM_PFNMAP):
        return -EFAULT
    return 0


def remap_move(vrm: VmaRemapStruct) -> int:
    """Move a range without resizing it: all mappings in it, the gaps between them kept."""
    mm, start, end = vrm.mm, vrm.addr, vrm.addr + vrm.old_len
    result, target, last_end = -EFAULT, vrm.new_addr, start
    at = start
    while True:
        vma = find_vma_intersection(mm, at, end) if at < end else None
        if vma is None:
            return result
        first = result == -EFAULT
        if first and start < vma.vm_start:
            return -EFAULT  # no gap at the beginning
        addr, stop = max(vma.vm_start, start), min(end, vma.vm_end)
        offset = 0 if first else vma.vm_start - last_end
        last_end = vma.vm_end
        one = VmaRemapStruct(mm, addr, stop - addr, stop - addr, vrm.flags, target + offset, vma)
        moved = check_prep_vma(one)
        if not moved:
            moved = mremap_to(one)
        if moved < 0:
            return moved
        if first:
            result = moved
        target = moved + one.new_len
        at = stop


def mremap_to(vrm: VmaRemapStruct) -> int:
    """To another address: what is there goes first if it is a fixed one."""
    if vrm.flags & MREMAP_FIXED:
        error = do_munmap(vrm.mm, vrm.new_addr, vrm.new_len)
        if error:
            return error
        vrm.vma = vma_lookup(vrm.mm, vrm.addr)
        if vrm.vma is None:
            return -EFAULT
    if vrm.new_len < vrm.old_len:
        error = do_munmap(vrm.mm, vrm.addr + vrm.new_len, vrm.old_len - vrm.new_len)
        if error:
            return error
        vrm.old_len = vrm.new_len
        vrm.vma = vma_lookup(vrm.mm, vrm.addr)
    fixed = MAP_FIXED if vrm.flags & MREMAP_FIXED else 0
    vrm.new_addr = get_unmapped_area(vrm.mm, round_hint_to_min(vrm.new_addr), vrm.new_len, fixed)
    return vrm.new_addr if vrm.new_addr < 0 else move_vma(vrm)


def mremap_at(vrm: VmaRemapStruct) -> int:
    """In place if that works, else elsewhere if that is allowed."""
    mm, vma = vrm.mm, vrm.vma
    assert vma is not None
    if vrm.new_len == vrm.old_len:
        return vrm.addr
    if vrm.new_len < vrm.old_len:
        error = do_munmap(mm, vrm.addr + vrm.new_len, vrm.old_len - vrm.new_len)
        return error or vrm.addr
    delta = vrm.new_len - vrm.old_len
    if vrm.addr + vrm.old_len == vma.vm_end and _expandable(mm, vma, delta):
        if vma_merge_extend(vma, delta) is None:
            return -ENOMEM
        mm.total_vm += delta >> PAGE_SHIFT
        return vrm.addr
    if not vrm.flags & MREMAP_MAYMOVE:
        return -ENOMEM
    vrm.new_addr = get_unmapped_area(mm, 0, vrm.new_len, 0)
    return vrm.new_addr if vrm.new_addr < 0 else move_vma(vrm)


def _expandable(mm: MmStruct, vma: VmAreaStruct, delta: int) -> bool:
    end = vma.vm_end + delta
    if end > TASK_SIZE or find_vma_intersection(mm, vma.vm_end, end) is not None:
        return False
    return get_unmapped_area(mm, vma.vm_start, end - vma.vm_start, MAP_FIXED) >= 0


# ------------------------------------------------------------------------------------------------ the move


def move_vma(vrm: VmaRemapStruct) -> int:
    """Copy the mapping to new_addr, move its pages, unmap the source: new_addr or a negative errno."""
    mm, vma = vrm.mm, vrm.vma
    assert vma is not None
    if mm.map_count >= mm_struct.sysctl_max_map_count - 3:
        return -ENOMEM
    vma_start_write(vma)  # no fault may race with the pages on their way
    new_vma = copy_vma(vrm)
    if new_vma is None:
        return -ENOMEM
    hooks.move_pages(mm, vrm.addr, vrm.new_addr, vrm.old_len)
    mm.total_vm += vrm.new_len >> PAGE_SHIFT
    if vrm.flags & MREMAP_DONTUNMAP:
        dontunmap_complete(vrm, new_vma)
    else:
        unmap_source_vma(vrm)
    return vrm.new_addr


def copy_vma(vrm: VmaRemapStruct) -> VmAreaStruct | None:
    """A mapping of [new_addr, new_addr + new_len) like the source, merged if possible; None: no memory."""
    mm, vma = vrm.mm, vrm.vma
    assert vma is not None
    pgoff = vma.vm_pgoff + ((vrm.addr - vma.vm_start) >> PAGE_SHIFT)
    if vma_is_anonymous(vma) and vma.anon_vma is None:
        # No page remembers the old place yet: lie as if mapped here, and merge more.
        pgoff = vrm.new_addr >> PAGE_SHIFT
    addr, end = vrm.new_addr, vrm.new_addr + vrm.new_len
    vmg = vmg_of(vma, find_vma_prev(mm, addr)[1], find_vma(mm, addr), addr, end)
    vmg.pgoff = pgoff
    vmg.middle, vmg.copied_from = None, vma
    # A merge would install breakpoints, which the moved pages then hide (H75).
    vmg.skip_vma_uprobe = vma.vm_file is not None and not (guards.any_removed and _SKIP in guards.removed)
    start = vma.vm_start
    new_vma = vma_merge_new_range(vmg)
    if new_vma is not None:
        if new_vma.vm_start <= start < new_vma.vm_end:
            vrm.vma = new_vma  # the source itself was merged into it: nothing was faulted in
        return new_vma
    new_vma = vm_area_dup(vma)
    if new_vma is None:
        return None
    vma_set_range(new_vma, addr, end, pgoff)
    vmi = vma_iter_init(mm, addr)
    if vma_iter_prealloc(vmi, addr, end, new_vma):
        vm_area_free(new_vma)
        return None
    anon_vma_clone(new_vma, vma)
    if new_vma.vm_file is not None:
        get_file(new_vma.vm_file)
    vma_start_write(new_vma)
    vma_iter_store_new(vmi, new_vma)
    mm.map_count += 1
    vma_link_file(new_vma)
    return new_vma


def unmap_source_vma(vrm: VmaRemapStruct) -> None:
    """Unmap what was moved. Its accounting went along, so it may not be given back here."""
    mm, vma = vrm.mm, vrm.vma
    assert vma is not None
    accountable = bool(vma.vm_flags & VM_ACCOUNT)
    vm_start, vm_end = vma.vm_start, vma.vm_end
    if accountable:
        vm_flags_clear(vma, VM_ACCOUNT)
    end = vrm.addr + vrm.old_len
    if do_munmap(mm, vrm.addr, vrm.old_len):
        return  # no memory to split it: the pages are gone, the empty mapping stays
    if accountable:
        for rest, split in ((vrm.addr - 1, vm_start < vrm.addr), (end, vm_end > end)):
            part = vma_lookup(mm, rest) if split else None
            if part is not None:
                vm_flags_set(part, VM_ACCOUNT)


def dontunmap_complete(vrm: VmaRemapStruct, new_vma: VmAreaStruct) -> None:
    """The source stays, empty: not locked, and with no private pages if all of it moved."""
    vma = vrm.vma
    assert vma is not None
    vm_flags_clear(vma, VM_LOCKED | (VM_ACCOUNT if _unaccounts else 0))
    if new_vma is not vma and vma.vm_start == vrm.addr and vma.vm_end == vrm.addr + vrm.old_len:
        unlink_anon_vmas(vma)
