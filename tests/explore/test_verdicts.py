"""What an exploration says, and above all when it must not say PASS."""

import itertools
from typing import Any

import pytest

from kmodel.core import READ_ONCE, WRITE_ONCE, Struct, cpu_relax, kernel_struct, variables
from kmodel.explore import Verdict, explore


def bump(v: Any) -> None:
    WRITE_ONCE(v, "x", READ_ONCE(v, "x") + 1)


def no_lost_update(v: Any) -> None:
    assert v.x == 2, "an update was lost"


@pytest.mark.parametrize(
    ("bound", "says"),
    [
        ({"max_executions": 3}, "max_executions=3"),
        ({"max_seconds": 0.0}, "max_seconds=0.0"),
        ({"preemptions": 0}, "preemptions=0"),
        ({"max_steps": 3}, "max_steps=3"),
        ({"strategy": "random"}, "strategy='random' does not exhaust"),
    ],
)
def test_a_bound_never_passes(bound: dict[str, Any], says: str) -> None:
    """A search that a bound stopped is BOUNDED, names the bound, and fails `assert result.passed`."""
    result = explore(lambda: variables(x=0), bump, bump, bump, memory="sc", **bound)

    assert result.verdict is Verdict.BOUNDED
    assert not result.passed
    assert result.passed_within(Verdict.BOUNDED)
    assert says in (result.reason or "")


def test_a_bound_that_is_not_reached_does_not_matter() -> None:
    """An exhausted search is PASS whatever bounds it had."""
    result = explore(lambda: variables(x=0), bump, bump, memory="sc", max_executions=100, max_seconds=60)

    assert result.passed
    assert result.reason is None


def test_final_state_is_judged() -> None:
    """final() sees each execution's last state; its assertion is the violation."""
    for memory in ("sc", "tso", "lkmm"):
        result = explore(lambda: variables(x=0), bump, bump, final=no_lost_update, memory=memory)
        assert result.verdict is Verdict.FAIL
        assert result.violation is not None
        assert (result.violation.kind, result.violation.message) == ("assertion", "an update was lost")


def test_errors_of_the_setup_are_the_callers() -> None:
    """What setup() raises is no finding about the model."""

    def setup() -> Any:
        raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file"):
        explore(setup, bump)
    assert explore(lambda: variables(x=0), bump).passed  # and the next exploration works


@pytest.mark.parametrize(
    "options",
    [{"memory": "arm"}, {"strategy": "luck"}, {"strategy": "pct", "preemptions": 2}],
)
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    """A misspelt option is a ValueError that lists the known ones."""
    with pytest.raises(ValueError, match=r"must be one of|only strategy"):
        explore(lambda: variables(x=0), bump, **options)


def test_nondeterminism_is_told() -> None:
    """A model that keeps state between executions is told so, with what differed."""
    counter = itertools.count()

    def leaky(v: Any) -> None:
        READ_ONCE(v, "x" if next(counter) % 2 else "y")

    result = explore(lambda: variables(x=0, y=0), leaky, bump)

    assert result.verdict is Verdict.INCONCLUSIVE
    assert "step 2" in (result.reason or "")
    assert "no schedule determines" in (result.reason or "")


def test_a_different_outcome_is_nondeterminism_too() -> None:
    """The first execution is run twice; its outcome must be the same."""
    counter = itertools.count()

    result = explore(lambda: variables(x=0), bump, outcome=lambda _v: next(counter))

    assert result.verdict is Verdict.INCONCLUSIVE
    assert "run twice" in (result.reason or "")


def test_watchdog() -> None:
    """A task that loops without accesses is stopped, and its stack shown."""

    def hang(v: Any) -> None:
        READ_ONCE(v, "x")
        while True:
            pass

    result = explore(lambda: variables(x=0), hang, bump, hang_seconds=0.3)

    assert result.verdict is Verdict.INCONCLUSIVE
    assert "hang made no access for 0.3 seconds" in (result.reason or "")
    assert "test_verdicts.py" in (result.reason or "")
    assert explore(lambda: variables(x=0), bump).passed


def test_a_loop_with_accesses_is_cut() -> None:
    """A busy loop that stores in every turn is cut off after max_steps; that is no pass."""

    def busy(v: Any) -> None:
        while not READ_ONCE(v, "y"):
            WRITE_ONCE(v, "x", 1)
            cpu_relax()

    result = explore(lambda: variables(x=0, y=0), busy, max_steps=50)

    assert result.verdict is Verdict.BOUNDED
    assert "max_steps=50" in (result.reason or "")


@kernel_struct
class Global(Struct):
    """Built outside any setup."""

    n: int = 0


GLOBAL = Global()


def test_objects_from_outside() -> None:
    """An object that no setup() built has the same values at the start of every execution, and afterwards."""

    def add(_state: Any) -> None:
        WRITE_ONCE(GLOBAL, "n", READ_ONCE(GLOBAL, "n") + 1)

    for memory in ("sc", "tso", "lkmm"):
        result = explore(lambda: None, add, add, outcome=lambda _s: GLOBAL.n, memory=memory)
        assert result.passed
        assert result.outcomes == {1, 2}
        assert (GLOBAL.n, GLOBAL._k_id) == (0, None)


def test_explorations_do_not_nest() -> None:
    """explore() inside a task of another exploration is an error, not a mess."""

    def nested(_v: Any) -> None:
        explore(lambda: variables(x=0), bump)

    result = explore(lambda: variables(x=0), nested)

    assert result.verdict is Verdict.FAIL
    assert "already installed" in str(result.violation)
