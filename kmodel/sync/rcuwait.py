"""rcuwait: one task waits for a condition, anybody wakes it, and no wait queue lock is involved.

Models:      include/linux/rcuwait.h; kernel/exit.c, rcuwait_wake_up (7.2)
Guards:      `task` is set by the one waiter (its callers serialise waiters); wakers only read it
Invariants:  C1 no lost wake-up: a waker that made the condition true either sees the waiter, or the waiter
             sees the condition
Leaves out:  the RCU section of the waker, which keeps the task_struct's memory: tasks here are never freed
             (stubbed)
Read next:   wait.py; mm/vma_lock.py, whose writer waits here for readers

    waiter                                  waker
      task = current          (release)       condition = true
      state = sleeping                        smp_mb                B
      smp_mb                  A               t = task
      condition? no: schedule                 if t: wake it (state = running)

A pairs with B: of the two stores (state and task on the left, condition on the right) at least one is seen by
the other side.
"""

from collections.abc import Callable
from errno import EINTR

from kmodel.core import (
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
    WRITE_ONCE,
    LockingBug,
    Struct,
    TaskStruct,
    current,
    guards,
    kernel_struct,
    raw_get,
    rcu_assign_pointer,
    rcu_dereference,
    schedule,
    set_current_state,
    smp_mb,
    wake_up_process,
)
from kmodel.sync.signal import signal_pending_state

_WAITER_MB = guards.register(
    "no-rcuwait-waiter-mb", "H29: the waiter tests the condition before its sleep is visible"
)
_WAKER_MB = guards.register(
    "no-rcuwait-waker-mb", "H29: the waker looks for a waiter before the condition is visible"
)


@kernel_struct
class Rcuwait(Struct):
    """struct rcuwait: the task that waits, or None."""

    task: TaskStruct | None = None


def rcuwait_active(w: Rcuwait) -> bool:
    """Whether somebody waits, at some moment; needs the waker's full barrier before it to mean anything."""
    return rcu_dereference(w, "task") is not None


def prepare_to_rcuwait(w: Rcuwait) -> None:
    """Announce current as the waiter. RELEASE: a waker that sees the task sees it whole."""
    if raw_get(w, "task") is not None:
        raise LockingBug(f"{current()!r} waits on {w!r}, where {raw_get(w, 'task')!r} does already")
    rcu_assign_pointer(w, "task", current())


def finish_rcuwait(w: Rcuwait) -> None:
    """Stop being the waiter."""
    rcu_assign_pointer(w, "task", None)
    WRITE_ONCE(current(), "state", TASK_RUNNING)


def rcuwait_wait_event(w: Rcuwait, condition: Callable[[], bool], state: int = TASK_UNINTERRUPTIBLE) -> int:
    """Sleep in `state` until condition() holds: 0, or -EINTR if a signal that `state` listens to came first.

    One waiter at a time; the caller's lock sees to it. condition() is asked again after every wake-up, so
    wake-ups without a reason are harmless.
    """
    prepare_to_rcuwait(w)
    ret = 0
    while True:
        if _WAITER_MB in guards.removed:
            WRITE_ONCE(current(), "state", state)
        else:
            set_current_state(state)  # barrier A, pairs with B in rcuwait_wake_up()
        if condition():
            break
        if signal_pending_state(state):
            ret = -EINTR
            break
        schedule()
    finish_rcuwait(w)
    return ret


def rcuwait_wake_up(w: Rcuwait) -> bool:
    """Wake the waiter, if there is one, to look at its condition again; whether it was asleep."""
    # Barrier B orders the caller's change of the condition before the look at the task; pairs with A in
    # rcuwait_wait_event().
    if _WAKER_MB not in guards.removed:
        smp_mb()
    task: TaskStruct | None = rcu_dereference(w, "task")
    return task is not None and wake_up_process(task)
