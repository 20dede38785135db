"""seqcount_t: parity, retries, the tied lock, barriers, and the torn read that the retry prevents."""

from typing import Any

import pytest

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    LockingBug,
    Struct,
    cpu_relax,
    embedded,
    guards,
    kernel_struct,
)
from kmodel.sync import (
    RwLock,
    Seqcount,
    SeqcountLatch,
    SeqcountRwlock,
    SpinLock,
    do_raw_write_seqcount_begin,
    do_raw_write_seqcount_end,
    raw_read_seqcount,
    raw_seqcount_begin,
    raw_seqcount_try_begin,
    raw_write_seqcount_latch,
    read_seqcount_begin,
    read_seqcount_latch,
    read_seqcount_latch_retry,
    read_seqcount_retry,
    seqcount,
    spin_lock,
    spin_unlock,
    write_lock,
    write_seqcount_begin,
    write_seqcount_end,
    write_unlock,
)
from tests.sync.running import failures, kinds_of, on_threads, trace_of, under_seeds


def test_parity_and_begin() -> None:
    """Even outside a write section, odd inside; each way to begin deals with odd in its own manner."""
    s = Seqcount()
    assert (read_seqcount_begin(s), raw_seqcount_try_begin(s)) == (0, (True, 0))

    do_raw_write_seqcount_begin(s)
    assert (raw_seqcount_try_begin(s), raw_read_seqcount(s), raw_seqcount_begin(s)) == ((False, 1), 1, 0)

    do_raw_write_seqcount_end(s)
    assert (read_seqcount_begin(s), raw_seqcount_try_begin(s)) == (2, (True, 2))


def test_retry_sees_a_writer() -> None:
    """A section is to be read again if a writer began, was inside or ended meanwhile, and only then."""
    s = Seqcount()
    quiet = read_seqcount_retry(s, read_seqcount_begin(s))
    start = read_seqcount_begin(s)
    do_raw_write_seqcount_begin(s)
    began, inside = read_seqcount_retry(s, start), read_seqcount_retry(s, raw_seqcount_begin(s))
    do_raw_write_seqcount_end(s)

    assert (quiet, began, inside, read_seqcount_retry(s, start)) == (False, True, True, True)


def test_count_wraps_at_32_bits() -> None:
    """The count is an unsigned int."""
    s = Seqcount(sequence=(1 << 32) - 1)
    do_raw_write_seqcount_end(s)

    assert s.sequence == 0


def test_counts_of_all_sizes_count_right() -> None:
    """Numbers from the table of shareable ones and beyond it are the right numbers."""
    s = Seqcount()
    wrong = []
    for start in (0, 250, 510, (1 << 16) - 4):
        s.sequence = start
        for n in range(1, 9):
            do_raw_write_seqcount_begin(s)
            if s.sequence != start + n:
                wrong.append((start, n, s.sequence))

    assert wrong == []


def test_a_write_section_needs_its_lock() -> None:
    """A bare seqcount wants preemption off, a tied one its lock."""
    lock, spin = RwLock(), SpinLock()
    tied, bare = SeqcountRwlock(lock=lock), Seqcount()
    with pytest.raises(LockingBug):
        write_seqcount_begin(bare)
    spin_lock(spin)
    write_seqcount_begin(bare)
    write_seqcount_end(bare)
    with pytest.raises(LockingBug):
        write_seqcount_begin(tied)
    spin_unlock(spin)
    write_lock(lock)
    write_seqcount_begin(tied)
    write_seqcount_end(tied)
    write_unlock(lock)

    assert (bare.sequence, tied.sequence) == (2, 2)


@kernel_struct
class Pair(Struct):
    """Two numbers that are equal whenever no writer is inside."""

    a: int = 0
    b: int = 0
    seq: Seqcount = embedded(factory=Seqcount)


def writer(pair: Pair) -> None:
    for n in (1, 2):
        do_raw_write_seqcount_begin(pair.seq)
        WRITE_ONCE(pair, "a", n)
        WRITE_ONCE(pair, "b", n)
        do_raw_write_seqcount_end(pair.seq)


