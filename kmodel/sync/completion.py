"""completion: "it has happened", said once and waited for by any number of tasks.

Models:      include/linux/completion.h, kernel/sched/completion.c (7.2)
Guards:      `done` is changed under the wait queue's lock
Invariants:  M1 each complete() lets one wait end, M2 complete_all() lets every wait end, now and later,
             M3 when wait_for_completion() has returned, complete() does not touch the completion any more
Leaves out:  simple (swait) queues: the ordinary ones are used (changed); I/O accounting
Read next:   workqueue.py
"""

from errno import EINTR, ETIME
from typing import Final

from kmodel.core import (
    READ_ONCE,
    TASK_KILLABLE,
    TASK_NORMAL,
    TASK_UNINTERRUPTIBLE,
    WRITE_ONCE,
    Struct,
    current,
    embedded,
    engine,
    kernel_struct,
    might_sleep,
    schedule,
    schedule_timeout,
    set_current_state,
)
from kmodel.sync.signal import signal_pending_state
from kmodel.sync.spinlock import spin_lock, spin_unlock
from kmodel.sync.wait import (
    WaitQueueEntry,
    WaitQueueHead,
    __add_wait_queue_entry_tail,
    __wake_up_locked,
    finish_wait,
)

UINT_MAX: Final = (1 << 32) - 1


@kernel_struct
class Completion(Struct):
    """struct completion: how many waits may end without sleeping (UINT_MAX: all)."""

    done: int = 0
    wait: WaitQueueHead = embedded(factory=WaitQueueHead)


def complete(x: Completion) -> None:
    """Let one waiter go, the one that came first, or the next one that comes (M1)."""
    spin_lock(x.wait.lock)
    if x.done != UINT_MAX:
        WRITE_ONCE(x, "done", x.done + 1)
    __wake_up_locked(x.wait, TASK_NORMAL, 1)
    spin_unlock(x.wait.lock)


def complete_all(x: Completion) -> None:
    """Let every waiter go, and every later one until reinit_completion() (M2)."""
    spin_lock(x.wait.lock)
    WRITE_ONCE(x, "done", UINT_MAX)
    __wake_up_locked(x.wait, TASK_NORMAL, 0)
    spin_unlock(x.wait.lock)


def reinit_completion(x: Completion) -> None:
    """Forget what happened; nobody may wait or complete meanwhile."""
    WRITE_ONCE(x, "done", 0)


def completion_done(x: Completion) -> bool:
    """Whether a wait would end at once. When it says so, complete() is finished with the completion (M3)."""
    if not READ_ONCE(x, "done"):
        return False
    spin_lock(x.wait.lock)
    spin_unlock(x.wait.lock)
    return True


def _wait_for_completion(x: Completion, state: int, timeout: float | None) -> int:
    might_sleep()
    deadline = None if timeout is None else engine().now() + timeout
    entry = WaitQueueEntry(private=current(), exclusive=True)
    ret = 0
    spin_lock(x.wait.lock)
    while not x.done:
        if not entry.queued:
            __add_wait_queue_entry_tail(x.wait, entry)
        set_current_state(state)
        # Asked after the state is set, so that a kill is either seen here or wakes us.
        if signal_pending_state(state):
            ret = -EINTR
            break
        spin_unlock(x.wait.lock)
        left = None if deadline is None else deadline - engine().now()
        if left is None:
            schedule()
        elif left > 0:
            schedule_timeout(left)
        spin_lock(x.wait.lock)
        if left is not None and left <= 0 and not x.done:
            ret = -ETIME
            break
    if not ret and x.done != UINT_MAX:
        WRITE_ONCE(x, "done", x.done - 1)
    spin_unlock(x.wait.lock)
    finish_wait(x.wait, entry)
    return ret


def wait_for_completion(x: Completion) -> None:
    """Sleep until complete() or complete_all()."""
    _wait_for_completion(x, TASK_UNINTERRUPTIBLE, None)


def wait_for_completion_killable(x: Completion) -> int:
    """Sleep until complete(): 0, or -EINTR after a fatal signal."""
    return _wait_for_completion(x, TASK_KILLABLE, None)


def wait_for_completion_timeout(x: Completion, seconds: float) -> bool:
    """Sleep until complete(), for at most `seconds`; whether it happened."""
    return _wait_for_completion(x, TASK_UNINTERRUPTIBLE, seconds) == 0


def try_wait_for_completion(x: Completion) -> bool:
    """Take one complete() if there is one, without sleeping."""
    if not READ_ONCE(x, "done"):
        return False
    spin_lock(x.wait.lock)
    got = bool(x.done)
    if got and x.done != UINT_MAX:
        WRITE_ONCE(x, "done", x.done - 1)
    spin_unlock(x.wait.lock)
    return got
