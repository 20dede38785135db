"""The judge: counts, the last steps of every task, and what was found wrong.

Models:      nothing in Linux; kernel/rcu/rcutorture.c is its relative
Guards:      a task's log is written by that task only; `violations` grows by appending
Invariants:  Z1 a verdict is clean only if something was checked and the hard paths were met
Leaves out:  exact order of steps of different tasks: their clock readings order them as well as a shared
             clock can
Read next:   torture/tasks.py
"""

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from kmodel.core import KernelObject, ptr
from kmodel.fs import Inode

RING = 64
MOST_VIOLATIONS = 20
# How far around a violation other tasks' steps are shown.
SHOWN_NS = 20_000_000
SHOWN_STEPS = 14


def name_of(obj: Any) -> str:
    """A short name that stays the same for one struct: its type and the end of its address; of an inode,
    its file.
    """
    if isinstance(obj, Inode):
        return f"inode of {obj.path.rpartition('/')[2]}"
    return "NULL" if obj is None else f"{type(obj).__name__}@{ptr(obj) & 0xFFFFFFF:07x}"


def show(value: Any) -> Any:
    """A value of a remembered step as it is to be printed: structs by name, anything else as it is."""
    return name_of(value) if value is None or isinstance(value, KernelObject) else value


class Violated(Exception):
    """A task's check failed and was reported; the task ends."""


class TaskLog:
    """What one task did: counters, a heartbeat, and its last steps. Made by the task itself, so that
    writing it is cheap.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: dict[str, int] = {}
        self.ring: deque[tuple[int, str, tuple[Any, ...]]] = deque(maxlen=RING)
        self.beat = 0
        self.ended = False
        # set by the main thread
        self.go = False
        self.stop = False

    def count(self, what: str) -> None:
        """Add one to a counter."""
        counts = self.counts
        counts[what] = counts.get(what, 0) + 1

    def note(self, text: str, *values: Any) -> None:
        """Remember a step. `text` is a format for `values`, applied only if the step is ever shown; a struct
        among them
        is shown by its name.
        """
        self.ring.append((time.monotonic_ns(), text, values))

    def steps(self) -> list[tuple[int, str]]:
        """The remembered steps as (time, text); callable by others while the task runs."""
        for _attempt in range(5):
            try:
                kept = list(self.ring)
            except RuntimeError:  # the task appended meanwhile
                continue
            return [(at, text.format(*map(show, values)) if values else text) for at, text, values in kept]
        return []


@attrs.frozen
class Violation:
    """One thing that was wrong."""

    property: str
    message: str
    task: str
    after: float
    facts: tuple[str, ...] = ()
    timeline: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """As text, for people."""
        return [
            f"{self.property}: {self.message}",
            f"  found by {self.task} after {self.after:.2f} s",
            *(f"  {fact}" for fact in self.facts),
            *(
                ["  last steps (us before the report):", *(f"    {line}" for line in self.timeline)]
                if self.timeline
                else []
            ),
        ]


class Oracle:
    """Collects logs and violations of one run."""

    def __init__(self, now: Callable[[], int] = time.monotonic_ns) -> None:
        self.now = now
        self.started = now()
        self.logs: list[TaskLog] = []
        self.violations: list[Violation] = []
        self.suppressed = 0

    def totals(self) -> dict[str, int]:
        """All tasks' counters added up."""
        sums: dict[str, int] = {}
        for log in list(self.logs):
            for what, n in list(log.counts.items()):
                sums[what] = sums.get(what, 0) + n
        return sums

    def report(
        self,
        log: TaskLog | None,
        rule: str,
        message: str,
        facts: Iterable[str] = (),
        others: str = "",
        about: int = 0,
    ) -> Violation:
        """Record a violation that `log`'s task found, with its steps and those of other tasks around `about`
        (now).

        `others` narrows the other tasks by the beginning of their names, "|" between alternatives.
        """
        at = self.now()
        violation = Violation(
            property=rule,
            message=message,
            task=log.name if log is not None else "the monitor",
            after=(at - self.started) / 1e9,
            facts=tuple(facts),
            timeline=tuple(self._timeline(log, others, about or at, at)),
        )
        if len(self.violations) < MOST_VIOLATIONS:
            self.violations.append(violation)
        else:
            self.suppressed += 1
        return violation

    def violate(
        self,
        log: TaskLog,
        rule: str,
        message: str,
        facts: Iterable[str] = (),
        others: str = "",
        about: int = 0,
    ) -> None:
        """report(), and end the task by raising Violated."""
        self.report(log, rule, message, facts, others, about)
        raise Violated(message)

    def crashed(self, log: TaskLog | None, rule: str, error: BaseException) -> None:
        """Record what a task died of: the access that raised, and the steps that led there."""
        frames = traceback.extract_tb(error.__traceback__)
        shown = [f"{f.filename.rpartition('/kmodel/')[2]}:{f.lineno} {f.name}: {f.line}" for f in frames[-8:]]
        self.report(
            log,
            rule,
            f"{type(error).__name__}: {error}",
            ["the access that failed, innermost last:", *(f"  {line}" for line in shown)],
        )

    def _timeline(self, mine: TaskLog | None, others: str, about: int, now: int) -> list[str]:
        wanted = tuple(others.split("|")) if others else ("",)
        own: list[tuple[int, str, str]] = []
        rest: list[tuple[int, str, str]] = []
        for log in list(self.logs):
            if log is not mine and not log.name.startswith(wanted):
                continue
            steps = [(at, log.name, text) for at, text in log.steps() if abs(at - about) <= SHOWN_NS]
            (own if log is mine else rest).extend(steps)
        own = own[-SHOWN_STEPS:]
        # Of the others, those nearest in time.
        rest = sorted(sorted(rest, key=lambda step: abs(step[0] - about))[:SHOWN_STEPS])
        width = max((len(name) for _at, name, _text in [*own, *rest]), default=0)
        return [
            f"{(at - now) / 1000:10.1f}  {name:{width}}  {text}" for at, name, text in sorted([*own, *rest])
        ]