def read_pair(pair: Pair) -> tuple[int, int]:
    while True:
        start = read_seqcount_begin(pair.seq)
        a, b = READ_ONCE(pair, "a"), READ_ONCE(pair, "b")
        if not read_seqcount_retry(pair.seq, start):
            return a, b
        cpu_relax()


def reader(pair: Pair) -> None:
    a, b = read_pair(pair)
    assert a == b, f"torn: {a} and {b}"


def speculator(pair: Pair) -> None:
    """Give up rather than wait, as find_active_uprobe_speculative() does."""
    ok, start = raw_seqcount_try_begin(pair.seq)
    if not ok:
        return
    a, b = READ_ONCE(pair, "a"), READ_ONCE(pair, "b")
    assert read_seqcount_retry(pair.seq, start) or a == b


def test_no_torn_read() -> None:
    """Under 50 seeds no reader accepts a mixture of two sections."""
    under_seeds(Pair, [writer, reader, speculator])


def test_without_the_retry_reads_are_torn() -> None:
    """H10: with the retry removed some seed accepts a mixture."""
    with guards.without("no-read-seqcount-retry"):
        assert failures(Pair, [writer, reader, speculator]) == {AssertionError}


def test_no_torn_read_on_threads() -> None:
    """The same on real threads, with a writer that does not rest."""

    def busy_writer(pair: Pair) -> None:
        for n in range(400):
            do_raw_write_seqcount_begin(pair.seq)
            pair.a = n
            pair.b = n
            do_raw_write_seqcount_end(pair.seq)

    def busy_reader(pair: Pair) -> None:
        for _ in range(300):
            reader(pair)

    pair = on_threads(Pair(), [busy_writer, busy_reader, busy_reader])

    assert (pair.a, pair.b, pair.seq.sequence) == (399, 399, 800)


def test_barriers_are_where_the_protocol_wants_them() -> None:
    """begin: count, wmb; end: wmb, count; retry: rmb, count.

    Each goes away with its guard and nothing else does.
    """

    def both(pair: Pair) -> None:
        do_raw_write_seqcount_begin(pair.seq)
        do_raw_write_seqcount_end(pair.seq)
        read_seqcount_retry(pair.seq, 2)

    def trace() -> list[str]:
        return kinds_of(trace_of(0, Pair, [both]))

    whole = ["load", "WRITE_ONCE", "wmb", "wmb", "load", "WRITE_ONCE", "rmb", "READ_ONCE"]
    assert trace() == whole
    for guard, missing in (
        ("no-seqcount-begin-wmb", "wmb"),
        ("no-seqcount-end-wmb", "wmb"),
        ("no-seqcount-rmb", "rmb"),
    ):
        with guards.without(guard):
            assert trace().count(missing) == whole.count(missing) - 1


def test_latch_readers_never_wait() -> None:
    """Under 50 seeds a latch reader gets one of the copies whole while a writer is at work on the other."""

    @kernel_struct
    class Latched(Struct):
        a0: int = 0
        b0: int = 0
        a1: int = 0
        b1: int = 0
        seq: SeqcountLatch = embedded(factory=SeqcountLatch)

    def latch_writer(state: Any) -> None:
        for n in (1, 2):
            for copy in "01":
                raw_write_seqcount_latch(state.seq)
                WRITE_ONCE(state, "a" + copy, n)
                WRITE_ONCE(state, "b" + copy, n)

    def latch_reader(state: Any) -> None:
        while True:
            start = read_seqcount_latch(state.seq)
            copy = "01"[start & 1]
            a, b = READ_ONCE(state, "a" + copy), READ_ONCE(state, "b" + copy)
            if not read_seqcount_latch_retry(state.seq, start):
                assert a == b
                return
            cpu_relax()

    under_seeds(Latched, [latch_writer, latch_reader])


def test_sequence_of_is_no_event() -> None:
    """The oracle's look at the count leaves nothing in a trace."""
    seen: list[int] = []

    assert trace_of(0, Pair, [lambda pair: seen.append(seqcount.sequence_of(pair.seq))]) == []
    assert seen == [0]
