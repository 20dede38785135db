"""Speculation on one VMA, in the world it was proposed for; sequence numbers that wrap; lost wake-ups."""

import pytest

from kmodel.core import boot, guards, smp_wmb
from kmodel.explore import Verdict, explore
from kmodel.hazards.vma_lives import LongReader, look_twice_and_leave, other_work_then_change
from kmodel.hazards.vma_speculation import State, change, change_twice, look
from kmodel.mm import mmap_write_lock, mmap_write_unlock, older_int_mm_lock_seq, vma_mark_detached
from kmodel.mm.mmap_lock import mm_lock_seq_bits, mm_lock_seq_largest
from kmodel.mm.vma_lock import vma_start_write
from tests.mm.test_vma_lock_explored import State as OneMapping
from tests.mm.test_vma_lock_explored import reader_of_fields

pytestmark = pytest.mark.explore

ORDERS = ("wmb", "rmb", "vm-acquire", "mm-acquire")


def other_work_first(state):
    """mmap_lock is held for something else, and the next writer changes the VMA."""
    mmap_write_lock(state.mm)
    mmap_write_unlock(state.mm)
    change(state)


def ordered_work_first(state):
    """The same; stores before up_write() come before stores after the next down_write() for everybody, which
    is so on real machines, but not by what the memory model says of a release and an acquire.
    """
    mmap_write_lock(state.mm)
    mmap_write_unlock(state.mm)
    smp_wmb()
    change(state)


@pytest.fixture
def older_int():
    """The counter of 2024: it moves at unlock only."""
    with older_int_mm_lock_seq():
        yield


# ------------------------------------------------------------------------------------------------ speculation


@pytest.mark.parametrize(
    ("writer", "memory"),
    [
        (change, "lkmm"),
        (ordered_work_first, "lkmm"),
        (other_work_first, "sc"),
        (other_work_first, "tso"),
    ],
)
def test_speculation_on_a_vma_holds_with_the_older_int(older_int, writer, memory):
    """S1, with the counter it was made for: exhausted, nothing found."""
    assert explore(State, look, writer, memory=memory, races=False).verdict is Verdict.PASS


def test_the_proposal_leans_on_the_order_of_unlock_and_lock(older_int):
    """Between one writer's mm_lock_seq + 1 and the next one's mark are only up_write() and down_write().
    By the memory model a reader may see the mark and not yet the number it is made of.
    """
    result = explore(State, look, other_work_first, memory="lkmm", races=False)
    assert result.verdict is Verdict.FAIL
    assert "the reader accepts" in result.violation.message


@pytest.mark.parametrize("missing", ORDERS)
def test_each_of_the_four_barriers_is_needed(older_int, missing):
    """H17, H18, H19: a reader accepts half of a change if the kernel's memory model may reorder."""
    with guards.without(f"no-vma-speculate-{missing}"):
        result = explore(State, look, ordered_work_first, memory="lkmm", races=False)
    assert result.verdict is Verdict.FAIL
    assert "the reader accepts" in result.violation.message


@pytest.mark.parametrize("memory", ["sc", "tso"])
@pytest.mark.parametrize("missing", ORDERS)
def test_x86_needs_none_of_them(older_int, missing, memory):
    """Without reordering, or with x86's store buffers alone, each may be missing."""
    with guards.without(f"no-vma-speculate-{missing}"):
        result = explore(State, look, other_work_first, memory=memory, races=False)
    assert result.verdict is Verdict.PASS


def test_the_order_of_the_samples_needs_two_holds_of_mmap_lock(older_int):
    """H19 with the older int: one writer alone is noticed, whichever number is read first; two are not."""
    with guards.without("no-vma-speculate-order"):
        one = explore(State, look, change, memory="sc", races=False)
        two = explore(State, look, other_work_first, memory="sc", races=False)
    assert (one.verdict, two.verdict) == (Verdict.PASS, Verdict.FAIL)


# ------------------------------------------------------------------------------------------------ wraps


@pytest.mark.parametrize(("bits", "verdict"), [(1, Verdict.FAIL), (2, Verdict.PASS), (32, Verdict.PASS)])
def test_a_reader_meets_the_wrap_of_the_older_int(older_int, bits, verdict):
    """H20: two changes during one look are one round of one bit; no round of two."""
    with mm_lock_seq_bits(bits):
        assert explore(State, look, change_twice, memory="sc", races=False).verdict is verdict


@pytest.mark.parametrize(("bits", "verdict"), [(2, Verdict.FAIL), (3, Verdict.PASS), (32, Verdict.PASS)])
def test_a_reader_meets_the_wrap_of_the_sequence_count(bits, verdict):
    """H20: the count moves twice for each change, so the same needs a bit more."""
    with mm_lock_seq_bits(bits):
        assert explore(State, look, change_twice, memory="sc", races=False).verdict is verdict


@pytest.mark.parametrize(("bits", "verdict"), [(2, Verdict.FAIL), (3, Verdict.PASS), (32, Verdict.PASS)])
def test_a_writer_meets_the_wrap(bits, verdict):
    """H21: the VMA was locked one round ago, its writer skips the wait, and a reader is inside."""
    threads = (look_twice_and_leave, other_work_then_change)
    with mm_lock_seq_bits(bits):
        assert explore(LongReader, *threads, memory="sc", races=False).verdict is verdict


def test_the_width_is_checked():
    """The count needs its parity."""
    with pytest.raises(ValueError, match="bits=1"), mm_lock_seq_bits(1):
        pass
    with older_int_mm_lock_seq(), mm_lock_seq_bits(1):
        boot()
        assert mm_lock_seq_largest() == 1
    assert mm_lock_seq_largest() == 0xFFFF_FFFF


# ------------------------------------------------------------------------------------------------ wake-ups


def detacher(state):
    """Write-lock and detach: two waits for readers."""
    mmap_write_lock(state.mm)
    vma_start_write(state.vma)
    vma_mark_detached(state.vma)
    mmap_write_unlock(state.mm)


WAIT = (OneMapping, detacher, reader_of_fields)


def test_a_detacher_is_woken_in_every_execution():
    """H29: nobody sleeps for ever, whatever is reordered."""
    assert explore(*WAIT, memory="lkmm").verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("guard", "memory"),
    [
        ("no-vma-detach-wake", "sc"),
        ("no-rcuwait-waiter-mb", "tso"),
        ("no-rcuwait-waker-mb", "lkmm"),
    ],
)
def test_a_wake_up_is_lost_without_a_guard(guard, memory):
    """H29, H30: the wake rule, the barriers of both sides."""
    with guards.without(guard):
        result = explore(*WAIT, memory=memory)
    assert (
        result.verdict,
        result.violation and result.violation.kind,
    ) == (Verdict.FAIL, "lost-wakeup"), str(result)
