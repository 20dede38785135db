"""Work that a task does for itself on its way back to user mode.

Models:      kernel/task_work.c task_work_add, task_work_run; include/linux/resume_user_mode.h (7.2)
Guards:      a task's list is its own
Invariants:  W1 work runs with no lock held and outside RCU readers, in the task that queued it, in order
Leaves out:  work for other tasks, TWA_* notification, exit_task_work
Read next:   fs/file_table.py, its user

The model has no user mode to return to. System calls end with task_work_run(); a task that holds no lock and
is in no RCU reader is as good as back.
"""

from collections.abc import Callable
from typing import Any

from kmodel.core import TaskStruct, current, raw_get
from kmodel.core.report import LockingBug


def task_work_add(func: Callable[[Any], None], arg: Any) -> None:
    """Call func(arg) when the current task leaves the kernel."""
    works = current().local.get("task_works")
    if works is None:
        works = current().local["task_works"] = []
    works.append((func, arg))


def is_in_user_mode(task: TaskStruct) -> bool:
    """Whether nothing of the kernel is held by the current task, so that work may run now."""
    return not (task.held_locks or task.preempt_count or raw_get(task, "rcu_read_lock_nesting"))


def task_work_run() -> None:
    """Run what the current task queued, also what that queues in turn. System calls end with this."""
    task = current()
    works = task.local.get("task_works")
    if not works:
        return
    if not is_in_user_mode(task):
        raise LockingBug(f"{task!r} runs task work while it holds {task.held_locks!r} or is in an RCU reader")
    while works:
        batch = works[:]
        works.clear()
        for func, arg in batch:
            func(arg)


def task_work_pending() -> int:
    """How many pieces of work the current task has queued."""
    return len(current().local.get("task_works") or ())
