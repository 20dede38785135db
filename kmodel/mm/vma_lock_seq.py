"""Speculation on one VMA: look at it with no lock at all, and ask its vm_lock_seq whether that was right.

Models:      a proposal of August 2024 on the way to lockless uprobe lookup (never merged); everything else is
             the lock of 6.4 to 6.14, mm/vma_lock_v8.py
Guards:      as in mm/vma_lock_v8.py
Invariants:  S1 what a reader saw between vma_speculate_try_begin() and a vma_speculate_retry() that says
             False
             is the VMA as it was outside every write lock: nothing of a writer's, or all of it
Leaves out:  names: the proposal has these lines in its caller
Read next:   mm/mmap_lock.py, mmap_lock_speculate_try_begin(): what was merged instead

The mm-wide counter fails a reader for every change of the address space; this one only for changes of the VMA
the reader is interested in. What it costs is a barrier in vma_start_write(), and four places to get wrong:

    writer, vma_start_write()              reader
    vm_lock_seq = mm_lock_seq              v = vm_lock_seq        ACQUIRE (1)
    WMB (4)                                m = mm_lock_seq        ACQUIRE (2); v == m: locked, give up
    the VMA's fields                       the VMA's fields
    mm_lock_seq + 1   RELEASE              RMB (3)
                                           vm_lock_seq still v? else throw away what was read

1 and the order of the samples: with m first, the writer it belongs to may leave and the next one lock the VMA
  before v is read: v is newer than m, the VMA looks unlocked and is not (H19).
2 without it fields are read before m: of a writer that was still at work, and is gone when m is read.
3 without it the second look at vm_lock_seq is done before the fields are read (H18).
4 without it fields are changed before the VMA is marked: up_write() lets later stores pass (H17).

And vm_lock_seq must not come back to v: see mm_lock_seq_bits() (H20).

One order nobody wrote down: a reader that sees a mark must see a mm_lock_seq at least as new as the one it
was
made of, or 2 compares with a number of long ago. With the int that moves at unlock only, up_write() of one
writer and down_write() of the next are all that is between the two stores. Real machines order them; of a
release and an acquire on the same word the memory model does not say it (it does of spinlocks). With the
sequence count there is the WMB of its begin.
"""

from typing import TYPE_CHECKING

from kmodel.core import READ_ONCE, guards, smp_load_acquire, smp_rmb
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.vma_lock_v8 import (
    VMA_TYPESAFE_BY_RCU,
    __is_vma_write_locked,
    check_invariants,
    mark_write_locked,
    vma_end_read,
    vma_free_rcu,
    vma_is_attached,
    vma_lock_alloc,
    vma_lock_free,
    vma_lock_init,
    vma_mark_attached,
    vma_mark_detached,
    vma_start_read,
    vma_start_read_locked,
    vma_state_in_words,
)

if TYPE_CHECKING:
    from kmodel.mm.vma import VmAreaStruct

__all__ = [
    "VMA_TYPESAFE_BY_RCU",
    "__is_vma_write_locked",
    "check_invariants",
    "vma_end_read",
    "vma_free_rcu",
    "vma_is_attached",
    "vma_lock_alloc",
    "vma_lock_free",
    "vma_lock_init",
    "vma_mark_attached",
    "vma_mark_detached",
    "vma_speculate_retry",
    "vma_speculate_try_begin",
    "vma_start_read",
    "vma_start_read_locked",
    "vma_start_write",
    "vma_start_write_killable",
    "vma_state_in_words",
]

_WMB = guards.register(
    "no-vma-speculate-wmb", "H17: the writer's changes of a VMA become visible before its mark"
)
_RMB = guards.register("no-vma-speculate-rmb", "H18: the mark is looked at again before the fields are read")
_VM_ACQUIRE = guards.register(
    "no-vma-speculate-vm-acquire", "H19: vm_lock_seq is sampled after mm_lock_seq, which is too old for it"
)
_MM_ACQUIRE = guards.register(
    "no-vma-speculate-mm-acquire", "H19: fields are read before mm_lock_seq says that no writer is at work"
)
_ORDER = guards.register(
    "no-vma-speculate-order", "H19: mm_lock_seq is read first, and the next writer's mark is not equal to it"
)
_RETRY = guards.register("no-vma-speculate-retry", "H10: a reader does not ask whether the VMA was locked")


def _removed(guard: str) -> bool:
    return guards.any_removed and guard in guards.removed


# ------------------------------------------------------------------------------------------------ readers


def _load(struct: object, field: str, guard: str) -> int:
    return int(READ_ONCE(struct, field) if _removed(guard) else smp_load_acquire(struct, field))


def vma_speculate_try_begin(mm: MmStruct, vma: "VmAreaStruct") -> tuple[bool, int]:
    """(True, sample) if the VMA, found inside RCU, is not write-locked; else (False, ...): give up."""
    if _removed(_ORDER):
        locked = _load(mm.mm_lock_seq, "sequence", _MM_ACQUIRE)
        sample = _load(vma, "vm_lock_seq", _VM_ACQUIRE)
    else:
        # If the VMA is locked after this, the second look will see it.
        # ACQUIRE: the sample comes before mm_lock_seq. A mark that is seen is at most as old as that.
        sample = _load(vma, "vm_lock_seq", _VM_ACQUIRE)
        # ACQUIRE: pairs with RELEASE (or WMB) in vma_end_write_all(): if the writer of `sample` is gone, its
        # changes are here.
        locked = _load(mm.mm_lock_seq, "sequence", _MM_ACQUIRE)
    return sample != locked, sample


def vma_speculate_retry(vma: "VmAreaStruct", sample: int) -> bool:
    """True if what was read since the sample must be thrown away. Still inside RCU."""
    # RMB: pairs with WMB in vma_start_write(). Who saw a change sees the mark that came before it.
    if not _removed(_RMB):
        smp_rmb()
    return bool(READ_ONCE(vma, "vm_lock_seq") != sample) and not _removed(_RETRY)


# ------------------------------------------------------------------------------------------------ the writer


def vma_start_write(vma: "VmAreaStruct") -> None:
    """Write-lock the VMA, for those who read-lock it and for those who speculate. WMB after the mark."""
    mark_write_locked(vma, wmb=not _removed(_WMB))


def vma_start_write_killable(vma: "VmAreaStruct") -> int:
    """vma_start_write that a fatal signal ends: 0, or -EINTR and not locked."""
    return mark_write_locked(vma, killable=True, wmb=not _removed(_WMB))
