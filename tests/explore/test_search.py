"""How many executions a search needs, and what it finds."""

import math
from typing import Any

import pytest

from kmodel.core import READ_ONCE, WRITE_ONCE, atomic_dec_and_test, atomic_inc, atomic_inc_not_zero, variables
from kmodel.explore import Verdict, explore


def bump(v: Any) -> None:
    WRITE_ONCE(v, "x", READ_ONCE(v, "x") + 1)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_lost_update(n: int) -> None:
    """n tasks that read and then write one variable: exactly (n!)^2 executions, none of them redundant."""
    result = explore(lambda: variables(x=0), *[bump] * n, outcome=lambda v: v.x, memory="sc")

    assert result.passed
    assert (result.executions, result.blocked) == (math.factorial(n) ** 2, 0)
    assert result.outcomes == set(range(1, n + 1))


@pytest.mark.slow
def test_lost_update_by_five() -> None:
    """Five of them: 14400."""
    result = explore(lambda: variables(x=0), *[bump] * 5, memory="sc")

    assert (result.executions, result.blocked) == (14400, 0)


def counted() -> Any:
    return variables(ref=1, slot=1, freed=0)


def put(v: Any) -> None:
    if atomic_dec_and_test(v, "ref"):
        WRITE_ONCE(v, "slot", None)
        WRITE_ONCE(v, "freed", 1)


def get(v: Any) -> None:
    if READ_ONCE(v, "slot"):
        atomic_inc(v, "ref")
        assert not READ_ONCE(v, "freed"), "it was freed"


def get_not_zero(v: Any) -> None:
    if READ_ONCE(v, "slot") and atomic_inc_not_zero(v, "ref"):
        assert not READ_ONCE(v, "freed"), "it was freed"


def test_resurrection_is_found() -> None:
    """A reference taken from zero is found by the third execution."""
    result = explore(counted, put, get, memory="sc")

    assert result.verdict is Verdict.FAIL
    assert result.executions <= 3
    assert result.violation is not None
    assert result.violation.message == "it was freed"


def test_inc_not_zero_is_exhausted() -> None:
    """With inc-not-zero nothing is wrong, and six executions say so."""
    result = explore(counted, put, get_not_zero, memory="sc")

    assert result.passed
    assert result.executions + result.blocked <= 6


def test_readers_only() -> None:
    """Tasks that only read have one execution."""

    def read(v: Any) -> None:
        for _ in range(4):
            READ_ONCE(v, "x")

    for memory in ("sc", "tso", "lkmm"):
        assert explore(lambda: variables(x=0), read, read, read, memory=memory).executions == 1


def test_failed_cmpxchg_is_a_read() -> None:
    """Two increments-unless-zero of a zero do not depend on each other."""

    def take(v: Any) -> None:
        atomic_inc_not_zero(v, "x")

    for memory in ("sc", "tso", "lkmm"):
        assert explore(lambda: variables(x=0), take, take, take, memory=memory).executions == 1


def test_iterative_bounding_exhausts_too() -> None:
    """Preemption bounds 0, 1, 2, ... until none is left out give the same outcomes, and a PASS."""
    result = explore(
        lambda: variables(x=0), bump, bump, bump, outcome=lambda v: v.x, memory="sc", strategy="iterative"
    )

    assert result.passed
    assert result.outcomes == {1, 2, 3}


@pytest.mark.parametrize("strategy", ["pct", "random", "uniform"])
def test_walks_are_seeded(strategy: str) -> None:
    """Random strategies find the race, do the same for the same seed, and never pass."""
    found = explore(counted, put, get, memory="sc", strategy=strategy, seed=1)
    again = explore(counted, put, get, memory="sc", strategy=strategy, seed=1)
    fixed = explore(counted, put, get_not_zero, memory="sc", strategy=strategy, max_executions=20)

    assert found.verdict is Verdict.FAIL
    assert found.executions == again.executions
    assert (fixed.verdict, fixed.executions) == (Verdict.BOUNDED, 20)
