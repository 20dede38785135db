"""From the schedule that broke something to one that a person can follow: fewest preemptions, then recorded.

Models:      nothing in Linux
Guards:      none
Invariants:  Z1 what is shown breaks the same property as what was found
Read next:   explore/record.py
"""

import time
from collections.abc import Callable
from typing import Any

import attrs

from kmodel.explore.events import Violation
from kmodel.explore.record import Recorder
from kmodel.explore.search import Search
from kmodel.explore.strategies import Fixed, Guided, preemptions_of

_TRIES = 400
_SECONDS = 2.0


@attrs.frozen
class Shown:
    """An execution that ran with a recorder."""

    engine: Any
    recorder: Recorder
    violation: Violation | None
    preemptions: int


def record(engine: Any, search: Search) -> Shown:
    """Run the one execution of `search`, recorded."""
    engine.recorder = recorder = Recorder()
    search.attach(engine)
    engine.run()
    return Shown(engine, recorder, engine.violation, preemptions_of(engine.stack))


def _run(new_engine: Callable[[Any], Any], program: Any, search: Search, stop: Callable[[Any], bool]) -> Any:
    engine = new_engine(program)
    engine.stop = lambda: stop(engine)
    search.attach(engine)
    engine.run()
    return engine


def simplest(
    program: Any,
    new_engine: Callable[[Any], Any],
    found: Any,
    schedule: list[tuple[int, Any]],
    violation: Violation,
) -> Shown | None:
    """The same violation with as few preemptions as a short search finds; None: the schedule as it is."""
    best = preemptions_of(found.stack)
    if best == 0:
        return None
    deadline = time.monotonic() + _SECONDS

    def enough(engine: Any) -> bool:
        return engine.executions >= _TRIES or time.monotonic() > deadline

    for bound in range(best):
        engine = _run(new_engine, program, Search(preemptions=bound), enough)
        if engine.violation is not None and engine.violation.kind == violation.kind:
            return record(new_engine(program), Fixed([(node.task, node.label) for node in engine.stack]))
        if time.monotonic() > deadline:
            break
    return _merge(program, new_engine, found, violation, best, deadline)


def _merge(
    program: Any,
    new_engine: Callable[[Any], Any],
    found: Any,
    violation: Violation,
    best: int,
    deadline: float,
) -> Shown | None:
    """Delete switches one by one: let a task's next block follow its last one directly."""
    blocks, results = _blocks(found)
    kept: Any = None
    i = 0
    while i < len(blocks) and time.monotonic() < deadline:
        task, length = blocks[i]
        later = next((j for j in range(i + 1, len(blocks)) if blocks[j][0] == task), None)
        if later is None:
            i += 1
            continue
        tried = [*blocks[:i], (task, length + blocks[later][1]), *blocks[i + 1 : later], *blocks[later + 1 :]]
        engine = _run(new_engine, program, Guided(tried, results), lambda _engine: False)
        if (
            engine.violation is not None
            and engine.violation.kind == violation.kind
            and preemptions_of(engine.stack) < best
        ):
            best, kept = preemptions_of(engine.stack), [(node.task, node.label) for node in engine.stack]
            blocks, results = _blocks(engine)
            i = 0
        else:
            i += 1
    return None if kept is None else record(new_engine(program), Fixed(kept))


def _blocks(engine: Any) -> tuple[list[tuple[int, int]], dict[tuple[int, int], Any]]:
    """A schedule as runs of one task, and the results of its accesses by (task, its how-manieth event)."""
    blocks: list[tuple[int, int]] = []
    names: list[tuple[int, int]] = []
    count: dict[int, int] = {}
    results: dict[tuple[int, int], Any] = {}
    for node in engine.stack:
        n = count.get(node.task, 0)
        count[node.task] = n + 1
        names.append((node.task, n))
        if blocks and blocks[-1][0] == node.task:
            blocks[-1] = (node.task, blocks[-1][1] + 1)
        else:
            blocks.append((node.task, 1))
        label = node.label
        is_event = isinstance(label, int) and 0 <= label < len(names) - 1
        results[names[-1]] = names[label] if is_event else label
    return blocks, results
