"""Page faults under the explorer."""

import pytest

from kmodel.core import BUG_ON, boot, guards
from kmodel.explore import Verdict, explore
from kmodel.mm import (
    Signal,
    mm_alloc,
    mmap,
    mmap_write_lock,
    mmap_write_unlock,
    munmap,
    user_load,
    user_store,
    vma_lookup,
    vma_start_write,
)
from kmodel.mm.page_table import check_invariants
from tests.mm.helpers import ANON, BASE, PAGE, RW

pytestmark = pytest.mark.explore


class State:
    """One mapping of two pages that nobody touched."""

    def __init__(self):
        boot()
        self.mm = mm_alloc()
        mmap(self.mm, BASE, 2 * PAGE, RW, ANON)


class Prepared(State):
    """Its second page was written."""

    def __init__(self):
        super().__init__()
        user_store(self.mm, BASE + PAGE, b"z")


def one(state):
    user_store(state.mm, BASE, b"1")


def two(state):
    user_store(state.mm, BASE + 1, b"2")


def locker(state):
    mmap_write_lock(state.mm)
    vma_start_write(vma_lookup(state.mm, BASE))
    mmap_write_unlock(state.mm)


def storer(state):
    try:
        user_store(state.mm, BASE, b"1")
    except Signal:
        state.signalled = True


def unmapper(state):
    munmap(state.mm, BASE, 2 * PAGE)


def both_stored(state):
    check_invariants(state.mm)
    BUG_ON(user_load(state.mm, BASE, 2) != b"12", "a store was lost")


def whole(state):
    check_invariants(state.mm)


@pytest.mark.parametrize(
    ("setup", "threads", "final", "memory", "preemptions"),
    [
        (Prepared, (one, two), both_stored, "lkmm", 2),
        (State, (one, locker), whole, "lkmm", 2),
        (Prepared, (storer, unmapper), whole, "sc", 1),
    ],
    ids=["two faults", "lock", "munmap"],
)
def test_nothing_is_found(setup, threads, final, memory, preemptions):
    """Up to that many preemptions (a bound, as the verdict says) no execution goes wrong, or races."""
    result = explore(setup, *threads, final=final, memory=memory, preemptions=preemptions, max_seconds=60)
    assert result.verdict in (Verdict.PASS, Verdict.BOUNDED), result.violation
    assert result.executions > 10


@pytest.mark.parametrize(
    ("setup", "threads", "final", "guard"),
    [
        (Prepared, (one, two), both_stored, "no-pte-recheck"),
        (State, (one, locker), whole, "no-anon-prepare-trylock"),
    ],
)
def test_without_a_guard_the_explorer_finds_the_failure(setup, threads, final, guard):
    """F1 a lost store, H38 a deadlock."""
    with guards.without(guard):
        result = explore(setup, *threads, final=final, memory="sc", preemptions=1)
        assert result.verdict is Verdict.FAIL
