"""The engine of the explorer: tasks, and the fields they touch.

Models:      a machine with as many CPUs as the scenario has threads
Guards:      the baton
Invariants:  T1 tasks and locations have the same names in every execution
Leaves out:  what an access does, which is the memory model's business
Read next:   explore/scheduler.py, explore/execution.py below this; explore/memory_sc.py above
"""

from collections.abc import Callable, Sequence
from typing import Any

from kmodel.core.engine import engine
from kmodel.core.struct import raw_get
from kmodel.core.task import TASK_RUNNING, TaskStruct
from kmodel.explore.events import (
    JOIN,
    RELAX,
    SLEEP,
    Aborted,
    Loc,
    Runner,
)
from kmodel.explore.execution import Execution


class ExploreEngine(Execution):
    """What all memory models share."""

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

    def first_word_of(self, obj: Any) -> Loc | None:
        """The first watched word of a struct, its own or of a struct in it; None: it has none."""
        while not type(obj).__k_slots__:
            if not type(obj).__k_embedded__:
                return None
            obj = getattr(obj, type(obj).__k_embedded__[0])
        return self.loc_of(obj, next(iter(type(obj).__k_slots__)))

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


def exploring() -> ExploreEngine | None:
    """The exploration that runs now, if one does."""
    now = engine()
    return now if isinstance(now, ExploreEngine) else None
