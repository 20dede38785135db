"""Searches that do not exhaust: seeded random walks, PCT, and the replay of one schedule.

Models:      nothing in Linux
Guards:      the engine's baton
Invariants:  S1 equal seeds give equal schedules, S2 none of these ever says PASS
Read next:   explore/search.py

PCT (Burckhardt et al., 2010) runs the task of the highest random priority and lowers it at d-1 random
steps: a bug that needs d ordered events is found with a chance of at least 1/(n k^(d-1)) per execution. The
uniform walk (Zhao et al., 2025) weighs tasks by how much they still have to do, so that interleavings, not
choices, are about equally likely.
"""

import random
from typing import Any

from kmodel.explore.events import Runner
from kmodel.explore.search import Node, Search


class Walk(Search):
    """At every step any task that can go on, with equal chances."""

    name = "random"
    exhausts = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(reduce=False)
        self.seed = seed
        self.random = random.Random(seed)
        self.lengths: dict[int, int] = {}  # task -> most events it was seen to make
        self.steps = 1

    def begin(self) -> None:
        self.e.stack.clear()
        self.e.plen = 0
        self.made: dict[int, int] = {}

    def extend(self, me: Runner | None) -> Runner | None:
        e = self.e
        enabled = e.enabled() if e.waiting else e.live
        if not enabled:
            self.ended()
            return None
        runners = [r for r in e.runners if enabled >> r.idx & 1]
        chosen: Runner = runners[0] if len(runners) == 1 else self.pick(runners)
        node = Node(chosen.idx, enabled, {}, e.last_runner)
        if e.labelled:
            labels = e.labels(chosen)
            node.label = chosen.label = labels[0] if len(labels) == 1 else self.random.choice(labels)
        e.stack.append(node)
        self.made[chosen.idx] = self.made.get(chosen.idx, 0) + 1
        return chosen

    def pick(self, runners: list[Any]) -> Any:
        """Which of these goes on."""
        return self.random.choice(runners)

    def advance(self, reason: str | None) -> bool:
        for t, count in self.made.items():
            self.lengths[t] = max(count, self.lengths.get(t, 0))
        self.steps = max(self.steps, self.e.depth)
        return self.e.violation is None


class UniformWalk(Walk):
    """Tasks weighed by what they still have to do, as far as earlier executions tell."""

    name = "uniform"

    def pick(self, runners: list[Any]) -> Any:
        weights = [max(1, self.lengths.get(r.idx, 1) - self.made.get(r.idx, 0)) for r in runners]
        return self.random.choices(runners, weights)[0]


class Pct(Walk):
    """Random priorities, lowered at `depth` - 1 random steps of each execution."""

    name = "pct"

    def __init__(self, seed: int = 0, depth: int = 3) -> None:
        super().__init__(seed)
        self.change_points = depth - 1
        self.priorities: dict[int, float] = {}
        self.points: set[int] = set()

    def begin(self) -> None:
        super().begin()
        self.priorities = {}
        self.points = {self.random.randrange(self.steps) for _ in range(self.change_points)}

    def pick(self, runners: list[Any]) -> Any:
        priorities = self.priorities
        for runner in runners:
            if runner.idx not in priorities:
                priorities[runner.idx] = 1 + self.random.random()
        best = max(runners, key=lambda r: priorities[r.idx])
        if self.e.depth in self.points:
            priorities[best.idx] = -self.e.depth
            best = max(runners, key=lambda r: priorities[r.idx])
        if best.kind in (8, 14):  # a task that only waits for others yields, as a busy loop should
            priorities[best.idx] = -self.e.depth - 0.5
        return best


class Fixed(Search):
    """One schedule, then whatever comes first."""

    name = "replay"
    exhausts = False

    def __init__(self, schedule: list[tuple[int, Any]]) -> None:
        super().__init__(reduce=False)
        self.schedule = schedule

    def begin(self) -> None:
        self.e.stack.clear()
        self.e.plen = 0

    def extend(self, me: Runner | None) -> Runner | None:
        e = self.e
        enabled = e.enabled() if e.waiting else e.live
        if not enabled:
            self.ended()
            return None
        d = e.depth
        label = None
        if d < len(self.schedule):
            task, label = self.schedule[d]
            if not enabled >> task & 1:
                e.diverge(f"step {d + 1}: task {task} of the schedule cannot go on")
            chosen: Runner = e.runners[task]
        else:
            chosen = (
                me
                if me is not None and enabled & me.bit
                else e.runners[(enabled & -enabled).bit_length() - 1]
            )
        node = Node(chosen.idx, enabled, {}, e.last_runner)
        if e.labelled:
            labels = e.labels(chosen)
            if label is None:
                label = labels[0]
            elif label not in labels:
                e.diverge(f"step {d + 1}: the access cannot have the result that the schedule says")
            node.label = chosen.label = label
        e.stack.append(node)
        return chosen

    def advance(self, reason: str | None) -> bool:
        return False


class Guided(Fixed):
    """Tasks in blocks, as far as that is possible: how a schedule is made simpler.

    `results` names, for the n-th event of a task, the event whose store it read or landed behind.
    """

    def __init__(self, blocks: list[tuple[int, int]], results: dict[tuple[int, int], Any]) -> None:
        super().__init__([])
        self.blocks = blocks
        self.results = results

    def begin(self) -> None:
        super().begin()
        self.at = self.left = 0
        self.names: dict[int, tuple[int, int]] = {}
        self.numbers: dict[tuple[int, int], int] = {}
        self.count: dict[int, int] = {}

    def extend(self, me: Runner | None) -> Runner | None:
        e = self.e
        enabled = e.enabled() if e.waiting else e.live
        if not enabled:
            self.ended()
            return None
        chosen = None
        while chosen is None and self.at < len(self.blocks):
            task, length = self.blocks[self.at]
            if self.left < length and enabled >> task & 1:
                chosen = e.runners[task]
                self.left += 1
            else:
                self.at, self.left = self.at + 1, 0
        if chosen is None:
            chosen = (
                me
                if me is not None and enabled & me.bit
                else e.runners[(enabled & -enabled).bit_length() - 1]
            )
        node = Node(chosen.idx, enabled, {}, e.last_runner)
        n = self.count.get(chosen.idx, 0)
        self.count[chosen.idx] = n + 1
        self.numbers[chosen.idx, n] = e.depth
        if e.labelled:
            labels = e.labels(chosen)
            wanted = self.results.get((chosen.idx, n))
            label = self.numbers.get(wanted, -1) if isinstance(wanted, tuple) else wanted
            node.label = chosen.label = label if label in labels else labels[0]
        e.stack.append(node)
        return chosen


def preemptions_of(stack: list[Node]) -> int:
    """How often a schedule takes the CPU from a task that could go on."""
    return sum(Search.preempts(node, node.task) for node in stack)
