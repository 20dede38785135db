"""Which uprobe does the breakpoint at this address of my address space belong to?

Models:      kernel/events/uprobes.c, find_active_uprobe_speculative, find_active_uprobe_rcu,
             mmf_recalc_uprobes (7.2)
Guards:      the caller is an RCU tasks trace reader, which keeps what is returned readable until it ends; the
             fast path adds RCU for the VMA and its file, the slow path mmap_lock for reading
Invariants:  P1 an accepted speculation is what the locked lookup would have found at some moment between the
             sample and the recheck, Q1 None from the fast path means "take the slow path", never "there is no
             probe"
Leaves out:  in_uprobe_trampoline, the second user of this pattern on x86
Read next:   uprobes/tree.py for find_uprobe_rcu, mm/mmap_lock.py for the two speculate functions; then
             uprobes/handler.py

Look without locks, believe a hit only after the recheck, and on any doubt take mmap_lock.
"""

import errno
from collections.abc import Callable
from typing import Any

from kmodel.core import READ_ONCE, TaskStruct, clear_bit, current, guards, test_and_clear_bit
from kmodel.fs import PAGE_SHIFT
from kmodel.mm import (
    MMF_HAS_UPROBES,
    MMF_RECALC_UPROBES,
    for_each_vma,
    mmap_lock_speculate_retry,
    mmap_lock_speculate_try_begin,
    mmap_read_lock,
    mmap_read_unlock,
    vma_lookup,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock
from kmodel.uprobes.breakpoint import valid_vma
from kmodel.uprobes.pages import is_trap_at_addr, vaddr_to_offset
from kmodel.uprobes.tree import find_uprobe_rcu, range_has_uprobes
from kmodel.uprobes.uprobe import Uprobe

guards.register(
    "no-final-retry",
    "H10, H11: a uprobe found through a mapping that changed meanwhile is taken for the right one",
)

_KEY = guards.register("no-inode-as-key", "H12: the inode of a file that is being opened is followed: NULL")
_ONCE = guards.register("no-vm-file-once", "H14: vm_file is loaded again after the test for NULL")
_RECALC = guards.register(
    "no-recalc-lock",
    "H52: MMF_HAS_UPROBES is cleared beside a register that sets it: SIGTRAP for ours",
)

observer: Callable[..., None] | None = None
"""For oracles: called with (mm, bp_vaddr, seq, vma, vm_file, inode, offset, uprobe, accepted) at the end of
every speculation that found a uprobe."""


def find_active_uprobe_speculative(bp_vaddr: int, task: TaskStruct | None = None) -> Uprobe | None:
    """The uprobe at bp_vaddr in current's address space, or None if in any doubt (Q1). Takes no lock and no
    reference.
    """
    if task is None:
        task = current()
    mm = task.mm
    rcu_read_lock(task)  # first: from here on the memory of VMAs and files stays what it is, if not theirs
    try:
        # ACQUIRE: pairs with mmap_write_unlock(). Odd: a writer is at work, and waiting is not worth it.
        began, seq = mmap_lock_speculate_try_begin(mm)
        if not began:
            return None
        vma = vma_lookup(mm, bp_vaddr, task)
        if vma is None:
            return None
        vm_file = READ_ONCE(vma, "vm_file")  # perhaps another file by now, in the same memory
        if vm_file is None:
            return None
        if guards.any_removed and _ONCE in guards.removed:
            vm_file = vma.vm_file  # as a compiler may do with a plain load: load it where it is used
        # Plain reads of fields that a writer may be changing: any nonsense they yield is thrown away below.
        # The same goes for f_inode, which is compared with keys of the tree and never followed (H12).
        offset = (vma.vm_pgoff << PAGE_SHIFT) + (bp_vaddr - vma.vm_start)
        inode = vm_file.f_inode
        if guards.any_removed and _KEY in guards.removed:
            inode.i_mapping  # noqa: B018  # as a table of uprobes per inode would
        uprobe = find_uprobe_rcu(inode, offset)
        if uprobe is None:
            return None
        # RMB and compare: if anything read above was a writer's store, mm_lock_seq has moved (I3).
        accepted = not mmap_lock_speculate_retry(mm, seq) or "no-final-retry" in guards.removed
        if observer is not None:
            observer(mm, bp_vaddr, seq, vma, vm_file, inode, offset, uprobe, accepted)
        return uprobe if accepted else None
    finally:
        rcu_read_unlock(task)


def find_active_uprobe_rcu(bp_vaddr: int, task: TaskStruct | None = None) -> tuple[Uprobe | None, int]:
    """(uprobe, is_swbp): the fast path, else the same under mmap_lock. Without a uprobe, is_swbp says what is
    at the address:

    1 a breakpoint that is not ours, 0 another instruction (ours was removed meanwhile), negative: nothing can
    be read there. The trap test shares one hold of mmap_lock with the lookup: an installer holds it for
    writing, so that a breakpoint of ours cannot appear between "no uprobe" and "it is a trap", and be taken
    for a stranger's (H50).
    """
    if task is None:
        task = current()
    uprobe = find_active_uprobe_speculative(bp_vaddr, task)
    if uprobe is not None:
        return uprobe, 0

    mm = task.mm
    is_swbp = 0
    mmap_read_lock(mm)
    vma = vma_lookup(mm, bp_vaddr)
    if vma is not None:
        vm_file = vma.vm_file
        if vm_file is not None:
            uprobe = find_uprobe_rcu(vm_file.f_inode, vaddr_to_offset(vma, bp_vaddr))
        if uprobe is None:
            is_swbp = is_trap_at_addr(mm, bp_vaddr)
    else:
        is_swbp = -errno.EFAULT
    if uprobe is None and test_and_clear_bit(MMF_RECALC_UPROBES, mm, "flags"):
        mmf_recalc_uprobes(mm)
    mmap_read_unlock(mm)
    return uprobe, is_swbp


def vma_has_uprobes(vma: Any, start: int, end: int) -> bool:
    """Whether the tree has a uprobe for any byte of [start, end) of a file mapping."""
    low = vaddr_to_offset(vma, start)
    return range_has_uprobes(vma.vm_file.f_inode, low, low + (end - start) - 1)


def mmf_recalc_uprobes(mm: Any) -> None:
    """Clear MMF_HAS_UPROBES if no mapping has a uprobe any more (H52). Needs mmap_lock; for reading is
    enough.

    Not strictly accurate: a dying uprobe that is still in the tree counts, as does one that every filter
    refuses here.
    """
    for vma in for_each_vma(mm):
        if valid_vma(vma, False) and vma_has_uprobes(vma, vma.vm_start, vma.vm_end):
            return
    if guards.any_removed and _RECALC in guards.removed:
        mmap_read_unlock(mm)
        clear_bit(MMF_HAS_UPROBES, mm, "flags")
        mmap_read_lock(mm)
        return
    clear_bit(MMF_HAS_UPROBES, mm, "flags")
