"""Wait queues: any number of tasks sleep until a condition that somebody else makes true.

Models:      include/linux/wait.h, kernel/sched/wait.c (7.2)
Guards:      `head` is changed under `lock`; it is an immutable tuple, so that waitqueue_active() may look
             without it
Invariants:  U1 no lost wake-up between prepare_to_wait() and the waker's wake_up(), U2 first come first
             served among exclusive waiters, U3 an entry is off the queue when finish_wait() returns
Leaves out:  wait-queue bookmarks, polling keys, priority entries, wait_on_bit
Read next:   completion.py

The waiter queues and sets its state (a full barrier) before it tests the condition; the waker makes the
condition true before it takes the lock. wake_up_process() has the full barrier that pairs with the waiter's.
A waker that would save the lock by asking waitqueue_active() first needs a full barrier of its own before
asking: wq_has_sleeper() is that.
"""

from collections.abc import Callable
from errno import EINTR

from kmodel.core import (
    READ_ONCE,
    TASK_INTERRUPTIBLE,
    TASK_KILLABLE,
    TASK_NORMAL,
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
    WRITE_ONCE,
    KernelBug,
    Struct,
    TaskStruct,
    current,
    embedded,
    engine,
    kernel_struct,
    might_sleep,
    raw_get,
    schedule,
    schedule_timeout,
    set_current_state,
    smp_load_acquire,
    smp_mb,
    smp_store_release,
    untraced,
    wake_up_state,
)
from kmodel.sync.signal import signal_pending_state
from kmodel.sync.spinlock import SpinLock, spin_lock, spin_unlock

WakeFunction = Callable[["WaitQueueEntry", int], int]
"""Wake what an entry stands for: positive if a task was woken, 0 if it was awake, negative to stop waking
here.
"""


@kernel_struct
class WaitQueueEntry(Struct):
    """struct wait_queue_entry. `func` is autoremove_wake_function unless a lock brings its own."""

    private: TaskStruct | None = None
    # Whether it is on the queue (the kernel asks the list node).
    queued: bool = False
    exclusive: bool = untraced(default=False)
    func: WakeFunction | None = untraced(default=None)


@kernel_struct
class WaitQueueHead(Struct):
    """struct wait_queue_head (wait_queue_head_t)."""

    lock: SpinLock = embedded(factory=SpinLock)
    # write: lock; read: lock, or READ_ONCE to ask whether it is empty
    head: tuple[WaitQueueEntry, ...] = ()


# ------------------------------------------------------------------------------------------------ the queue


def __add_wait_queue_entry_tail(wq: WaitQueueHead, entry: WaitQueueEntry) -> None:
    """Queue `entry` last; caller holds wq.lock."""
    entry.queued = True
    WRITE_ONCE(wq, "head", (*wq.head, entry))


def __remove_wait_queue(wq: WaitQueueHead, entry: WaitQueueEntry) -> None:
    """Take `entry` off the queue; caller holds wq.lock."""
    WRITE_ONCE(wq, "head", tuple(other for other in wq.head if other is not entry))
    # RELEASE: pairs with the acquire in finish_wait(), which must not go on while the waker still uses the
    # entry.
    smp_store_release(entry, "queued", False)


def waitqueue_active(wq: WaitQueueHead) -> bool:
    """Whether anybody waits; without a full barrier before it the answer may be old (H67)."""
    return bool(READ_ONCE(wq, "head"))


def wq_has_sleeper(wq: WaitQueueHead) -> bool:
    """waitqueue_active() after the caller's change of the condition.

    The barrier pairs with the one in prepare_to_wait(): either the waiter sees the condition, or we see the
    waiter.
    """
    smp_mb()
    return waitqueue_active(wq)


# ------------------------------------------------------------------------------------------------ waiting


def prepare_to_wait(wq: WaitQueueHead, entry: WaitQueueEntry, state: int) -> None:
    """Queue `entry` if it is not queued and announce the sleep. Test the condition after this, not before."""
    spin_lock(wq.lock)
    if not entry.queued:
        __add_wait_queue_entry_tail(wq, entry)
    set_current_state(state)  # the barrier pairs with the full barrier in wake_up_process()
    spin_unlock(wq.lock)


def finish_wait(wq: WaitQueueHead, entry: WaitQueueEntry) -> None:
    """Be awake again and off the queue (U3)."""
    WRITE_ONCE(current(), "state", TASK_RUNNING)
    # ACQUIRE: pairs with the release in __remove_wait_queue() by the waker; then there is nothing left to do.
    if smp_load_acquire(entry, "queued"):
        spin_lock(wq.lock)
        if entry.queued:
            __remove_wait_queue(wq, entry)
        spin_unlock(wq.lock)


