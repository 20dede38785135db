"""The seam: what an engine gives to the model, and how a traced engine takes over the watched fields.

Models:      nothing in Linux; it stands where a CPU and its scheduler stand
Guards:      one engine is installed at a time, for the whole process
Invariants:  E1 after a traced run every class has its own slot descriptors back, E2 blocking goes through
             here only
Read next:   core/threads.py (real threads), core/coop.py (seeded cooperative), explore/ (exhaustive)

Model code never calls an engine's memory operations: plain attributes and core/access.py do. What it does
call are the blocking
and task functions at the end of this module; every lock in sync/ is made of those and of marked accesses.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from kmodel.core import access, struct
from kmodel.core.report import clear_warnings
from kmodel.core.task import TASK_RUNNING, TaskStruct, current


class RcuSpec(Protocol):
    """Grace periods as a specification, which an engine may offer instead of running rcu/'s implementation.

    `domain` is any hashable: "rcu", "rcu_tasks_trace" or an SrcuStruct.
    """

    def read_lock(self, domain: Any) -> int:
        """Enter an outermost read-side section; the number is to be handed to read_unlock."""

    def read_unlock(self, domain: Any, idx: int) -> None:
        """Leave it."""

    def synchronize(self, domain: Any) -> None:
        """Block until every section open now has ended; full barrier both ways."""

    def call(self, domain: Any, func: Callable[[], None]) -> None:
        """Run `func` in a task of its own after a grace period that starts now."""

    def barrier(self, domain: Any) -> None:
        """Block until every func given to call() before has run."""


class Engine(ABC):
    """Tasks, time and blocking."""

    name = "engine"
    rcu: RcuSpec | None = None
    nr_cpu_ids = 64

    @abstractmethod
    def spawn(self, func: Callable[..., Any], args: tuple[Any, ...], comm: str, daemon: bool) -> TaskStruct:
        """Start a task running func(*args). A daemon need not have ended when a run ends."""

    @abstractmethod
    def join(self, task: TaskStruct, timeout: float | None = None) -> bool:
        """Wait for a spawned task to end; False on timeout. What the task raised is raised here."""

    @abstractmethod
    def schedule(self, timeout: float | None = None) -> None:
        """Block current until its state is TASK_RUNNING (or the time is over)."""

    @abstractmethod
    def kick(self, task: TaskStruct) -> None:
        """`task`'s state was just set to TASK_RUNNING: let schedule() notice."""

    @abstractmethod
    def spin_lock(self, obj: Any, field: str) -> None:
        """Take the lock word obj.field, 0 to 1 with acquire ordering, waiting while it is 1."""

    @abstractmethod
    def spin_trylock(self, obj: Any, field: str) -> bool:
        """Take the lock word if it is free."""

    @abstractmethod
    def spin_unlock(self, obj: Any, field: str) -> None:
        """Release the lock word, 1 to 0 with release ordering."""

    @abstractmethod
    def run_later(self, func: Callable[[], None], delay: float, comm: str) -> None:
        """Run `func` in a kernel worker's task, not before `delay` seconds (which an untimed engine counts as
        any time later)."""

    @abstractmethod
    def now(self) -> float:
        """Seconds, from any start."""

    @abstractmethod
    def tasks(self) -> list[TaskStruct]:
        """The tasks that exist now (for_each_process)."""

    def freed(self, obj: Any) -> None:  # noqa: B027  # optional hook
        """`obj` went back to its allocator; it must not be touched until allocated again."""

    def allocated(self, obj: Any) -> None:  # noqa: B027  # optional hook
        """`obj` came out of its allocator."""


