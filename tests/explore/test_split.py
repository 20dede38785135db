"""A search in parts looks at what it looks at whole."""

from typing import Any

import pytest

from kmodel.core import READ_ONCE, WRITE_ONCE, variables, xchg
from kmodel.explore import Verdict, explore
from kmodel.explore.litmus import read_litmus, run_litmus
from kmodel.explore.split import merge
from tests.explore.test_litmus import LITMUS


def bump(v: Any) -> None:
    WRITE_ONCE(v, "x", READ_ONCE(v, "x") + 1)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_sum_up(parts: int) -> None:
    """The parts' executions add up to those of the whole, and so do their outcomes."""
    found = [
        explore(lambda: variables(x=0), *[bump] * 4, outcome=lambda v: v.x, memory="sc", part=(part, parts))
        for part in range(parts)
    ]

    together = merge(found)
    assert together.verdict is Verdict.PASS
    assert (together.executions, together.outcomes) == (576, {1, 2, 3, 4})
    assert all(result.executions for result in found)


@pytest.mark.parametrize("memory", ["tso", "lkmm"])
def test_parts_under_weak_memory(memory: str) -> None:
    """Outcome sets of litmus tests are the same in parts."""
    for test in read_litmus(LITMUS)[::40]:
        whole = run_litmus(test, memory)
        together = merge(run_litmus(test, memory, part=(part, 3)) for part in range(3))
        assert together.outcomes == whole.outcomes, test["name"]


def test_a_violation_is_found_by_some_part() -> None:
    """FAIL is the verdict of the whole if one part fails."""

    def once(v: Any) -> None:
        assert xchg(v, "x", 1) == 0 or READ_ONCE(v, "y") == 0
        WRITE_ONCE(v, "y", 1)

    whole = explore(lambda: variables(x=0, y=0), once, once, memory="sc")
    found = [explore(lambda: variables(x=0, y=0), once, once, memory="sc", part=(n, 4)) for n in range(4)]

    assert merge(found).verdict is whole.verdict is Verdict.FAIL


def test_what_cannot_be_split() -> None:
    """Random walks and bounded searches have no parts."""
    with pytest.raises(ValueError, match="can be split"):
        explore(lambda: variables(x=0), bump, strategy="pct", part=(0, 2))
    with pytest.raises(ValueError, match="less than"):
        explore(lambda: variables(x=0), bump, part=(2, 2))
