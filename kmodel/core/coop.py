"""A seeded cooperative engine: one task runs at a time, and at every access a seeded choice says which.

Models:      a machine with sequentially consistent memory and a scheduler that may preempt before every
             access
Guards:      the baton: exactly one OS thread of a run is not parked
Invariants:  O1 equal seed and equal program give an equal trace, O2 a run ends: done, deadlock, error or too
             many steps
Leaves out:  weak memory, time (a timer may fire at any step after it was armed)
Read next:   explore/, which chooses systematically instead of by seed

It proves the seam: the model's code runs here unchanged. It is also the quickest way to shake a scenario in a
test.
"""

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from kmodel.core import access
from kmodel.core.engine import Tracer, installed, tracing
from kmodel.core.report import KernelBug, LockingBug
from kmodel.core.struct import KernelObject, raw_get, raw_set
from kmodel.core.task import (
    TASK_RUNNING,
    TaskStruct,
    bind_thread,
    current,
    unbind_thread,
)


class Deadlock(KernelBug):
    """Every task that must still end is blocked."""


class TooManySteps(KernelBug):
    """The run did not end within its bound of steps."""


class _Aborted(BaseException):
    """Unwinds the tasks of a run that is over."""


@attrs.frozen
class Step:
    """One event of a trace: which task did what, where, and the value loaded or stored."""

    task: str
    kind: str
    where: str
    value: str


@attrs.define(eq=False)
class _Runner:
    task: TaskStruct
    daemon: bool
    go: Any
    thread: threading.Thread | None = None
    ready: Callable[[], bool] | None = None
    doing: str = "not started"
    finished: bool = False
    unwinding: bool = False


