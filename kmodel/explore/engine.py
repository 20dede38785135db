"""The engine of the explorer: one task runs at a time, and before every access the search says which.

Models:      a machine whose scheduler may preempt before every access of shared memory
Guards:      the baton: exactly one OS thread of an exploration is not parked
Invariants:  E1 the same schedule gives the same execution, E2 an execution ends: done, blocked, broken or
             cut, E3 tasks of a finished execution have unwound before the next begins
Leaves out:  time (a timer may fire at any moment after it was armed), migration between CPUs
Read next:   explore/search.py for who runs next, explore/memory_sc.py for what an access does

The scheduler has no thread of its own: whoever is about to make an access asks the search, and hands the
baton over only if somebody else is to run. A thread whose task has ended starts the next task, or the next
execution, itself; so a hand-over is paid for a preemption only.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

from kmodel.core import access, baton
from kmodel.core.baton import Baton, borrow
from kmodel.core.engine import Tracer, engine, installed, tracing
from kmodel.core.report import clear_warnings, kernel_warnings, log
from kmodel.core.struct import KernelObject, raw_get
from kmodel.core.task import TASK_RUNNING, TaskStruct, bind_thread, unbind_thread
from kmodel.explore.events import (
    COND,
    JOIN,
    KIND_NAMES,
    RELAX,
    SLEEP,
    START,
    Aborted,
    Loc,
    Runner,
    Violation,
)
from kmodel.explore.names import Names
from kmodel.explore.oracles import Oracles, classify
from kmodel.explore.rcu_spec import RcuSpecification

PARK = cast("Runner", object())
"""What a thread does when the baton is elsewhere."""


class ExploreEngine(Tracer):
    """What all memory models share: tasks, the baton, the life of an execution."""

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
        self.await_unwound, self.say_unwound = baton.parking()
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

    # -- the whole exploration, seen from its caller

    def run(self, watch: Callable[["ExploreEngine"], bool] | None = None) -> None:
        """Run executions until the search has no more; `watch` is called now and then, False gives up."""
        if isinstance(engine(), Tracer):
            raise RuntimeError("a traced engine is already installed: explorations do not nest")
        with tracing(), installed(self):
            access._tracer = self
            try:
                first = borrow(self._loop)
                if self.recorder is None:
                    log.addFilter(_silently)
                first.wake()
                while not self.done.acquire(timeout=0.25):
                    if watch is not None and not watch(self):
                        return
            except BaseException:
                # Ctrl-C, most likely: let the execution end before memory is handed back.
                self.stop = lambda: True
                self.max_steps = 0
                self.done.acquire(timeout=5)
                raise
            finally:
                access._tracer = None
                log.removeFilter(_silently)
                self.close()
        if self.error is not None:
            raise self.error

    def _restore(self) -> None:
        for obj, _kid, values in self.externals.values():
            for field, value in values.items():
                type(obj).__k_slots__[field].__set__(obj, value)

    def close(self) -> None:
        """Give the threads back to the pool, and what was built before the exploration its values."""
        self.closed = True
        self._restore()
        while self.idle:
            self.idle.pop().wake()

    # -- the life of an execution, in whichever thread is at hand

    def _loop(self, mine: Baton) -> None:
        while True:
            runner, mine.runner = mine.runner, None
            try:
                if runner is None:
                    chosen = self._begin(mine)
                else:
                    self._execute(runner)
                    if runner.unwinding:
                        self.idle.append(mine)
                        self.say_unwound()
                        mine.wait()
                        if self.closed:
                            return
                        continue
                    chosen = self._go_on(mine)
            except Aborted:  # while no task ran: the model diverged
                self._end()
                chosen = None
            except BaseException as error:  # noqa: BLE001  # not the model's fault: to the caller
                self.error = error
                chosen = None
            if chosen is None:
                self.done.release()
                return
            if chosen is not PARK:
                mine.runner = chosen
                continue
            mine.wait()
            if self.closed:
                return

    def _execute(self, runner: Runner) -> None:
        bind_thread(runner.task)
        try:
            assert runner.func is not None
            runner.func(*runner.args)
        except (Aborted, SystemExit):
            pass
        except BaseException as error:  # noqa: BLE001  # the violation that was looked for
            if self.over is None and not runner.unwinding:
                self.fail(classify(error, runner, self.depth - 1))
        finally:
            runner.finished = True
            self.live &= ~runner.bit
            self.cur = None
            unbind_thread()

    def _begin(self, mine: Baton) -> Runner | None:
        """Set the next execution up; what this thread does then, as _go_on()."""
        self.reset()
        self.search.begin()
        clear_warnings()
        self._restore()
        self.working = mine
        boot = TaskStruct(pid=0, comm="setup")
        self.boot_task = boot
        bind_thread(boot)
        try:
            self.state = self.setup()
            for n, func in enumerate(self.threads):
                self.add(func, (self.state,), getattr(func, "__name__", f"thread-{n}"), daemon=False)
        finally:
            unbind_thread()
        if self.recorder is not None:
            self.recorder.begin(self)
        return self._go_on(mine)

    def _go_on(self, mine: Baton) -> Runner | None:
        """After a task or an execution has ended: what this thread does next, PARK, or None when all is
        done.
        """
        while True:
            if self.over is None:
                chosen = self._decide(None)
            else:
                chosen = None
            if chosen is None:
                if not self._end():
                    return None
                return self._begin(mine)
            if not chosen.started:
                self._start(chosen)
                chosen.baton = mine
                return chosen
            if chosen.owner is not None:
                self.flush(chosen)
                continue
            self.cur = chosen
            self.idle.append(mine)
            chosen.baton.wake()
            return PARK

    def _end(self) -> bool:
        """Unwind what is left, judge the execution, go to the next: whether there is one."""
        self.cur = None
        reason = self.over
        for runner in self.runners:
            if runner.started and not runner.finished and runner.owner is None:
                runner.unwinding = True
                runner.baton.wake()
                self.await_unwound()
        if self.nondeterminism is not None or self.hang is not None:
            return False
        partial = reason in ("blocked", "skipped")
        if not partial and reason != "steps" and self.broken is None and not self._judge():
            return False
        if self.checking:
            if not self._as_before(reason):
                return False
        elif partial:
            self.blocked += reason == "blocked"
        else:
            self.executions += 1
            if reason == "steps":
                self.cut += 1
            if self.broken is not None:
                self.violation = self.broken
        self.steps += self.depth
        if self.recorder is not None:
            self.recorder.end(self)
        if self.first is None and not partial and self.violation is None and self.search.exhausts:
            # Run the first execution twice: a model that is not deterministic shows at once,
            # and not as a strange result.
            self.first = (reason, self.depth, self.collected)
            self.checking = True
            self.plen = len(self.stack)
            return True
        self.checking = False
        return bool(self.search.advance(reason)) and not self.stop()

    def _as_before(self, reason: str | None) -> bool:
        if self.first == (reason, self.depth, self.collected) and self.broken is None:
            return True
        before, now = self.first, (reason, self.depth, self.collected)
        assert before is not None
        self.nondeterminism = (
            f"the first execution was run twice and ended differently: {before[0]} after {before[1]} steps "
            f"with outcome {before[2]!r}, then {now[0]} after {now[1]} steps with outcome {now[2]!r}"
            + (f" and {self.broken}" if self.broken is not None else "")
        )
        return False

    def _judge(self) -> bool:
        """The execution went to its end: final(), outcome() and the oracles of the end. False: stuck."""
        bind_thread(self.boot_task)
        try:
            if self.final is not None:
                self.final(self.state)
            if self.outcome is not None:
                self.collected = self.outcome(self.state)
                self.outcomes.add(self.collected)
        except BaseException as error:  # noqa: BLE001  # an assertion of final() is what was looked for
            self.broken = classify(error, None, None)
        finally:
            unbind_thread()
        if self.broken is None and self.check_warnings:
            for warning in kernel_warnings():
                self.broken = Violation("warning", f"{warning.message} ({warning.where})")
                break
        if self.broken is None:
            self.broken = self.oracles.at_end()
        return self.hang is None

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
        other = self.idle.pop() if self.idle else borrow(self._loop)
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

    # -- tasks

    def add(self, func: Callable[..., Any], args: tuple[Any, ...], comm: str, daemon: bool) -> Runner:
        """A new task, of the one that runs now."""
        parent = self.cur
        if parent is None:
            self.boot_children += 1
            pid = self.boot_children
        else:
            parent.children += 1
            pid = parent.pid * 100 + parent.children
        task = TaskStruct(pid=pid, comm=comm, cpu=(pid - 1) % self.nr_cpu_ids, is_kthread=daemon)
        runner = Runner(len(self.runners), pid, task, func, args)
        runner.daemon = daemon
        self.runners.append(runner)
        self.by_task[task] = runner
        self.live |= runner.bit
        if parent is not None:
            runner.clock = parent.clock
        self.born(runner, parent)
        if self.recorder is not None and parent is not None:
            self.recorder.note(parent, "spawn", f"starts {comm}")
        return runner

    def born(self, child: Runner, parent: Runner | None) -> None:
        """What a new task sees."""

    def joined(self, me: Runner, other: Runner) -> None:
        """What a task that has waited for another sees."""

    def gone(self, other: Runner) -> bool:
        """Whether a task has ended and all it stored is in memory."""
        return other.finished

    def spawn(self, func: Callable[..., Any], args: tuple[Any, ...], comm: str, daemon: bool) -> TaskStruct:
        return self.add(func, args, comm, daemon).task  # type: ignore[no-any-return]

    def wait_for(self, me: Runner, others: Sequence[Runner], doing: str) -> None:
        """Until these tasks have ended."""
        me.kind, me.loc, me.what = JOIN, None, others
        d = self.wait_until(me, lambda _me: all(self.gone(o) for o in others), doing)
        for other in others:
            me.clock |= other.clock
            self.joined(me, other)
        self.commit(me, d, me.clock | 1 << d, JOIN, None, False)
        if self.recorder is not None:
            self.recorder.waits(me, "join", doing[0].upper() + doing[1:] + ".")

    def join(self, task: TaskStruct, timeout: float | None = None) -> bool:
        me, other = self.cur, self.by_task[task]
        if me is None:
            return other.finished
        self.wait_for(me, [other], f"waits for {task!r} to end")
        return True

    def tasks(self) -> list[TaskStruct]:
        return [self.boot_task, *(r.task for r in self.runners if not r.finished)]

    def schedule(self, timeout: float | None = None) -> None:
        me = self.cur
        if me is None:
            return
        if timeout is None:
            self._cond(me.task, "state", lambda state: state == TASK_RUNNING, "acquire", "sleeps")
            return
        me.kind, me.loc = SLEEP, None
        # A timer may fire at any moment; but nobody waits for a daemon that does nothing but sleep.
        d = self.wait_until(me, self._somebody_works, "sleeps with a timeout")
        self.commit(me, d, me.clock | 1 << d, SLEEP, None, False)
        if self.recorder is not None:
            self.recorder.waits(me, "sleep", "The timer fires, or somebody wakes it.")

    def _somebody_works(self, me: Runner) -> bool:
        if not me.daemon:
            return True
        return not all(r.finished or r.daemon for r in self.runners)

    def kick(self, task: TaskStruct) -> None:
        pass

    def run_later(self, func: Callable[[], None], delay: float, comm: str) -> None:
        self.add(func, (), comm, True)

    def now(self) -> float:
        return float(self.depth)

    # -- locations

    def constructed(self, obj: Any) -> None:
        me = self.cur
        if me is None:
            self.boot_created += 1
            kid = 1 << 20 | self.boot_created << 4
        else:
            me.created += 1
            kid = (me.pid + 1) << 20 | me.created << 4
        obj._k_id = kid
        self.built[kid] = obj
        if id(obj) in self.inside:
            outer = self.inside[id(obj)][0]._k_id
            self.roots[kid] = self.roots[outer] if outer in self.roots else outer
        for name in obj.__k_embedded__:
            self.inside[id(getattr(obj, name))] = (obj, name)

    def loc_of(self, obj: Any, field: str) -> Loc:
        """The location record of a field, made at its first access of an execution."""
        kid = obj._k_id
        if id(obj) in self.externals:
            kid = self.externals[id(obj)][1]
        elif kid not in self.built or self.built[kid] is not obj:
            # Built before the exploration, so it outlives executions: give it a name and its
            # values back each time.
            kid = -(len(self.externals) + 1) << 4
            self.externals[id(obj)] = (obj, kid, {})
        if kid < 0:
            obj._k_id = kid
            self.externals[id(obj)][2].setdefault(field, raw_get(obj, field))
        key = (kid, field)
        loc = self.locs[key] if key in self.locs else None
        if loc is None:
            slot = type(obj).__k_slots__[field]
            loc = self.locs[key] = Loc(obj, field, key, slot)
            loc.kid = root = self.roots[kid] if kid in self.roots else kid
            if root not in self.of_object:
                self.of_object[root] = []
            self.of_object[root].append(loc)
            self.new_loc(loc)
            if root in self.freed_objects:
                loc.freed = self.freed_objects[root]
        return loc

    def root_of(self, obj: Any) -> int:
        """The name of the outermost struct that `obj` is part of."""
        kid = obj._k_id
        return self.roots[kid] if kid in self.roots else kid

    def new_loc(self, loc: Loc) -> None:
        """Hook of the memory models."""

    def initial_value(self, loc: Loc) -> Any:
        """What a location held when the tasks began (for the record)."""
        return loc.writes[0][1] if loc.writes else raw_get(loc.obj, loc.field)

    def visible(self, loc: Loc) -> dict[str, list[int]] | None:
        """Which entries of a location's history each task may still read; None: the last (for the record)."""
        return None

    # -- waits that every model has

    def _cond(self, obj: Any, field: str, cond: Callable[[Any], bool], order: str, doing: str) -> Any:
        raise NotImplementedError

    def cond_load(self, obj: Any, field: str, cond: Callable[[Any], bool], order: str) -> Any:
        return self._cond(obj, field, cond, order, "waits")

    def relax(self) -> None:
        me = self.cur
        if me is None:
            if self.over is not None:
                raise Aborted
            return
        me.kind, me.loc = RELAX, None
        if me.dirty or not me.turn:
            # The turn had effects, so another may differ: let somebody else go first if there is anybody.
            seen = self.depth
            d = self.wait_until(me, lambda _me: self.depth > seen or not self._others(me), "spins")
            self.commit(me, d, me.clock | 1 << d, RELAX, None, False)
        else:
            self.relaxed(me)
        if self.recorder is not None:
            self.recorder.waits(me, "relax", "")
        me.turn.clear()
        me.dirty = False

    def _others(self, me: Runner) -> bool:
        mask = self.live
        for runner in self.waiting:
            if runner is not me and runner.kind != RELAX and runner.ready(runner):  # type: ignore[misc]
                mask |= runner.bit
        return bool(mask & ~me.bit)

    def relaxed(self, me: Runner) -> None:
        """The turn only read: go on once something it read may read differently."""
        raise NotImplementedError

    def flush(self, runner: Runner) -> None:
        """tso: drain one entry of a store buffer."""
        raise NotImplementedError

    def data_race[T](self, expression: Callable[[], T]) -> T:
        me = self.cur
        if me is None or me.nocheck:
            return expression()
        me.nocheck = True
        try:
            return expression()
        finally:
            me.nocheck = False

    def lock_acquired(self, task: TaskStruct, lock: Any, mode: str) -> None:
        self.oracles.acquired(self.cur, lock, mode)

    def lock_released(self, task: TaskStruct, lock: Any) -> None:
        pass


def _silently(_record: Any) -> bool:
    """A search logs nothing: only the execution that is shown does."""
    return False


def exploring() -> ExploreEngine | None:
    """The exploration that runs now, if one does."""
    now = engine()
    return now if isinstance(now, ExploreEngine) else None


def source_line(skip: tuple[str, ...] = ("/kmodel/core/", "/kmodel/explore/")) -> list[tuple[str, int, str]]:
    """The model's or scenario's frames that make the access, nearest first."""
    frame: Any = sys._getframe(1)
    found = []
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_execute" and code.co_filename == __file__:
            break
        if not any(part in code.co_filename for part in skip):
            found.append((code.co_filename, frame.f_lineno, code.co_qualname))
        frame = frame.f_back
    return found


__all__ = ["COND", "ExploreEngine", "KernelObject", "exploring", "source_line"]
