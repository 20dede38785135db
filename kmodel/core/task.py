"""Tasks: `current`, what a task holds, and which OS thread it runs on.

Models:      include/linux/sched.h, struct task_struct (the fields this model needs); get_current()
Guards:      every field is its own task's, except `state` (atomic) and what is marked otherwise
Invariants:  K1 one OS thread runs at most one task, K2 a TaskStruct is created by the OS thread that runs it
Leaves out:  scheduling classes, credentials, files
Read next:   core/lockdep.py

K2 is for free-threaded CPython: a thread reads and writes objects that it created itself without touching
shared reference
counts (45 ns, scales x2.0), and the RCU read-side words live here.
"""

import itertools
import threading
import types
from threading import get_ident
from typing import Any

from kmodel.core.struct import Struct, atomic, kernel_struct, untraced

TASK_RUNNING = 0
TASK_INTERRUPTIBLE = 1
TASK_UNINTERRUPTIBLE = 2
TASK_WAKEKILL = 0x100
TASK_KILLABLE = TASK_WAKEKILL | TASK_UNINTERRUPTIBLE
TASK_NORMAL = TASK_INTERRUPTIBLE | TASK_UNINTERRUPTIBLE

TIF_SIGPENDING = 2
TIF_UPROBE = 12


@kernel_struct
class TaskStruct(Struct):
    """One task (struct task_struct)."""

    pid: int = untraced()
    comm: str = untraced(default="")
    cpu: int = untraced(default=0)
    is_kthread: bool = untraced(default=False)

    # written by the task itself and, to TASK_RUNNING, by its wakers
    state: int = atomic(default=TASK_RUNNING)
    # TIF_* bits; set by others, cleared by the task
    thread_info_flags: int = atomic(default=0)
    # a fatal signal is pending
    sigkill: bool = atomic(default=False)

    mm: Any = None
    utask: Any = None

    # RCU read-side state; written by the task only, read by grace periods. The nesting is the kernel's; the
    # other counts (modulo 256) ended sections, so that a stream of new ones does not hold up a writer.
    rcu_read_lock_nesting: int = 0
    rcu_read_sections: int = 0
    trc_reader_nesting: int = 0
    trc_reader_sections: int = 0
    # the counter of the SRCU domain behind RCU Tasks Trace that the outermost section uses
    trc_reader_scp: Any = untraced(default=None, init=False)

    # The model's own bookkeeping.
    preempt_count: int = untraced(default=0, init=False)
    held_locks: list[tuple[Any, str]] = untraced(factory=list, init=False)
    percpu: dict[Any, Any] = untraced(factory=dict, init=False)
    local: dict[str, Any] = untraced(factory=dict, init=False)
    engine: Any = untraced(default=None, init=False)
    park: Any = untraced(default=None, init=False)
    thread_ident: int = untraced(factory=get_ident, init=False)

    def __repr__(self) -> str:
        return f"<task {self.pid} {self.comm}>"


# A module's dict is immortal on free-threaded 3.13, so looking a task up in it scales (measured x1.92;
# threading.local x0.56).
_tasks_by_thread: dict[int, TaskStruct] = types.ModuleType("kmodel_tasks").__dict__  # type: ignore[assignment]
_tasks_by_thread.clear()
_pids = itertools.count(1)
NR_CPUS = 64


def current() -> TaskStruct:
    """The task that the calling OS thread runs; a thread the model has not seen before becomes a task of its
    own."""
    try:
        return _tasks_by_thread[get_ident()]
    except KeyError:
        return adopt_thread()


def adopt_thread(comm: str | None = None) -> TaskStruct:
    """Make the calling OS thread a task of the threads engine (idempotent)."""
    ident = get_ident()
    if ident in _tasks_by_thread:
        return _tasks_by_thread[ident]
    pid = next(_pids)
    task = TaskStruct(pid=pid, comm=comm or f"thread-{pid}", cpu=pid % NR_CPUS)
    _tasks_by_thread[ident] = task
    _adopted.token = _Adopted(ident, task)
    return task


class _Adopted:
    """Lives in an adopted thread's local storage, and so ends with the thread: the system may give its
    identifier to another one, which must become a task of its own (K2)."""

    def __init__(self, ident: int, task: TaskStruct) -> None:
        self.ident = ident
        self.task = task

    def __del__(self, tasks: dict[int, TaskStruct] = _tasks_by_thread) -> None:
        # The dict is a default so that it is still there when the interpreter takes its modules apart.
        if self.ident in tasks and tasks[self.ident] is self.task:
            del tasks[self.ident]


_adopted = threading.local()


def bind_thread(task: TaskStruct) -> TaskStruct | None:
    """Let the calling OS thread run `task` from now on; return what it ran before."""
    ident = get_ident()
    # Not .get(): 3.13t takes its slow way for a key that another thread stored (20 us; this is 0.1).
    before = _tasks_by_thread[ident] if ident in _tasks_by_thread else None  # noqa: SIM401
    task.thread_ident = ident
    _tasks_by_thread[ident] = task
    return before


def unbind_thread(before: TaskStruct | None = None) -> None:
    """The calling OS thread runs no task any more, or `before` again."""
    if before is None:
        _tasks_by_thread.pop(get_ident(), None)
    else:
        _tasks_by_thread[get_ident()] = before


def next_pid() -> int:
    """A process-wide unused task number for a task of the threads engine."""
    return next(_pids)


def bound_tasks() -> list[TaskStruct]:
    """Every task that some OS thread runs now, whatever its engine."""
    return list(_tasks_by_thread.values())
