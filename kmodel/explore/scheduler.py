"""Whose turn it is: the choice before every access, the baton, and waiting.

Models:      a machine whose scheduler may preempt before every access of shared memory
Guards:      the baton: exactly one OS thread of an exploration is not parked
Invariants:  E1 the same schedule gives the same execution; a step that differs is noticed
Leaves out:  time (a timer may fire at any moment after it was armed), migration between CPUs
Read next:   explore/execution.py for the life of an execution, explore/search.py for who runs next

The scheduler has no thread of its own: whoever is about to make an access asks the search, and hands the
baton over only if somebody else is to run.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from kmodel.core import baton
from kmodel.core.baton import Baton, borrow
from kmodel.core.engine import Tracer
from kmodel.core.struct import raw_get
from kmodel.explore.events import (
    KIND_NAMES,
    START,
    Aborted,
    Loc,
    Runner,
    Violation,
)
from kmodel.explore.names import Names
from kmodel.explore.oracles import Oracles
from kmodel.explore.rcu_spec import RcuSpecification


class Scheduler(Tracer):
    """The state of an exploration and of its present execution, and the choice of who goes on."""

    name = "explore"
    memory = "?"
    labelled = False  # whether an access may have several results in one state

    def __init__(
        self,
        setup: Callable[[], Any],
        threads: Sequence[Callable[[Any], Any]],
        final: Callable[[Any], Any] | None,
        outcome: Callable[[Any], Any] | None,
        *,
        max_steps: int = 10_000,
        races: bool = True,
        warnings: bool = True,
        leaks: bool = False,
        rcu: str = "specification",
    ) -> None:
        self.setup, self.threads, self.final, self.outcome = setup, threads, final, outcome
        self.max_steps = max_steps
        self.check_races = races
        self.check_warnings = warnings
        self.nr_cpu_ids = max(2, len(threads))
        self.rcu = RcuSpecification(self) if rcu == "specification" else None
        self.oracles = Oracles(self, leaks=leaks)
        self.names = Names(self)
        self.search: Any = None
        self.recorder: Any = None  # set for a run that is to be shown
        self.stop: Callable[[], bool] = lambda: False
        # results
        self.executions = self.blocked = self.cut = self.steps = 0
        self.outcomes: set[Any] = set()
        self.violation: Violation | None = None
        self.error: BaseException | None = None  # not the model's: raised by whoever explores
        self.nondeterminism: str | None = None
        self.hang: str | None = None
        self.working: Baton | None = None  # the thread that runs setup() or final()
        # the schedule: nodes of the search, how many of them are replayed
        self.stack: list[Any] = []
        self.plen = 0
        # the threads
        self.idle: list[Baton] = []
        self.done = baton.gate()
        self.ender: Any = None  # the thread that waits for the others to unwind
        self.closed = False
        self.abandoned = False
        self.first: tuple[str | None, int, Any] | None = None
        self.checking = False
        self.externals: dict[int, tuple[Any, int, dict[str, Any]]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the last execution."""
        self.cur: Runner | None = None
        self.depth = 0
        self.clk: list[int] = []
        self.evt: list[int] = []
        self.runners: list[Runner] = []
        self.by_task: dict[Any, Runner] = {}
        self.live = 0
        self.waiting: list[Runner] = []
        self.locs: dict[tuple[int, str], Loc] = {}
        self.of_object: dict[int, list[Loc]] = {}
        self.freed_objects: dict[int, int] = {}
        self.built: dict[int, Any] = {}
        self.inside: dict[
            int, tuple[Any, str]
        ] = {}  # id() of an embedded struct -> the one it is part of, its name
        self.roots: dict[int, int] = {}  # name of an embedded struct -> name of the outermost one
        self.domains: dict[Any, Any] = {}
        self.allocated_now: dict[int, Any] = {}
        self.judging = False  # a task's condition is being evaluated
        self.over: str | None = None  # why the execution ended
        self.boot_children = self.boot_created = 0
        self.last_runner = -1
        self.ev_loc: Loc | None = None
        self.ev_w = 0
        self.ev_kind = START
        self.state: Any = None
        self.broken: Violation | None = None
        self.collected: Any = None

    def fail(self, violation: Violation) -> None:
        """The execution broke something: it ends here."""
        if self.broken is None:
            self.broken = violation
        self.over = "violation"

    def broke(self, violation: Violation) -> NoReturn:
        """As fail(), seen by an oracle in the middle of a task."""
        self.fail(violation)
        self.cur = None
        raise Aborted

    # -- choosing, and handing the baton over

    def _decide(self, me: Runner | None) -> Runner | None:
        d = self.depth
        if d < self.plen:
            node = self.stack[d]
            if node.task >= len(self.runners):
                self.diverge(f"step {d + 1}: the schedule names a task that was not started this time")
            chosen: Runner = self.runners[node.task]
            if chosen.ready is not None and not chosen.ready(chosen):
                self.diverge(f"step {d + 1}: {chosen.task!r} {chosen.doing}, but it could go on before")
            if node.label is None and self.labelled and not self.search.arrive(node, chosen):
                self.over = "blocked"
                return None
            chosen.label = node.label
            return chosen
        if d >= self.max_steps:
            self.over = "steps"
            return None
        return self.search.extend(me)  # type: ignore[no-any-return]

    def point(self, me: Runner) -> int:
        """The task is about to make the access it has noted in itself: return when it is to, with the
        event's number.
        """
        while True:
            chosen = self._decide(me)
            if chosen is me:
                return self.depth
            if chosen is None:
                self.cur = None
                raise Aborted
            if chosen.owner is not None:
                self.flush(chosen)
                continue
            self._switch(chosen)
            mine = me.baton
            mine.wait()
            if me.unwinding:
                raise Aborted
            return self.depth

    def _switch(self, chosen: Runner) -> None:
        if chosen.started:
            self.cur = chosen
            chosen.baton.wake()
            return
        self._start(chosen)
        other = self.idle.pop() if self.idle else borrow(self.loop)
        other.runner = chosen
        chosen.baton = other
        other.wake()

    def _start(self, chosen: Runner) -> None:
        chosen.started = True
        d = self.depth
        self.commit(chosen, d, chosen.clock | 1 << d, START, None, False)
        self.cur = chosen

    def commit(self, me: Runner, d: int, clock: int, kind: int, loc: Loc | None, isw: int) -> None:
        """Event `d` has happened; check that it is the one that happened here before."""
        me.clock = clock
        self.clk.append(clock)
        self.evt.append(me.idx)
        self.depth = d + 1
        self.ev_loc = loc
        self.ev_w = isw
        self.ev_kind = kind
        if me.owner is None:
            self.last_runner = me.idx
        node = self.stack[d]
        key = None if loc is None else loc.key
        if node.kind is None:
            node.kind = kind
            node.key = key
        elif node.kind != kind or node.key != key:
            self.diverge(
                f"step {d + 1}, {me.task!r}: {self.describe(node.kind, node.key)} before, now "
                f"{self.describe(kind, key)}"
            )
        node.isw = isw

    def diverge(self, how: str) -> NoReturn:
        """The execution is not the one that the same schedule gave before."""
        self.nondeterminism = (
            f"{how}; the model depends on something that no schedule determines "
            "(time, random numbers, addresses, the order of a set, state kept from an earlier execution)"
        )
        self.over = "nondeterminism"
        self.cur = None
        raise Aborted

    @staticmethod
    def describe(kind: int, key: tuple[int, str] | None) -> str:
        """An event in words."""
        return KIND_NAMES[kind] if key is None else f"{KIND_NAMES[kind]} of object #{key[0]:x} .{key[1]}"

    def race(self, earlier: int, old: int, me: Runner) -> None:
        """The event that `me` makes, `old` before it, could have come before event `earlier`."""
        self.search.race(earlier, old, me)

    def blocked_races(self, me: Runner) -> None:
        """An execution ends with `me` still waiting: which events it could have come before."""

    # -- waiting

    def wait_until(self, me: Runner, ready: Callable[[Runner], bool], doing: str) -> int:
        """point() for an access that is possible only while `ready` holds."""
        me.ready = ready
        me.doing = doing
        self.live &= ~me.bit
        self.waiting.append(me)
        try:
            return self.point(me)
        finally:
            self.live |= me.bit
            self.waiting.remove(me)
            me.ready = None

    def enabled(self) -> int:
        """The set of tasks that can go on."""
        mask = self.live
        before, self.cur, self.judging = self.cur, None, True
        for runner in self.waiting:
            if runner.ready(runner):  # type: ignore[misc]
                mask |= runner.bit
        self.cur, self.judging = before, False
        return mask

    def unseen_load(self, obj: Any, field: str) -> Any:
        """A load outside the run: setup(), final(), outcome()."""
        if self.judging:
            raise TypeError(
                f"a wait's condition reads {type(obj).__name__}.{field}: it must be a function of the value "
                "it is given, or nobody knows what it waits for"
            )
        return raw_get(obj, field)

    # -- what the rest of the engine brings

    def loop(self, mine: Baton) -> None:
        """What a thread of this exploration does."""
        raise NotImplementedError

    def add(self, func: Callable[..., Any], args: tuple[Any, ...], comm: str, daemon: bool) -> Runner:
        """A new task, of the one that runs now."""
        raise NotImplementedError

    def flush(self, runner: Runner) -> None:
        """tso: drain one entry of a store buffer."""
        raise NotImplementedError