def _wait_event(
    wq: WaitQueueHead, condition: Callable[[], bool], state: int, exclusive: bool, timeout: float | None
) -> int:
    might_sleep()
    if condition():
        return 0
    deadline = None if timeout is None else engine().now() + timeout
    entry = WaitQueueEntry(private=current(), exclusive=exclusive)
    ret = 0
    while True:
        prepare_to_wait(wq, entry, state)
        if condition():
            break
        if signal_pending_state(state):
            ret = -EINTR
            break
        if deadline is None:
            schedule()
        elif (left := deadline - engine().now()) > 0:
            schedule_timeout(left)
        else:
            ret = 1
            break
    finish_wait(wq, entry)
    return ret


def wait_event(wq: WaitQueueHead, condition: Callable[[], bool]) -> None:
    """Sleep until condition() holds."""
    _wait_event(wq, condition, TASK_UNINTERRUPTIBLE, False, None)


def wait_event_killable(wq: WaitQueueHead, condition: Callable[[], bool]) -> int:
    """Sleep until condition() holds: 0, or -EINTR after a fatal signal."""
    return _wait_event(wq, condition, TASK_KILLABLE, False, None)


def wait_event_interruptible(wq: WaitQueueHead, condition: Callable[[], bool]) -> int:
    """Sleep until condition() holds: 0, or -EINTR after any signal."""
    return _wait_event(wq, condition, TASK_INTERRUPTIBLE, False, None)


def wait_event_exclusive(wq: WaitQueueHead, condition: Callable[[], bool]) -> None:
    """wait_event() of which one wake_up() wakes only one."""
    _wait_event(wq, condition, TASK_UNINTERRUPTIBLE, True, None)


def wait_event_timeout(wq: WaitQueueHead, condition: Callable[[], bool], seconds: float) -> bool:
    """Sleep until condition() holds, for at most `seconds`; whether it held."""
    return _wait_event(wq, condition, TASK_UNINTERRUPTIBLE, False, seconds) == 0 or condition()


# ------------------------------------------------------------------------------------------------ waking


def autoremove_wake_function(wq: WaitQueueHead, entry: WaitQueueEntry, mode: int) -> int:
    """Wake the entry's task; if it was asleep, take the entry off the queue so that the next wake_up() gets
    the next one.
    """
    task = entry.private
    assert task is not None
    if not wake_up_state(task, mode):
        return 0
    __remove_wait_queue(wq, entry)
    return 1


def __wake_up_locked(wq: WaitQueueHead, mode: int = TASK_NORMAL, nr_exclusive: int = 1) -> None:
    """Wake all non-exclusive waiters and up to `nr_exclusive` exclusive ones (0: all); under wq.lock."""
    for entry in wq.head:
        func = entry.func
        woken = func(entry, mode) if func is not None else autoremove_wake_function(wq, entry, mode)
        if woken < 0:
            break
        if woken and entry.exclusive:
            nr_exclusive -= 1
            if nr_exclusive == 0:
                break


def __wake_up(wq: WaitQueueHead, mode: int, nr_exclusive: int) -> None:
    """__wake_up_locked with the lock taken."""
    spin_lock(wq.lock)
    __wake_up_locked(wq, mode, nr_exclusive)
    spin_unlock(wq.lock)


def wake_up(wq: WaitQueueHead) -> None:
    """Wake every non-exclusive waiter and one exclusive one."""
    __wake_up(wq, TASK_NORMAL, 1)


def wake_up_nr(wq: WaitQueueHead, nr: int) -> None:
    """Wake every non-exclusive waiter and `nr` exclusive ones."""
    __wake_up(wq, TASK_NORMAL, nr)


def wake_up_all(wq: WaitQueueHead) -> None:
    """Wake every waiter."""
    __wake_up(wq, TASK_NORMAL, 0)


def check_invariants(wq: WaitQueueHead) -> None:
    """KernelBug unless the queue is sound. Nobody may be inside an operation on `wq` (sleepers are fine)."""
    head = raw_get(wq, "head")
    if len(set(map(id, head))) != len(head):
        raise KernelBug(f"{wq!r}: an entry is queued twice")
    if not all(raw_get(entry, "queued") for entry in head):
        raise KernelBug(f"U3: {wq!r} holds an entry that believes to be off the queue")
