"""How far a search is: executions so far, and a guess at how many are left.

Models:      nothing in Linux
Guards:      none; it looks at a search that goes on meanwhile, so what it reads may be a moment old
Invariants:  none
Leaves out:  a bound on the error: the search learns of alternatives as it goes, so early guesses are low
Read next:   explore/search.py

A depth-first search knows, for each step of the schedule it is at, which alternatives it has done and which
it still has to. If alternatives are equally large, that says which part of the tree lies behind it.
"""

from typing import Any

import attrs

_SURE_ENOUGH = 1e-4


@attrs.frozen
class Progress:
    """A search at one moment."""

    executions: int
    blocked: int
    seconds: float
    fraction: float | None
    """The part of the tree that lies behind, 0 to 1; None where that cannot be told (random strategies)."""

    @property
    def rate(self) -> float:
        """Executions per second."""
        return (self.executions + self.blocked) / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds until the tree is done, if all goes on as it did; None while that is anybody's guess."""
        if self.fraction is None or self.fraction < _SURE_ENOUGH:
            return None
        return self.seconds * (1 - self.fraction) / self.fraction


def fraction_done(stack: list[Any]) -> float:
    """The part of the tree behind the schedule `stack` (nodes with bit sets `todo` and `done`)."""
    behind, weight = 0.0, 1.0
    for node in stack:
        done = node.done.bit_count()
        branches = (node.todo | node.done).bit_count()
        if branches > 1:
            behind += weight * min(done, branches - 1) / branches
            weight /= branches
    return behind


def progress_of(engine: Any, seconds: float) -> Progress:
    """Where an engine's search is after so many seconds."""
    stack = list(engine.stack)
    fraction = fraction_done(stack) if getattr(engine.search, "exhausts", True) else None
    return Progress(engine.executions, engine.blocked, seconds, fraction)
