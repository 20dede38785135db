"""explore(): run a scenario in every way it can happen.

Models:      nothing in Linux
Guards:      one exploration at a time per process
Invariants:  R1 a search that a bound stopped never says PASS, R2 a violation found is found again by its schedule
Read next:   explore/search.py, explore/engine.py
"""

import time
from collections.abc import Callable
from typing import Any

from kmodel.explore.engine import ExploreEngine
from kmodel.explore.events import Verdict, Violation
from kmodel.explore.memory_lkmm import LkmmEngine
from kmodel.explore.memory_sc import ScEngine
from kmodel.explore.progress import Progress, progress_of
from kmodel.explore.memory_tso import TsoEngine
from kmodel.explore.search import Search

ENGINES: dict[str, type[ExploreEngine]] = {"sc": ScEngine, "tso": TsoEngine, "lkmm": LkmmEngine}


class Result:
    """What an exploration found."""

    def __init__(self, engine: ExploreEngine, search: Any, why: str | None) -> None:
        self.executions = engine.executions
        self.blocked = engine.blocked
        self.steps = engine.steps
        self.outcomes = engine.outcomes
        self.violation: Violation | None = engine.violation
        self.reason = why
        if engine.nondeterminism is not None:
            self.verdict, self.reason = Verdict.INCONCLUSIVE, engine.nondeterminism
        elif self.violation is not None:
            self.verdict = Verdict.FAIL
        elif why is not None:
            self.verdict = Verdict.BOUNDED
        else:
            self.verdict = Verdict.PASS

    @property
    def passed(self) -> bool:
        """Whether everything was looked at and nothing is wrong."""
        return self.verdict is Verdict.PASS


def explore(
    setup: Callable[[], Any],
    *threads: Callable[[Any], Any],
    final: Callable[[Any], Any] | None = None,
    outcome: Callable[[Any], Any] | None = None,
    memory: str = "lkmm",
    strategy: str = "dpor",
    preemptions: int | None = None,
    max_executions: int | None = None,
    max_seconds: float | None = None,
    races: bool = True,
    progress: Callable[[Progress], bool] | None = None,
) -> Result:
    """Explore. `progress` is called now and then, by the calling thread; False asks the search to stop."""
    engine = ENGINES[memory](setup, threads, final, outcome, races=races)
    search = Search(reduce=strategy != "brute", preemptions=preemptions)
    search.attach(engine)
    why: list[str] = []
    began = time.monotonic()
    asked: list[str] = []
    deadline = None if max_seconds is None else time.monotonic() + max_seconds

    def stop() -> bool:
        if max_executions is not None and engine.executions >= max_executions:
            why.append(f"max_executions={max_executions}")
        elif deadline is not None and time.monotonic() >= deadline:
            why.append(f"max_seconds={max_seconds}")
        elif asked:
            why.append(asked[0])
        return bool(why)

    engine.stop = stop

    def watch(running: ExploreEngine) -> bool:
        if progress is not None and not progress(progress_of(running, time.monotonic() - began)):
            asked.append("stopped")
        return True

    engine.run(watch)
    return Result(engine, search, why[0] if why else None)
