"""One search in several parts, which need not know of each other: by prefix of the schedule.

Models:      nothing in Linux
Guards:      none; parts share nothing
Invariants:  U1 the parts of a search together look at what it looks at, each execution in one part only
Read next:   explore/pytest_plugin.py, which gives parts to pytest-xdist's workers

Every part walks the same top of the tree, in which all tasks are tried at every step (what a race deeper
down would ask for is tried already, so no part needs to hear of another's races). Where the top ends a job
begins; the parts take turns. Sleep sets reach across jobs: a job knows which of its executions an earlier
one looks at, whoever runs that.
"""

from collections.abc import Iterable
from typing import Any

import attrs

from kmodel.explore.events import START, Runner, Verdict
from kmodel.explore.search import Search

_JOBS_PER_PART = 8
_WORST = (Verdict.PASS, Verdict.BOUNDED, Verdict.INCONCLUSIVE, Verdict.FAIL)


class Share(Search):
    """Part number `part` of `parts`."""

    def __init__(self, part: int, parts: int, *, reduce: bool = True) -> None:
        if not 0 <= part < parts:
            raise ValueError(f"part=({part}, {parts}): the first must be less than the second")
        super().__init__(reduce=reduce)
        self.part, self.parts = part, parts
        self.jobs = 0

    def _mine(self) -> bool:
        if self.e.checking:  # the first execution is run twice
            return True
        job, self.jobs = self.jobs, self.jobs + 1
        if job % self.parts == self.part:
            return True
        self.e.over = "skipped"
        return False

    def extend(self, me: Runner | None) -> Runner | None:
        stack = self.e.stack
        weight = stack[-1].weight if stack else 1
        if weight == 0:
            return super().extend(me)
        if weight >= self.parts * _JOBS_PER_PART:
            return super().extend(me) if self._mine() else None
        before = len(stack)
        chosen = super().extend(me)
        if chosen is None or len(stack) == before:
            return chosen
        node = stack[-1]
        node.weight = weight
        if chosen.kind != START:  # which comes first makes no difference to anything
            node.todo = node.enabled & ~node.asleep
            node.weight *= node.todo.bit_count() * (1 + len(node.labels))
        return chosen

    def ended(self) -> None:
        stack = self.e.stack
        if not stack or stack[-1].weight == 0 or self._mine():
            super().ended()


@attrs.frozen
class Merged:
    """The parts' results together."""

    verdict: Verdict
    executions: int
    blocked: int
    outcomes: frozenset[Any]
    parts: int

    def __str__(self) -> str:
        text = f"{self.verdict.value} in {self.parts} parts: {self.executions} executions"
        if self.blocked:
            text += f" ({self.blocked} more cut short as redundant)"
        return f"{text}, {len(self.outcomes)} outcomes" if self.outcomes else text


def merge(results: Iterable[Any]) -> Merged:
    """The worst verdict, all outcomes, the sum of executions."""
    listed = list(results)
    return Merged(
        max((r.verdict for r in listed), key=_WORST.index, default=Verdict.INCONCLUSIVE),
        sum(r.executions for r in listed),
        sum(r.blocked for r in listed),
        frozenset().union(*(r.outcomes for r in listed)),
        len(listed),
    )
