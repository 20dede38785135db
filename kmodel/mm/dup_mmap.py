"""fork: a child's address space that is a copy of the parent's.

Models:      kernel/fork.c, dup_mm; mm/mmap.c, dup_mmap (7.2)
Guards:      dup_mmap_sem (read) around it all; the parent's mmap_lock (write), inside it the child's, which
             nobody else knows; each parent VMA's write lock before it is copied
Invariants:  D1 no fault in the parent gets in between the first and the last copied page: the child's memory
             is the parent's at one moment
             D2 whoever scans i_mmap under dup_mmap_sem (write) sees both parent and child, or a child that
             was
             copied afterwards (H48)
             D3 after an error nothing is left of the child
Leaves out:  __mt_dup (the child's tree is built store by store), the executable's file, RLIMITs, mlock,
             memory
             policies, userfaultfd, KSM, huge pages, what fork copies beside memory
Read next:   mm/page_table.py, copy_page_range; mm/fork.py
"""

import os
from errno import EINTR, ENOMEM

from kmodel.core import guards, set_bit
from kmodel.fs import (
    get_file,
    i_mmap_lock_write,
    i_mmap_unlock_write,
    mapping_map_writable,
    vma_interval_tree_insert,
)
from kmodel.mm import hooks
from kmodel.mm.anon_vma import anon_vma_fork, unlink_anon_vmas
from kmodel.mm.flags import MMF_UNSTABLE, VM_DONTCOPY, VM_LOCKED, VM_WIPEONFORK
from kmodel.mm.fork import mm_alloc, mmput, unmap_all
from kmodel.mm.maple_node import ULONG_MAX
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap_lock import (
    mmap_write_lock_killable,
    mmap_write_lock_nested,
    mmap_write_unlock,
)
from kmodel.mm.page_table import copy_page_range
from kmodel.mm.vma import (
    VmAreaStruct,
    is_shared_maywrite,
    vm_area_dup,
    vm_area_free,
    vm_flags_clear,
    vma_pages,
)
from kmodel.mm.vma_iter import VmaIterator, vma_find, vma_iter_init, vma_iter_set, vma_iter_store_gfp
from kmodel.mm.vma_lock import vma_start_write_killable

_VMA_LOCK = guards.register(
    "no-fork-vma-lock", "D1: a fault gets between two pages; the child has the second store and not the first"
)


def fork(mm: MmStruct) -> MmStruct:
    """A copy of the address space, with one user. OSError with the kernel's errno (EINTR, ENOMEM)."""
    child = dup_mm(mm)
    if isinstance(child, int):
        raise OSError(-child, os.strerror(-child))
    return child


def dup_mm(oldmm: MmStruct) -> MmStruct | int:
    """The child, or a negative errno. The caller is a user of `oldmm`."""
    mm = mm_alloc()
    if mm is None:
        return -ENOMEM
    # The whole struct is copied, flags that are not inherited apart.
    mm.def_flags = oldmm.def_flags
    mm.mmap_base = oldmm.mmap_base
    mm.start_brk = oldmm.start_brk
    mm.brk = oldmm.brk
    mm.start_stack = oldmm.start_stack
    mm.gate_vma = oldmm.gate_vma
    hooks.uprobe_start_dup_mmap()
    error = dup_mmap(mm, oldmm)
    if error:
        # Before the semaphore is released: nobody finds a half-made mapping in i_mmap.
        mmput(mm)
    hooks.uprobe_end_dup_mmap()
    return error or mm


def dup_mmap(mm: MmStruct, oldmm: MmStruct) -> int:
    """Copy every mapping: 0, -EINTR or -ENOMEM, and then `mm` maps nothing and is unstable."""
    if mmap_write_lock_killable(oldmm):
        return -EINTR
    hooks.uprobe_dup_mmap(oldmm, mm)
    # Not known to anybody yet: no deadlock.
    mmap_write_lock_nested(mm)
    mm.total_vm = oldmm.total_vm
    error = 0
    vmi, new = vma_iter_init(oldmm), vma_iter_init(mm)
    while not error and (mpnt := vma_find(vmi, ULONG_MAX)) is not None:
        # Faults under this VMA's lock are over, and no new one comes before mmap_lock is released (D1).
        if not (guards.any_removed and _VMA_LOCK in guards.removed):
            error = vma_start_write_killable(mpnt)
            if error:
                break
        if mpnt.vm_flags & VM_DONTCOPY:
            mm.total_vm -= vma_pages(mpnt)
        else:
            error = dup_vma(mm, new, mpnt)
        vma_iter_set(vmi, mpnt.vm_end)
    if error:
        tear_down_child(mm)
    mmap_write_unlock(mm)
    mmap_write_unlock(oldmm)
    return error


def dup_vma(mm: MmStruct, vmi: VmaIterator, mpnt: VmAreaStruct) -> int:
    """One mapping: 0, or -ENOMEM and nothing of it is left. (The loop's body in the kernel.)"""
    tmp = vm_area_dup(mpnt)
    if tmp is None:
        return -ENOMEM
    tmp.vm_mm = mm
    if tmp.vm_flags & VM_WIPEONFORK:
        tmp.anon_vma = None  # no page is copied: the first fault will prepare one
    elif anon_vma_fork(tmp, mpnt):
        vm_area_free(tmp)
        return -ENOMEM
    vm_flags_clear(tmp, VM_LOCKED)  # also its write lock
    if vma_iter_store_gfp(vmi, tmp):
        unlink_and_free(tmp)
        return -ENOMEM
    mm.map_count += 1
    file = tmp.vm_file
    if file is not None:
        mapping = file.f_mapping
        get_file(file)
        i_mmap_lock_write(mapping)
        if is_shared_maywrite(tmp.vm_flags):
            mapping_map_writable(mapping)
        vma_interval_tree_insert(tmp, mapping)
        i_mmap_unlock_write(mapping)
    if not tmp.vm_flags & VM_WIPEONFORK:
        copy_page_range(tmp, mpnt)
    return 0


def unlink_and_free(tmp: VmAreaStruct) -> None:
    """A copy that did not get into the tree."""
    unlink_anon_vmas(tmp)
    vm_area_free(tmp)


def tear_down_child(mm: MmStruct) -> None:
    """The fork failed: take away what was copied. Both mmap_locks (write)."""
    unmap_all(mm)
    mm.total_vm = 0
    set_bit(MMF_UNSTABLE, mm, "flags")
