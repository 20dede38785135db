"""mmap_lock, and the sequence counter through which it vouches for lockless readers.

Models:      include/linux/mmap_lock.h, mmap_write_lock and friends, vma_end_write_all,
             mmap_lock_speculate_try_begin / _retry (7.2); include/linux/mmap_lock.h (6.12) for the int
             variant
Guards:      mm.mmap_lock itself
Invariants:  I1 mm_lock_seq is odd exactly while mmap_lock is write-held (but for the instructions between)
             I2 it changes only under the write lock
             I3 a reader that saw any store a writer made after the reader's begin sees the count changed at
             its retry
             I4 a reader whose begin returns the value after an unlock sees all that was written before it
Leaves out:  tracepoints, mmap_lock of a downgraded holder excluding other downgraded ones (rwsem readers)
Read next:   mm/vma_lock.py, which compares vm_lock_seq with the count; uprobes/lookup.py

The count does two jobs. Its parity and value let a speculating reader look at the tree and at VMAs with no
lock at all and find out afterwards whether anything may have changed. And a VMA is write-locked while its
vm_lock_seq equals the count, so raising it unlocks every VMA at once.

Before 6.14 it was an int, raised at unlock only: enough for the second job, not for the first (H16). See
older_int_mm_lock_seq().

It wraps. A reader that looks at two moments between which it went round once sees no difference (H20), and a
writer that meets a VMA it last locked one round ago takes it for locked (H21): 2^31 write sections in Linux,
two or so after mm_lock_seq_bits(2).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kmodel.core import READ_ONCE, WRITE_ONCE, guards, smp_load_acquire, smp_rmb, smp_store_release
from kmodel.mm.mm_struct import MmStruct
from kmodel.sync import (
    do_raw_write_seqcount_begin,
    do_raw_write_seqcount_end,
    down_read,
    down_read_killable,
    down_read_trylock,
    down_write,
    down_write_killable,
    downgrade_write,
    raw_seqcount_try_begin,
    read_seqcount_retry,
    rwsem_assert_held,
    rwsem_assert_held_write,
    rwsem_is_contended,
    up_read,
    up_write,
)

_OLD = guards.register(
    "no-mm-seq-begin",
    "H16: mm_lock_seq moves at unlock only, and a reader beside a writer sees it stand still",
)

_WIDE = guards.register(
    "no-wide-mm-seq", "H20, H21: mm_lock_seq is as narrow as can be and comes back to a value somebody knows"
)

_UNSWEPT = guards.register(
    "no-mm-seq-sweep",
    "what Linux 7.2 does, rather than a guard: a VMA keeps the number of its last write lock when "
    "mm_lock_seq wraps (H21). Without it every VMA is marked as unlocked then",
)

_int_seq = False
_largest = 0xFFFF_FFFF

observer: Callable[[MmStruct], None] | None = None
"""For oracles: called with the mm when a write section is about to end, still inside it."""


@contextmanager
def older_int_mm_lock_seq() -> Iterator[None]:
    """Run the block with the mm_lock_seq of 6.4 to 6.13: an int, raised by a release store at write-unlock
    only.

    For VMA locks that is the same. A speculating reader cannot tell that a writer is at work (H16). To be
    switched while no task runs.
    """
    global _int_seq
    before, _int_seq = _int_seq, True
    try:
        yield
    finally:
        _int_seq = before


@contextmanager
def mm_lock_seq_bits(bits: int) -> Iterator[None]:
    """Run the block with a mm_lock_seq, and so a vm_lock_seq, of so many bits (32 in Linux). The block boots.

    One bit is enough for the older int; the sequence count needs one more, for its parity.
    """
    global _largest
    if not (1 if _is_int() else 2) <= bits <= 32:
        raise ValueError(f"bits={bits}: must be 1 (2 for the sequence count) to 32")
    before, _largest = _largest, (1 << bits) - 1
    try:
        yield
    finally:
        _largest = before


# ---------------------------------------------------------------------------------------------- mm_lock_seq


def mm_lock_seq_largest() -> int:
    """The value after which mm_lock_seq wraps: odd, so no unlocked mm has it. What a new VMA's vm_lock_seq
    is.
    """
    if guards.any_removed and _WIDE in guards.removed:
        return 1 if _is_int() else 3
    return _largest


def _is_int() -> bool:
    return _int_seq or (guards.any_removed and _OLD in guards.removed)


def mm_lock_seqcount_begin(mm: MmStruct) -> None:
    """The write lock was taken: odd from here. seq++ ; WMB: pairs with RMB in mmap_lock_speculate_retry()."""
    if not _is_int():
        do_raw_write_seqcount_begin(mm.mm_lock_seq, mm_lock_seq_largest())


def mm_lock_seqcount_end(mm: MmStruct) -> None:
    """The write lock is about to be dropped. WMB ; seq++: pairs with ACQUIRE in
    mmap_lock_speculate_try_begin() and in vma_start_read().
    """
    rwsem_assert_held_write(mm.mmap_lock)
    if _is_int():
        seq = mm.mm_lock_seq
        smp_store_release(seq, "sequence", (seq.sequence + 1) & mm_lock_seq_largest())
    else:
        do_raw_write_seqcount_end(mm.mm_lock_seq, mm_lock_seq_largest())
        if guards.any_removed and _UNSWEPT in guards.removed and mm.mm_lock_seq.sequence == 0:
            _sweep(mm)


def _sweep(mm: MmStruct) -> None:
    """Not in Linux, but what would end H21 there: the count has wrapped, so forget what VMAs were locked at.

    Every write lock has just ended, and mmap_lock is still held, so nobody takes a new one. An even number is
    that of no write lock; one that is not the count of this moment locks no reader out either.
    """
    from kmodel.mm.vma_iter import for_each_vma

    for vma in for_each_vma(mm):
        WRITE_ONCE(vma, "vm_lock_seq", 2)


def mmap_lock_speculate_try_begin(mm: MmStruct) -> tuple[bool, int]:
    """(True, sample) if no writer is at work, else (False, ...): waiting would equal taking the lock."""
    if _is_int():
        return True, smp_load_acquire(mm.mm_lock_seq, "sequence")
    return raw_seqcount_try_begin(mm.mm_lock_seq)


def mmap_lock_speculate_retry(mm: MmStruct, seq: int) -> bool:
    """True if what was read since the sample must be thrown away. RMB ; compare."""
    if _is_int():
        smp_rmb()
        return bool(READ_ONCE(mm.mm_lock_seq, "sequence") != seq)
    return read_seqcount_retry(mm.mm_lock_seq, seq)


def vma_end_write_all(mm: MmStruct) -> None:
    """Unlock every VMA that was write-locked in this hold: there is no per-VMA write unlock."""
    if observer is not None:
        observer(mm)
    mm_lock_seqcount_end(mm)


# ---------------------------------------------------------------------------------------------- write lock


def mmap_write_lock(mm: MmStruct) -> None:
    """Exclude everybody; speculating readers find out by the count."""
    down_write(mm.mmap_lock)
    mm_lock_seqcount_begin(mm)


mmap_write_lock_nested = mmap_write_lock
"""The same for a second address space (fork): lock classes are left out."""


def mmap_write_lock_killable(mm: MmStruct) -> int:
    """mmap_write_lock that a fatal signal ends: 0 or -EINTR, and then the count is untouched."""
    error = down_write_killable(mm.mmap_lock)
    if not error:
        mm_lock_seqcount_begin(mm)
    return error


def mmap_write_unlock(mm: MmStruct) -> None:
    """Unlock the VMAs, then the address space."""
    vma_end_write_all(mm)
    up_write(mm.mmap_lock)


def mmap_write_downgrade(mm: MmStruct) -> None:
    """Become a reader with no moment unlocked between. VMAs are unlocked: faults under VMA locks go on."""
    vma_end_write_all(mm)
    downgrade_write(mm.mmap_lock)


# ---------------------------------------------------------------------------------------------- read lock


def mmap_read_lock(mm: MmStruct) -> None:
    """Keep mappings from changing; sleeps."""
    down_read(mm.mmap_lock)


def mmap_read_lock_killable(mm: MmStruct) -> int:
    """mmap_read_lock that a fatal signal ends: 0 or -EINTR."""
    return down_read_killable(mm.mmap_lock)


def mmap_read_trylock(mm: MmStruct) -> bool:
    """mmap_read_lock if that needs no waiting."""
    return down_read_trylock(mm.mmap_lock)


def mmap_read_unlock(mm: MmStruct) -> None:
    """Let writers in again."""
    up_read(mm.mmap_lock)


# ---------------------------------------------------------------------------------------------- assertions


def mmap_assert_locked(mm: MmStruct) -> None:
    """LockingBug unless current holds mmap_lock in any mode."""
    rwsem_assert_held(mm.mmap_lock)


def mmap_assert_write_locked(mm: MmStruct) -> None:
    """LockingBug unless current holds mmap_lock for writing."""
    rwsem_assert_held_write(mm.mmap_lock)


def mmap_lock_is_contended(mm: MmStruct) -> bool:
    """Whether somebody waits for mmap_lock, at some moment."""
    return rwsem_is_contended(mm.mmap_lock)
