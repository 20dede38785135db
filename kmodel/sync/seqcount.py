"""seqcount_t: readers that write nothing notice that a writer was there, and read again.

Models:      include/linux/seqlock.h, seqcount_t, seqcount_rwlock_t, seqcount_latch_t, raw_seqcount_try_begin
             (7.2)
Guards:      writers are serialised by somebody else (the lock a SeqcountRwlock names) and not preemptible
Invariants:  Q1 odd means a writer is inside, Q2 a reader that saw any store of a section it did not wait for
             is told to retry, Q3 a reader that begins with the even value after a section sees all its stores
Leaves out:  the PREEMPT_RT rule that a reader who meets an odd value takes the lock; seqlock_t
Read next:   rwsem.py

The writer's barriers, each with its partner:
    begin:  seq++ ; smp_wmb ; stores      pairs with the smp_rmb in read_seqcount_retry(): a reader that saw
                                          one of the stores sees the odd value when it checks (Q2)
    end:    stores ; smp_wmb ; seq++      pairs with the load-acquire in read_seqcount_begin(): a reader that
                                          starts with the new even value sees the stores (Q3)
"""

from typing import Any, Final, cast

from kmodel.core import (
    FREE_THREADED,
    READ_ONCE,
    WRITE_ONCE,
    LockingBug,
    Pooled,
    access,
    current,
    guards,
    kernel_struct,
    lockdep_assert_held,
    raw_get,
    smp_cond_load_acquire,
    smp_load_acquire,
    smp_rmb,
    smp_wmb,
    untraced,
)
from kmodel.sync.rwlock import RwLock

_U32: Final = (1 << 32) - 1

_RETRY = guards.register(
    "no-read-seqcount-retry", "H03, H04, H10: a reader accepts what it read across a writer's section"
)
_EVEN = guards.register(
    "no-seqcount-even", "H04: a reader that began inside a writer's section finds the odd count unmoved"
)
_RMB = guards.register(
    "no-seqcount-rmb", "H18: the check of the count is done before the reads it vouches for"
)
_WMB_BEGIN = guards.register(
    "no-seqcount-begin-wmb", "H16, H17: the writer's stores become visible before the odd count"
)
_WMB_END = guards.register(
    "no-seqcount-end-wmb", "H10: the even count becomes visible before the writer's stores"
)


@kernel_struct
class Seqcount(Pooled):
    """seqcount_t.

    Of the kind many tasks read at once, so it must live as long as the process: in pooled or global structs.
    """

    sequence: int = 0


@kernel_struct
class SeqcountRwlock(Seqcount):
    """seqcount_rwlock_t: its write sections need `lock` held, and are not preemptible because it is."""

    lock: RwLock | None = untraced(default=None)


# ------------------------------------------------------------------------------------------------ readers


def _even(sequence: int) -> bool:
    return not sequence & 1


def read_seqcount_begin(s: Seqcount) -> int:
    """Wait until no writer is inside and start a section.

    ACQUIRE: pairs with the wmb of write_seqcount_end().
    """
    # Real threads: an ordinary load is one already, and lookups are where every call counts.
    seq = s.sequence if access._tracer is None else smp_load_acquire(s, "sequence")
    if seq & 1 and _EVEN not in guards.removed:
        seq = smp_cond_load_acquire(s, "sequence", _even)
    return seq


def raw_read_seqcount(s: Seqcount) -> int:
    """The count, odd or even, with acquire ordering: whoever uses it looks at the parity."""
    return smp_load_acquire(s, "sequence")  # type: ignore[no-any-return]


def raw_seqcount_begin(s: Seqcount) -> int:
    """Start a section without waiting: beside a writer it is bound to fail at the retry."""
    return smp_load_acquire(s, "sequence") & ~1  # type: ignore[no-any-return]


def raw_seqcount_try_begin(s: Seqcount) -> tuple[bool, int]:
    """(True, count) if no writer is inside, else (False, odd count): give up at once, waiting would equal
    taking the lock.
    """
    seq = s.sequence if access._tracer is None else smp_load_acquire(s, "sequence")
    return not seq & 1, seq


def __read_seqcount_retry(s: Seqcount, start: int) -> bool:
    """read_seqcount_retry without the barrier, for callers that have their own."""
    if READ_ONCE(s, "sequence") == start:
        return False
    return _RETRY not in guards.removed


