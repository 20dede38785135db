"""How far a search is."""

from typing import Any

import attrs
import pytest

from kmodel.core import READ_ONCE, WRITE_ONCE, variables
from kmodel.explore import Verdict, explore
from kmodel.explore.progress import Progress, fraction_done


@attrs.define
class _Node:
    todo: int
    done: int


@pytest.mark.parametrize(
    ("stack", "fraction"),
    [
        ([], 0.0),
        ([_Node(0b1, 0)], 0.0),
        ([_Node(0b11, 0)], 0.0),
        ([_Node(0b11, 0b01)], 1 / 2),
        ([_Node(0b111, 0b011), _Node(0b11, 0b01)], 2 / 3 + 1 / 6),
        ([_Node(0b11, 0b01), _Node(0b1, 0), _Node(0b11, 0b10)], 3 / 4),
    ],
)
def test_the_part_behind(stack: list[Any], fraction: float) -> None:
    """The part of the tree behind a schedule is that of the alternatives done at each of its steps."""
    assert fraction_done(stack) == pytest.approx(fraction)


def test_rate_and_remaining() -> None:
    """A quarter done in two seconds leaves six; nothing done leaves anybody's guess."""
    assert Progress(90, 10, 2.0, 0.25).rate == 50
    assert Progress(90, 10, 2.0, 0.25).remaining == 6
    assert Progress(90, 10, 2.0, 0.0).remaining is None
    assert Progress(90, 10, 2.0, None).remaining is None
    assert Progress(0, 0, 0.0, None).rate == 0


def test_a_search_can_be_stopped() -> None:
    """A progress function that returns False ends the search, and that is no pass."""
    seen: list[Progress] = []

    def bump(v: Any) -> None:
        WRITE_ONCE(v, "x", READ_ONCE(v, "x") + 1)

    def stop(progress: Progress) -> bool:
        seen.append(progress)
        return False

    result = explore(lambda: variables(x=0), *[bump] * 6, memory="sc", progress=stop)

    assert result.verdict is Verdict.BOUNDED
    assert result.executions >= seen[0].executions > 0
