"""SRCU's implementation under the explorer: all interleavings and reorderings of small programs, guard by
guard.
"""

from collections.abc import Callable
from typing import Any

import pytest

from kmodel.core import READ_ONCE, WRITE_ONCE, boot, guards, variables
from kmodel.explore import Verdict, explore
from kmodel.rcu import (
    SrcuStruct,
    srcu_read_lock,
    srcu_read_lock_fast,
    srcu_read_unlock,
    srcu_read_unlock_fast,
    synchronize_srcu,
)

pytestmark = pytest.mark.explore

type State = tuple[Any, SrcuStruct]


def domain(fast: bool, use_implementation: bool = True) -> Callable[[], State]:
    def setup() -> State:
        boot()
        return variables(x=0, y=0, z=0), SrcuStruct("s", fast=fast, use_implementation=use_implementation)

    return setup


def lock(ssp: SrcuStruct) -> int:
    return srcu_read_lock_fast(ssp) if ssp.fast else srcu_read_lock(ssp)


def unlock(ssp: SrcuStruct, idx: int) -> None:
    if ssp.fast:
        srcu_read_unlock_fast(ssp, idx)
    else:
        srcu_read_unlock(ssp, idx)


def reader(state: State) -> None:
    """Sees what was before the grace period, or nothing of what comes after it."""
    v, ssp = state
    idx = lock(ssp)
    before = READ_ONCE(v, "x")
    after = READ_ONCE(v, "y")
    unlock(ssp, idx)
    assert (before, after) != (0, 1), "the grace period was too short"


def updater(state: State) -> None:
    v, ssp = state
    WRITE_ONCE(v, "x", 1)
    synchronize_srcu(ssp)
    WRITE_ONCE(v, "y", 1)


def updater_of_two_grace_periods(state: State) -> None:
    synchronize_srcu(state[1])
    updater(state)


def quick_reader(state: State) -> None:
    unlock(state[1], lock(state[1]))


def storing_reader(state: State) -> None:
    v, ssp = state
    idx = lock(ssp)
    WRITE_ONCE(v, "y", 1)
    WRITE_ONCE(v, "z", 1)
    unlock(ssp, idx)


def updater_that_met_the_reader(state: State) -> None:
    v, ssp = state
    if READ_ONCE(v, "y"):
        synchronize_srcu(ssp)
        assert READ_ONCE(v, "z") == 1, "a store of the section came after the grace period"


@pytest.mark.parametrize("fast", [False, True], ids=["normal", "fast"])
@pytest.mark.parametrize(
    ("threads", "memory"),
    [
        ([reader, updater], "lkmm"),
        ([storing_reader, updater_that_met_the_reader], "lkmm"),
        ([reader, updater_of_two_grace_periods], "sc"),
    ],
    ids=["sees", "stores", "late"],
)
def test_the_implementation_keeps_the_guarantee(threads: list[Any], memory: str, fast: bool) -> None:
    """V1: every execution of the implementation is one that the specification allows; the search is
    exhausted.
    """
    result = explore(domain(fast), *threads, memory=memory, max_seconds=60)

    assert result.verdict is Verdict.PASS


def test_the_specification_keeps_it_too() -> None:
    """The same program over the explorer's own grace periods."""
    result = explore(domain(False, use_implementation=False), reader, updater, memory="lkmm", max_seconds=60)

    assert result.verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("guard", "fast", "threads", "memory"),
    [
        ("srcu-second-scan", False, [reader, updater], "sc"),
        ("srcu-first-scan", False, [reader, updater_of_two_grace_periods], "sc"),  # H70
        ("srcu-first-scan", True, [reader, updater_of_two_grace_periods], "sc"),
        ("srcu-unlocks-first", False, [reader, quick_reader, updater], "sc"),  # H69
        pytest.param("srcu-mb-a", False, [reader, quick_reader, updater], "lkmm", marks=pytest.mark.slow),
        ("srcu-mb-a", True, [reader, updater], "lkmm"),
        ("srcu-mb-b", False, [reader, updater], "lkmm"),
        ("srcu-mb-c", False, [storing_reader, updater_that_met_the_reader], "lkmm"),
    ],
)
def test_each_guard_is_needed(guard: str, fast: bool, threads: list[Any], memory: str) -> None:
    """Without the guard some execution ends a grace period too early."""
    with guards.without(guard):
        result = explore(domain(fast), *threads, memory=memory, max_seconds=60)

    assert result.verdict is Verdict.FAIL


def test_the_implicit_readers_of_srcu_fast_are_needed() -> None:
    """If increments were not RCU readers, synchronize_rcu() in the place of barrier A would order nothing."""
    with guards.without("srcu-fast-implicit-rcu"):
        # Depth first, a scan that reads the same stale counts for ever comes first.
        result = explore(
            domain(True),
            reader,
            updater,
            memory="lkmm",
            strategy="pct",
            seed=1,
            max_steps=400,
            max_seconds=60,
        )

    assert result.verdict is Verdict.FAIL
