"""explore(): run a scenario in every way it can happen. replay(): run one of them again.

Models:      nothing in Linux
Guards:      one exploration at a time per process
Invariants:  R1 a search that a bound stopped never says PASS, R2 a violation that is reported was seen
             twice: by the search and by the run that is shown
Read next:   explore/search.py, explore/scheduler.py
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from kmodel.explore.engine import ExploreEngine
from kmodel.explore.memory_lkmm import LkmmEngine
from kmodel.explore.memory_sc import ScEngine
from kmodel.explore.memory_tso import TsoEngine
from kmodel.explore.progress import Progress, progress_of
from kmodel.explore.result import Program, Result
from kmodel.explore.search import Search
from kmodel.explore.show import record, simplest
from kmodel.explore.split import Share
from kmodel.explore.strategies import Fixed, Pct, UniformWalk, Walk, preemptions_of
from kmodel.explore.tracefile import Trace, read_trace
from kmodel.explore.watchdog import Watchdog

ENGINES: dict[str, type[ExploreEngine]] = {"sc": ScEngine, "tso": TsoEngine, "lkmm": LkmmEngine}
STRATEGIES = ("dpor", "iterative", "brute", "pct", "random", "uniform")
_WALK_EXECUTIONS = 1000

replaying: Trace | None = None
"""A trace that the next explore() is to run instead of searching (the pytest plugin's --explore-replay)."""

defaults: dict[str, Any] = {}
"""What explore() takes where its caller says nothing (the pytest plugin's options)."""

recent: list[Result] | None = None
"""Results since the plugin put a list here."""


def explore(
    setup: Callable[[], Any],
    *threads: Callable[[Any], Any],
    final: Callable[[Any], Any] | None = None,
    outcome: Callable[[Any], Any] | None = None,
    memory: str | None = None,
    strategy: str | None = None,
    preemptions: int | None = None,
    max_executions: int | None = None,
    max_seconds: float | None = None,
    seed: int | None = None,
    part: tuple[int, int] | None = None,
    max_steps: int = 10_000,
    races: bool = True,
    warnings: bool = True,
    leaks: bool = False,
    rcu: str = "specification",
    hang_seconds: float = 10.0,
    progress: Callable[[Progress], bool] | None = None,
) -> Result:
    """Run state = setup(), every thread(state) interleaved, final(state), in every way that can make a
    difference.

    memory: "lkmm" (the kernel's model), "tso" (x86) or "sc". strategy: "dpor" exhausts; "iterative" too,
    fewest preemptions
    first; "pct", "random" and "uniform" are seeded walks; "brute" is dpor without reduction. `outcome(state)`
    is collected for
    each execution. Bounds (preemptions, max_executions, max_seconds, max_steps per execution) give BOUNDED at
    best.
    `races`: report plain-access data races; `warnings`: WARN is a violation; `leaks`: so is what is still
    allocated at the end.
    part=(k, n): only the k-th of n parts of the search; explore.split.merge() puts their results together.
    `rcu`: grace periods as their "specification", or explore the model's own "implementation" of them.
    `progress` is called now and then; if it returns False, the search ends early.
    """
    given: dict[str, Any] = {"memory": memory, "strategy": strategy, "preemptions": preemptions, "seed": seed}
    given |= {"max_executions": max_executions, "max_seconds": max_seconds, "part": part}
    chosen = {**_DEFAULTS, **defaults, **{name: value for name, value in given.items() if value is not None}}
    unknown = set(chosen) - set(_DEFAULTS)
    if unknown:
        raise ValueError(f"explore() has no option {', '.join(sorted(unknown))}")
    memory, strategy, preemptions = chosen["memory"], chosen["strategy"], chosen["preemptions"]
    if memory not in ENGINES:
        raise ValueError(f"memory={memory!r}: must be one of {', '.join(sorted(ENGINES))}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: must be one of {', '.join(STRATEGIES)}")
    if preemptions is not None and strategy not in ("dpor", "brute"):
        raise ValueError(f"preemptions={preemptions}: only strategy='dpor' takes that bound")
    if rcu not in ("specification", "implementation"):
        raise ValueError(f"rcu={rcu!r}: must be one of specification, implementation")
    options = {"rcu": rcu, "races": races, "warnings": warnings, "leaks": leaks, "max_steps": max_steps}
    program = Program(setup, threads, final, outcome, str(memory), options)
    if replaying is not None and replaying.get("program") == program.references():
        result = run_again(program, replaying)
    else:
        result = _search(program, chosen, hang_seconds, progress)
    if recent is not None:
        recent.append(result)
    return result


_DEFAULTS: dict[str, Any] = {
    "memory": "lkmm",
    "strategy": "dpor",
    "preemptions": None,
    "seed": 0,
    "max_executions": None,
    "max_seconds": None,
    "part": None,
}


def _search(
    program: Program,
    chosen: dict[str, Any],
    hang_seconds: float,
    progress: Callable[[Progress], bool] | None,
) -> Result:
    strategy, seed, max_executions = chosen["strategy"], chosen["seed"], chosen["max_executions"]
    walk = {"pct": Pct, "random": Walk, "uniform": UniformWalk}.get(strategy)
    if walk is not None and max_executions is None and chosen["max_seconds"] is None:
        max_executions = _WALK_EXECUTIONS
    if chosen["part"] is not None and (
        strategy not in ("dpor", "brute") or chosen["preemptions"] is not None
    ):
        raise ValueError(
            f"part={chosen['part']}: only strategy='dpor' without a bound of preemptions can be split"
        )
    run = _Run(program, max_executions, chosen["max_seconds"], hang_seconds, progress)
    if strategy == "iterative":
        return run.iterative()
    if walk is not None:
        return run.search(walk(seed))
    if chosen["part"] is not None:
        return run.search(Share(*chosen["part"], reduce=strategy == "dpor"))
    return run.search(Search(reduce=strategy == "dpor", preemptions=chosen["preemptions"]))


class _Run:
    """One explore() call: its bounds, over one or several searches."""

    def __init__(
        self,
        program: Program,
        max_executions: int | None,
        max_seconds: float | None,
        hang_seconds: float,
        progress: Callable[[Progress], bool] | None,
    ) -> None:
        self.program = program
        self.max_executions = max_executions
        self.max_seconds = max_seconds
        self.began = time.monotonic()
        self.deadline = None if max_seconds is None else self.began + max_seconds
        self.hang_seconds = hang_seconds
        self.progress = progress
        self.why: str | None = None
        self.asked = False

    def search(self, search: Search, before: Result | None = None) -> Result:
        """Run one search to its end or a bound."""
        program = self.program
        engine = new_engine(program)
        search.attach(engine)
        if before is not None:
            engine.executions, engine.blocked, engine.steps = before.executions, before.blocked, before.steps
            engine.outcomes = before.outcomes
        dog = Watchdog(engine, self.hang_seconds)
        self.why = None

        def stop() -> bool:
            if self.max_executions is not None and engine.executions >= self.max_executions:
                self.why = f"max_executions={self.max_executions}"
            elif self.deadline is not None and time.monotonic() >= self.deadline:
                self.why = f"max_seconds={self.max_seconds}"
            elif self.asked:
                self.why = "stopped"
            return self.why is not None

        def watch(running: ExploreEngine) -> bool:
            if self.progress is not None and not self.asked:
                self.asked = not self.progress(progress_of(running, time.monotonic() - self.began))
            return dog.look()

        engine.stop = stop
        engine.run(watch)
        why: str | None = self.why
        if why is None and engine.cut:
            why = f"{engine.cut} executions were cut off after max_steps={program.options['max_steps']} steps"
        if why is None and search.cut:
            why = f"preemptions={search.bound}: {search.cut} switches were not tried"
        if not search.exhausts:
            why = f"strategy={search.name!r} does not exhaust ({why or 'it ended by itself'})"
        result = Result(program, engine, search, why)
        if result.violation is not None:
            stack = engine.stack
            schedule = [(node.task, node.label) for node in stack]
            found = simplest(program, new_engine, engine, schedule, result.violation)
            result.shown(
                found if found is not None else record(new_engine(program), Fixed(schedule)),
                preemptions_of(stack),
            )
        return result

    def iterative(self) -> Result:
        """Searches with 0, 1, 2, ... preemptions, until one finds something or none was left out."""
        result: Result | None = None
        bound = 0
        while True:
            result = self.search(Search(preemptions=bound), result)
            if result.search_cut == 0 or result.violation is not None or self.why is not None:
                result.strategy = "iterative"
                return result
            if result.nondeterminism or result.hang:
                return result
            bound += 1


def new_engine(program: Program) -> ExploreEngine:
    """An engine for the program."""
    return ENGINES[program.memory](
        program.setup, program.threads, program.final, program.outcome, **program.options
    )


def run_again(program: Program, trace: Mapping[str, Any]) -> Result:
    """Run the schedule of a trace, recorded."""
    schedule = [(int(task), label) for task, label in trace["schedule"]]
    engine = new_engine(program)
    search = Fixed(schedule)
    shown = record(engine, search)
    result = Result(program, engine, search, "one execution was run again")
    result.shown(shown, preemptions_of(engine.stack))
    return result


def replay(
    trace: str | os.PathLike[str] | Mapping[str, Any],
    setup: Callable[[], Any] | None = None,
    *threads: Callable[[Any], Any],
    final: Callable[[Any], Any] | None = None,
    outcome: Callable[[Any], Any] | None = None,
) -> Result:
    """Run a saved execution again, step by step.

    The scenario is what the file names, or what is given (as for explore(): needed for functions inside
    functions).
    INCONCLUSIVE if the model no longer does what the schedule says.
    """
    document: Mapping[str, Any] = trace if isinstance(trace, Mapping) else read_trace(trace)
    options = dict(document.get("options", {}))
    memory = document["memory"]
    if setup is None:
        program = Program.load(document.get("program"), memory, options)
    else:
        program = Program(setup, threads, final, outcome, memory, options)
    return run_again(program, document)