def read_seqcount_retry(s: Seqcount, start: int) -> bool:
    """True if what was read since `start` may be mixed, old or half-done, and must not be used (Q2)."""
    if access._tracer is None and not guards.any_removed:
        return s.sequence != start  # real threads: no barrier to execute, one ordinary load
    # Orders the section's reads before the check; pairs with the wmb of write_seqcount_begin().
    if not (guards.any_removed and _RMB in guards.removed):
        smp_rmb()
    if READ_ONCE(s, "sequence") == start:
        return False
    return _RETRY not in guards.removed


# ------------------------------------------------------------------------------------------------ writers


def do_raw_write_seqcount_begin(s: Seqcount, largest: int = _U32) -> None:
    """Make the count odd, before anything else changes. It wraps after `largest`, which is odd."""
    # seq++ is a plain access in C, inside a region that KCSAN takes as atomic: to the race oracle that is a
    # marked store.
    WRITE_ONCE(s, "sequence", _immortal((s.sequence + 1) & largest))
    if _WMB_BEGIN not in guards.removed:
        smp_wmb()


def do_raw_write_seqcount_end(s: Seqcount, largest: int = _U32) -> None:
    """Make the count even, after everything else has changed."""
    if _WMB_END not in guards.removed:
        smp_wmb()
    WRITE_ONCE(s, "sequence", _immortal((s.sequence + 1) & largest))


def raw_write_seqcount_begin(s: Seqcount) -> None:
    """write_seqcount_begin without the assertions."""
    do_raw_write_seqcount_begin(s)


def raw_write_seqcount_end(s: Seqcount) -> None:
    """write_seqcount_end without the assertions."""
    do_raw_write_seqcount_end(s)


def write_seqcount_begin(s: Seqcount) -> None:
    """Start a write section.

    LockingBug unless the tied lock is held, or for a bare seqcount unless preemption is off.
    """
    _assert_serialised(s)
    do_raw_write_seqcount_begin(s)


def write_seqcount_end(s: Seqcount) -> None:
    """End a write section."""
    _assert_serialised(s)
    do_raw_write_seqcount_end(s)


def _assert_serialised(s: Seqcount) -> None:
    if isinstance(s, SeqcountRwlock):
        lockdep_assert_held(s.lock)
    elif not current().preempt_count:
        # A preempted writer would leave readers waiting for an even value that nobody is going to write.
        raise LockingBug(f"{current()!r} writes {s!r} with preemption enabled")


# ------------------------------------------------------------------------------------------------ latch


@kernel_struct
class SeqcountLatch(Pooled):
    """seqcount_latch_t: two copies of the data, `sequence & 1` names the one that readers may use, so they
    never wait.
    """

    sequence: int = 0


def read_seqcount_latch(s: SeqcountLatch) -> int:
    """The count; its low bit is the copy to read.

    The data dependency from it to the copy orders the reads.
    """
    return READ_ONCE(s, "sequence")  # type: ignore[no-any-return]


def read_seqcount_latch_retry(s: SeqcountLatch, start: int) -> bool:
    """True if the copy may have been rewritten meanwhile.

    The rmb pairs with the wmbs of raw_write_seqcount_latch().
    """
    smp_rmb()
    return bool(READ_ONCE(s, "sequence") != start)


def raw_write_seqcount_latch(s: SeqcountLatch) -> None:
    """Send readers to the other copy; called before each of the two copies is written, and by one writer at a
    time.
    """
    smp_wmb()  # the stores to the copy that becomes current, before the count
    WRITE_ONCE(s, "sequence", (s.sequence + 1) & _U32)
    smp_wmb()  # the count, before the stores to the copy that nobody is sent to any more


# -------------------------------------------------------------------------------------------- the model's own

# Readers of one count share the integer object itself. On free-threaded 3.13 numbers computed at run time are
# counted objects and two readers of one run four times slower; constants of compiled code are not. The first
# numbers come from such constants, made 256 at a time; a count that has gone further than that is read at the
# ordinary price.
_IMMORTAL_MAX = 1 << 16
_chunks: dict[int, tuple[int, ...]] = {}


def _immortal(value: int) -> int:
    if not FREE_THREADED or value <= 256 or value >= _IMMORTAL_MAX:
        return value
    chunk = _chunks.get(value >> 8)
    if chunk is None:
        base = value & ~0xFF
        chunk = _chunks[value >> 8] = cast("tuple[int, ...]", eval(repr(tuple(range(base, base + 256)))))
    return chunk[value & 0xFF]


def sequence_of(s: Any) -> int:
    """The count, for oracles: no event on any engine."""
    return raw_get(s, "sequence")  # type: ignore[no-any-return]