class CoopEngine(Tracer):
    """Run tasks one at a time, switching by `seed` before every access; see run()."""

    name = "coop"

    def __init__(self, seed: int, *, max_steps: int = 200_000, nr_cpu_ids: int = 4) -> None:
        self.nr_cpu_ids = nr_cpu_ids
        self.max_steps = max_steps
        self.trace: list[Step] = []
        self._random = random.Random(seed)
        self._runners: list[_Runner] = []
        self._by_task: dict[TaskStruct, _Runner] = {}
        self._created: dict[int, int] = {}
        self._running = False
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._boot_task: TaskStruct | None = None

    # -- running

    def run(
        self,
        setup: Callable[[], Any],
        threads: Sequence[Callable[[Any], Any]],
        final: Callable[[Any], Any] | None = None,
    ) -> Any:
        """state = setup(); run every thread(state) to its end, interleaved; final(state); return the state.

        Raises what a task or `final` raised, Deadlock with the list of who waits for what, or TooManySteps.
        """
        with tracing(), installed(self):
            self._boot_task = TaskStruct(pid=0, comm="setup")
            before = bind_thread(self._boot_task)
            access._tracer = self
            try:
                state = setup()
                for n, func in enumerate(threads):
                    self.spawn(
                        func,
                        (state,),
                        getattr(func, "__name__", f"thread-{n}"),
                        daemon=False,
                    )
                self._running = True
                self._hand_over(None)
                self._done.wait()
                self._running = False
                self._unwind()
                if self._error is not None:
                    raise self._error
                if final is not None:
                    final(state)
                return state
            finally:
                self._running = False
                access._tracer = None
                unbind_thread(before)

    def _unwind(self) -> None:
        for runner in self._runners:
            runner.unwinding = True
            runner.go.release()
            if runner.thread is not None:
                runner.thread.join()

    def _choose(self) -> _Runner | None:
        runnable = [r for r in self._runners if not r.finished and (r.ready is None or r.ready())]
        return self._random.choice(runnable) if runnable else None

    def _hand_over(self, me: _Runner | None) -> None:
        """Give the baton to the next task and, if `me` is still to run, wait to get it back."""
        if self._error is not None or all(r.finished or r.daemon for r in self._runners):
            chosen = None
        else:
            try:
                chosen = self._choose()
            except BaseException as error:  # noqa: BLE001  # a wait condition met poison: the run's error
                self._error, chosen = error, None
            if chosen is None and self._error is None:
                waits = "; ".join(f"{r.task!r} {r.doing}" for r in self._runners if not r.finished)
                self._error = Deadlock(f"no task can go on: {waits}")
        if chosen is me and me is not None:
            return
        if chosen is None:
            self._done.set()
        else:
            chosen.go.release()
        if me is not None and not me.finished:
            me.go.acquire()
            if me.unwinding:
                raise _Aborted

    def _step(self, what: str, ready: Callable[[], bool] | None = None) -> _Runner | None:
        if not self._running:
            return None
        me = self._by_task.get(current())
        if me is None or me.unwinding:
            return None
        me.ready, me.doing = ready, what
        if len(self.trace) >= self.max_steps and self._error is None:
            self._error = TooManySteps(f"{self.max_steps} steps; the last was {self.trace[-1]}")
        self._hand_over(me)
        me.ready = None
        return me

    def _log(self, me: _Runner | None, kind: str, where: str, value: Any) -> None:
        if me is not None:
            shown = (
                f"{type(value).__name__}#{value._k_id}" if isinstance(value, KernelObject) else _show(value)
            )
            self.trace.append(Step(me.task.comm, kind, where, shown))

    @staticmethod
    def _where(obj: Any, field: str) -> str:
        return f"{type(obj).__name__}#{obj._k_id}.{field}"

    # -- tasks

    def spawn(self, func: Callable[..., Any], args: tuple[Any, ...], comm: str, daemon: bool) -> TaskStruct:
        pid = len(self._runners) + 1
        task = TaskStruct(pid=pid, comm=comm, cpu=(pid - 1) % self.nr_cpu_ids, is_kthread=daemon)
        go = threading.Lock()
        go.acquire()
        runner = _Runner(task, daemon, go)

        def body() -> None:
            bind_thread(task)
            go.acquire()
            try:
                if not runner.unwinding:
                    func(*args)
            except _Aborted:
                pass
            except BaseException as error:  # noqa: BLE001  # raised again by run()
                if self._error is None and not runner.unwinding:
                    self._error = error
            finally:
                runner.finished = True
                unbind_thread()
                if not runner.unwinding:
                    self._hand_over(runner)

        runner.thread = threading.Thread(target=body, name=comm, daemon=True)
        self._runners.append(runner)
        self._by_task[task] = runner
        runner.thread.start()
        return task

    def join(self, task: TaskStruct, timeout: float | None = None) -> bool:
        runner = self._by_task[task]
        self._step(f"waits for {task!r} to end", lambda: runner.finished)
        return runner.finished

    def tasks(self) -> list[TaskStruct]:
        assert self._boot_task is not None
        return [self._boot_task, *(r.task for r in self._runners if not r.finished)]

    def schedule(self, timeout: float | None = None) -> None:
        task = current()
        if timeout is not None:
            self._step("sleeps with a timeout")
        else:
            self._step("sleeps", lambda: raw_get(task, "state") == TASK_RUNNING)

    def kick(self, task: TaskStruct) -> None:
        pass

    def run_later(self, func: Callable[[], None], delay: float, comm: str) -> None:
        self.spawn(func, (), comm, daemon=True)

    def now(self) -> float:
        return float(len(self.trace))

    # -- memory: sequentially consistent, in the objects' own slots

    def constructed(self, obj: Any) -> None:
        creator = current().pid
        n = self._created[creator] = self._created.get(creator, 0) + 1
        obj._k_id = (creator + 1) << 20 | n << 4

    def _load(self, kind: str, obj: Any, field: str) -> Any:
        where = self._where(obj, field)
        me = self._step(f"{kind} {where}")
        value = raw_get(obj, field)
        self._log(me, kind, where, value)
        return value

    def _store(self, kind: str, obj: Any, field: str, value: Any) -> None:
        where = self._where(obj, field)
        me = self._step(f"{kind} {where}")
        raw_set(obj, field, value)
        self._log(me, kind, where, value)

    def plain_load(self, obj: Any, field: str) -> Any:
        return self._load("load", obj, field)

    def plain_store(self, obj: Any, field: str, value: Any) -> None:
        self._store("store", obj, field, value)

    def load(self, obj: Any, field: str, order: str) -> Any:
        return self._load("READ_ONCE" if order == "once" else "load-acquire", obj, field)

    def store(self, obj: Any, field: str, value: Any, order: str) -> None:
        self._store("WRITE_ONCE" if order == "once" else "store-release", obj, field, value)

    def rmw(self, obj: Any, field: str, update: Callable[[Any], Any], order: str) -> Any:
        if field not in obj.__k_atomic__:
            raise TypeError(f"{type(obj).__name__}.{field} is not declared atomic()")
        where = self._where(obj, field)
        me = self._step(f"rmw {where}")
        old = raw_get(obj, field)
        new = update(old)
        if new is not access.NO_STORE:
            raw_set(obj, field, new)
        self._log(me, f"rmw-{order}", where, (old, new))
        return old

    def fence(self, kind: str) -> None:
        self._log(self._step(kind), kind, "", None)

    def cond_load(self, obj: Any, field: str, cond: Callable[[Any], bool], order: str) -> Any:
        where = self._where(obj, field)
        me = self._step(f"waits on {where}", lambda: cond(raw_get(obj, field)))
        value = raw_get(obj, field)
        if me is None and not cond(value):
            raise Deadlock(f"{where} is waited for outside the run, where nothing can change it")
        self._log(me, "cond_load", where, value)
        return value

    def relax(self) -> None:
        self._step("cpu_relax")

    def data_race[T](self, expression: Callable[[], T]) -> T:
        return expression()

    def spin_lock(self, obj: Any, field: str) -> None:
        where = self._where(obj, field)
        me = self._step(f"spins on {where}", lambda: raw_get(obj, field) == 0)
        if raw_get(obj, field):
            raise Deadlock(f"{where} is taken outside the run, where nothing can release it")
        raw_set(obj, field, 1)
        self._log(me, "lock", where, 1)

    def spin_trylock(self, obj: Any, field: str) -> bool:
        where = self._where(obj, field)
        me = self._step(f"trylock {where}")
        free = bool(raw_get(obj, field) == 0)
        if free:
            raw_set(obj, field, 1)
        self._log(me, "trylock", where, free)
        return free

    def spin_unlock(self, obj: Any, field: str) -> None:
        where = self._where(obj, field)
        me = self._step(f"unlock {where}")
        if not raw_get(obj, field):
            raise LockingBug(f"{where} is not locked")
        raw_set(obj, field, 0)
        self._log(me, "unlock", where, 0)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_show(v) for v in value) + ")"
    if isinstance(value, KernelObject):
        return f"{type(value).__name__}#{value._k_id}"
    if callable(value) or type(value).__module__ not in ("builtins", access.__name__):
        return f"<{type(value).__name__}>"
    return repr(value)
