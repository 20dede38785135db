"""What a text timeline leaves out of a long execution, and what it never does."""

from typing import Any

from kmodel.core import READ_ONCE, WRITE_ONCE, variables
from kmodel.explore import explore
from kmodel.explore.fold import FOLD_ABOVE, folded
from kmodel.explore.timeline import render

LONG = FOLD_ABOVE


def setup() -> Any:
    return variables(private=0, shared=0, other=0)


def stores(v: Any) -> None:
    for n in range(LONG):
        WRITE_ONCE(v, "private", n)
    WRITE_ONCE(v, "shared", 1)


def checks(v: Any) -> None:
    READ_ONCE(v, "other")
    assert READ_ONCE(v, "shared") == 0, "it was stored"


def trace_of(*threads: Any) -> Any:
    trace = explore(setup, *threads, memory="sc").trace
    assert trace is not None
    return trace


def test_private_steps_stand_in_one_line() -> None:
    """A row of steps that no other task can notice is one line that says how many and whose."""
    trace = trace_of(stores, checks)
    text = render(trace)

    assert f"... {LONG} steps of its own: stores" in text
    assert "private" not in text
    assert "WRITE_ONCE" in text
    assert "*** an assertion failed: it was stored" in text


def test_the_whole_is_to_be_had() -> None:
    """whole=True leaves nothing out."""
    assert render(trace_of(stores, checks), whole=True).count("WRITE_ONCE") == LONG + 1


def test_short_executions_are_shown_as_they_are() -> None:
    """Nothing is left out of what fits on a page."""

    def brief(v: Any) -> None:
        WRITE_ONCE(v, "private", 1)
        WRITE_ONCE(v, "private", 2)
        WRITE_ONCE(v, "shared", 1)

    assert folded(trace_of(brief, checks)) == {}