class Tracer(Engine):
    """An engine that sees every access."""

    @abstractmethod
    def plain_load(self, obj: Any, field: str) -> Any:
        """`obj.field` was read."""

    @abstractmethod
    def plain_store(self, obj: Any, field: str, value: Any) -> None:
        """`obj.field = value`."""

    @abstractmethod
    def load(self, obj: Any, field: str, order: str) -> Any:
        """Marked load, "once" or "acquire"."""

    @abstractmethod
    def store(self, obj: Any, field: str, value: Any, order: str) -> None:
        """Marked store, "once" or "release"."""

    @abstractmethod
    def rmw(self, obj: Any, field: str, update: Callable[[Any], Any], order: str) -> Any:
        """Read-modify-write, "full", "relaxed", "acquire" or "release"; NO_STORE from update makes it a
        relaxed load."""

    @abstractmethod
    def fence(self, kind: str) -> None:
        """ "mb", "rmb" or "wmb"."""

    @abstractmethod
    def cond_load(self, obj: Any, field: str, cond: Callable[[Any], bool], order: str) -> Any:
        """Block until a load of obj.field may return a value for which cond holds, and return it."""

    @abstractmethod
    def relax(self) -> None:
        """End of one turn of a busy-wait loop."""

    @abstractmethod
    def data_race[T](self, expression: Callable[[], T]) -> T:
        """Evaluate without race reports."""

    @abstractmethod
    def constructed(self, obj: Any) -> None:
        """A kernel_struct was built: name it. Its initial values are what every task sees at first."""

    def lock_acquired(self, task: TaskStruct, lock: Any, mode: str) -> None:  # optional hook
        """The task now holds a lock of sync/ (for lock-order oracles)."""

    def lock_released(self, task: TaskStruct, lock: Any) -> None:  # optional hook
        """The task no longer holds it."""


# ----------------------------------------------------------------------------------------------- installation

_engine: Engine | None = None


def engine() -> Engine:
    """The engine that runs the model now (real threads unless a traced one is installed)."""
    if _engine is None:
        from kmodel.core.threads import ThreadsEngine

        _set_engine(ThreadsEngine())
    assert _engine is not None
    return _engine


def _set_engine(new: Engine | None) -> None:
    global _engine
    _engine = new


class TracedField:
    """The descriptor that stands in for a slot during a traced run."""

    __slots__ = ("name", "slot")

    def __init__(self, name: str, slot: Any) -> None:
        self.name = name
        self.slot = slot

    def __get__(self, obj: Any, owner: Any = None) -> Any:
        if obj is None:
            return self
        tracer = access._tracer
        if tracer is None:
            return self.slot.__get__(obj)
        return tracer.plain_load(obj, self.name)

    def __set__(self, obj: Any, value: Any) -> None:
        tracer = access._tracer
        if tracer is None:
            self.slot.__set__(obj, value)
        else:
            tracer.plain_store(obj, self.name, value)

    def __delete__(self, obj: Any) -> None:
        self.slot.__delete__(obj)


_built_inside: list[Any] | None = None


def _traced_init(cls: type[Any]) -> Callable[..., None]:
    original = cls.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        global _built_inside
        tracer = access._tracer
        if tracer is None or type(self) is not cls:
            original(self, *args, **kwargs)
            if _built_inside is not None:
                _built_inside.append(self)
            return
        access._tracer = None  # initial values are not events
        inside = _built_inside = []
        try:
            original(self, *args, **kwargs)
        finally:
            access._tracer, _built_inside = tracer, None
        announce(self)
        # What factories built beside the embedded structs: per-CPU instances, list heads, ...
        embedded = _embedded_in(self)
        for obj in inside:
            if id(obj) not in embedded:
                embedded |= _embedded_in(obj)
                announce(obj)

    return __init__


def _embedded_in(obj: Any) -> set[int]:
    """The identities of a struct and of all that is embedded in it."""
    found = {id(obj)}
    for name in obj.__k_embedded__:
        found |= _embedded_in(getattr(obj, name))
    return found


def announce(obj: Any) -> None:
    """Tell the traced engine, if there is one, that `obj` and the structs embedded in it are new."""
    tracer = access._tracer
    if tracer is not None:
        tracer.constructed(obj)
        for name in obj.__k_embedded__:
            announce(getattr(obj, name))


def _trace_class(cls: type[Any]) -> None:
    for name, slot in cls.__k_slots__.items():
        if cls.__dict__.get(name) is slot:
            setattr(cls, name, TracedField(name, slot))
    init = _traced_init(cls)
    cls.__k_init__ = cls.__init__
    cls.__init__ = init


def _untrace_class(cls: type[Any]) -> None:
    for name, slot in cls.__k_slots__.items():
        if isinstance(cls.__dict__.get(name), TracedField):
            setattr(cls, name, slot)
    cls.__init__ = cls.__k_init__
    del cls.__k_init__


