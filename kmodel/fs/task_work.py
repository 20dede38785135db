"""Work that a task does for itself on its way back to user mode.

Models:      kernel/task_work.c task_work_add, task_work_run; include/linux/resume_user_mode.h (7.2)
Guards:      a task's entry is its own; of a task that has ended, whoever takes it out
Invariants:  W1 work runs with no lock held and outside RCU readers, in the task that queued it, in order
Leaves out:  work for other tasks, TWA_* notification; an ended task's work waits for exit_task_works()
Read next:   fs/file_table.py, its user

The model has no user mode to return to. System calls end with task_work_run(); a task that holds no lock and
is
in no RCU reader is as good as back.
"""

from collections.abc import Callable
from typing import Any

from kmodel.core import TaskStruct, current, engine, initcall, raw_get
from kmodel.core.report import LockingBug

_works: dict[TaskStruct, list[tuple[Callable[[Any], None], Any]]]


@initcall
def task_work_init() -> None:
    """Boot: nobody has anything queued."""
    global _works
    _works = {}


def task_work_add(func: Callable[[Any], None], arg: Any) -> None:
    """Call func(arg) when the current task leaves the kernel."""
    _works.setdefault(current(), []).append((func, arg))


def is_in_user_mode(task: TaskStruct) -> bool:
    """Whether nothing of the kernel is held by the current task, so that work may run now."""
    return not (task.held_locks or task.preempt_count or raw_get(task, "rcu_read_lock_nesting"))


def task_work_run() -> None:
    """Run what the current task queued, also what that queues in turn. System calls end with this."""
    task = current()
    if task not in _works:
        return
    if not is_in_user_mode(task):
        raise LockingBug(f"{task!r} runs task work while it holds {task.held_locks!r} or is in an RCU reader")
    while (batch := _works.pop(task, None)) is not None:
        for func, arg in batch:
            func(arg)


def task_work_pending() -> int:
    """How many pieces of work the current task has queued."""
    return len(_works.get(current(), ()))


def exit_task_works() -> None:
    """Run what tasks left behind that have ended since; in the kernel each does it itself when it exits."""
    alive = set(engine().tasks())
    for task in [task for task in list(_works) if task not in alive]:
        for func, arg in _works.pop(task, ()):
            func(arg)
