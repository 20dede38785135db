"""Variants: from the address of a breakpoint to its uprobe, with the mapping held by a lock.

Models:      kernel/events/uprobes.c, find_active_uprobe (6.12), and the last patch of the series of July
             2024, which tried the per-VMA lock first (not merged: speculation came instead)
Guards:      mmap_lock for reading, or the VMA's own lock
Invariants:  Q1 of uprobes/lookup.py: only mmap_lock may say that there is no uprobe
Leaves out:  MMF_RECALC_UPROBES after a miss: schemes differ in locks, and the default lookup has it
Read next:   mm/vma_lock.py, lock_vma_under_rcu(); uprobes/lookup.py for the third way, without any lock

Both are given the second half of the way as `find_uprobe`, from (inode, offset) to the uprobe.
"""

import errno
from collections.abc import Callable
from typing import Any

from kmodel.core import TaskStruct
from kmodel.mm import mmap_read_lock, mmap_read_unlock, vma_lookup
from kmodel.mm.vma_lock import lock_vma_under_rcu, vma_end_read
from kmodel.uprobes.pages import is_trap_at_addr, vaddr_to_offset
from kmodel.uprobes.uprobe import Uprobe

type FindUprobe = Callable[[Any, int], Uprobe | None]


def find_active_uprobe(bp_vaddr: int, task: TaskStruct, find_uprobe: FindUprobe) -> tuple[Uprobe | None, int]:
    """(uprobe, is_swbp) under mmap_lock for reading: find_active_uprobe_rcu without its fast path."""
    mm = task.mm
    uprobe = None
    is_swbp = 0
    mmap_read_lock(mm)
    vma = vma_lookup(mm, bp_vaddr, task)
    if vma is None:
        is_swbp = -errno.EFAULT
    else:
        if vma.vm_file is not None:
            uprobe = find_uprobe(vma.vm_file.f_inode, vaddr_to_offset(vma, bp_vaddr))
        if uprobe is None:
            is_swbp = is_trap_at_addr(mm, bp_vaddr)
    mmap_read_unlock(mm)
    return uprobe, is_swbp


def find_active_uprobe_vma_lock(
    bp_vaddr: int, task: TaskStruct, find_uprobe: FindUprobe
) -> tuple[Uprobe | None, int]:
    """The same with the VMA's lock alone, if it is to be had and there is a uprobe; else
    find_active_uprobe().
    """
    vma = lock_vma_under_rcu(task.mm, bp_vaddr)
    if vma is not None:
        uprobe = None
        if vma.vm_file is not None:
            uprobe = find_uprobe(vma.vm_file.f_inode, vaddr_to_offset(vma, bp_vaddr))
        vma_end_read(vma)
        if uprobe is not None:
            return uprobe, 0
    # No VMA, a busy one, or no uprobe: the last needs the trap test under the lock that installers write
    # (H50).
    return find_active_uprobe(bp_vaddr, task, find_uprobe)