@contextmanager
def tracing() -> Iterator[None]:
    """Replace the slot descriptors of every kernel_struct (also ones defined meanwhile) by traced ones; put
    them back at the end.

    Costs about a microsecond per field, so an engine that runs many executions does it once around all of
    them.
    """
    for cls in struct.registered_structs():
        _trace_class(cls)
    struct._registry_hook = _trace_class
    try:
        yield
    finally:
        struct._registry_hook = None
        for cls in struct.registered_structs():
            _untrace_class(cls)


@contextmanager
def installed(new: Engine) -> Iterator[Engine]:
    """Run the model on `new` inside the block. A Tracer also needs `tracing()` around it, and switches its
    events on itself."""
    before = _engine
    if isinstance(before, Tracer):
        raise RuntimeError("a traced engine is already installed")
    _set_engine(new)
    try:
        yield new
    finally:
        _set_engine(before)


# ------------------------------------------------------------------------------------------------ boot

_initcalls: list[Callable[[], None]] = []


def initcall[F: Callable[[], None]](func: F) -> F:
    """Decorator: `func` sets up a room's global state (uprobes_tree, slab caches, ...). It runs now and at
    every boot()."""
    _initcalls.append(func)
    func()
    return func


_reboot_notifiers: list[Callable[[], None]] = []


def reboot_notifier[F: Callable[[], None]](func: F) -> F:
    """Decorator: on real threads `func` runs before every boot(), to wait for what workers still do with the
    state that is about to go. Latest registered first."""
    _reboot_notifiers.append(func)
    return func


def boot() -> None:
    """Put every global of the model back to its state at boot, and forget warnings and what current holds.

    A scenario for a traced engine calls it first in its setup, so that no state outlives an execution.
    """
    task = current()
    task.held_locks.clear()
    task.preempt_count = 0
    task.local.clear()
    if access._tracer is None:
        task.rcu_read_lock_nesting = 0
        task.sigkill = False
        task.thread_info_flags = 0
        for func in reversed(_reboot_notifiers):
            func()
    clear_warnings()
    for func in _initcalls:
        func()


# --------------------------------------------------------------------------------------------- for model code


def set_current_state(state: int) -> None:
    """Announce that current is about to sleep: a store and a full barrier, so that either the waker sees it
    or it sees the wake."""
    access.smp_store_mb(current(), "state", state)


def __set_current_state(state: int) -> None:
    """set_current_state without the barrier (used to go back to TASK_RUNNING)."""
    access.WRITE_ONCE(current(), "state", state)


def schedule() -> None:
    """Sleep until somebody sets current's state to TASK_RUNNING. Returns at once if it is already."""
    engine().schedule()


def schedule_timeout(seconds: float) -> None:
    """schedule() for at most `seconds`; afterwards the state is TASK_RUNNING."""
    engine().schedule(seconds)
    access.WRITE_ONCE(current(), "state", TASK_RUNNING)


def wake_up_state(task: TaskStruct, mask: int) -> bool:
    """If `task` sleeps in a state of `mask`, make it runnable; whether it was asleep. Full barrier before the
    state is read."""
    # The exchange alone is no barrier when it finds the task awake, and then what it saw might be old: the
    # waker's change of the condition comes first. Pairs with the barrier in set_current_state().
    access.smp_mb()
    old = access.rmw(task, "state", lambda state: TASK_RUNNING if state & mask else access.NO_STORE)
    if old & mask:
        engine().kick(task)
        return True
    return False


def wake_up_process(task: TaskStruct) -> bool:
    """Wake a task from any normal sleep."""
    from kmodel.core.task import TASK_NORMAL

    return wake_up_state(task, TASK_NORMAL)


def kill(task: TaskStruct) -> None:
    """Send a fatal signal: sets it pending and wakes interruptible and killable sleepers."""
    from kmodel.core.task import TASK_INTERRUPTIBLE, TASK_WAKEKILL

    access.xchg(task, "sigkill", True)
    wake_up_state(task, TASK_INTERRUPTIBLE | TASK_WAKEKILL)


def fatal_signal_pending(task: TaskStruct | None = None) -> bool:
    """Whether a fatal signal waits for `task` (current by default)."""
    return bool(access.READ_ONCE(task if task is not None else current(), "sigkill"))


def kthread_run(
    func: Callable[..., Any], *args: Any, comm: str = "kthread", daemon: bool = True
) -> TaskStruct:
    """Start a kernel thread running func(*args); a daemon need not end before a run does."""
    return engine().spawn(func, args, comm, daemon)
