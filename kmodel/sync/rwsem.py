"""rw_semaphore: many readers or one writer, sleeping, first come first served with a little stealing.

Models:      include/linux/rwsem.h, kernel/locking/rwsem.c (7.2)
Guards:      `count` by read-modify-write; `wait_list` by `wait_lock`
Invariants:  R1 never a writer and an active reader, R2 the waiters bit is set exactly while somebody waits
             (wait_lock free), R3 the handoff bit only while somebody waits, and while it is set nobody but
             the first waiter gets the lock, R4 a waiter that leaves (-EINTR) leaves no trace in count or list
             and wakes whoever it was in the way of
Leaves out:  optimistic spinning and with it the owner word (stubbed); the reader-failure bit at 2^55 readers;
             PREEMPT_RT
Read next:   mutex.py; mm/mmap_lock.py is the user all of this is for

The word: bit 0 a writer holds it, bit 1 somebody waits, bit 2 handoff, from bit 8 the readers. A reader adds
its share first and looks at the other bits afterwards, so a share may be in the word while its owner is on
the way to the wait list.

The fast paths are one read-modify-write. A waiting writer whose patience (4 ms) is over sets the handoff bit
the next time it finds the lock taken: from then on nobody else can take it, so neither readers nor writers
can starve it. Readers are woken in batches, all the waiting ones at once and not only those before the next
writer: phase-fair.
"""

from errno import EINTR
from typing import Any

from kmodel.core import (
    NO_STORE,
    READ_ONCE,
    TASK_KILLABLE,
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
    WRITE_ONCE,
    LockingBug,
    TaskStruct,
    current,
    lock_acquire,
    lock_downgrade,
    lock_is_held,
    lock_release,
    lockdep_assert_held,
    lockdep_assert_held_write,
    might_sleep,
    rmw,
    schedule,
    set_current_state,
    smp_load_acquire,
)
from kmodel.sync.rwsem_waiters import (
    READ_FAILED_MASK,
    RELEASED_MASK,
    RWSEM_FLAG_HANDOFF,
    RWSEM_FLAG_WAITERS,
    RWSEM_READER_BIAS,
    RWSEM_READER_SHIFT,
    RWSEM_WRITER_LOCKED,
    WAITING_FOR_READ,
    WAITING_FOR_WRITE,
    WAKE_READ_OWNED,
    RwSemaphore,
    add_waiter,
    cond_wake_waiter,
    give_up,
    rwsem_mark_wake,
    rwsem_wake,
    try_write_lock,
    wake_up_q,
)
from kmodel.sync.signal import signal_pending_state
from kmodel.sync.spinlock import spin_lock, spin_unlock

# ----------------------------------------------------------------------------------------- updates of `count`


def _add_reader(old: int) -> int:
    return old + RWSEM_READER_BIAS


def _sub_reader(old: int) -> int:
    return old - RWSEM_READER_BIAS


def _add_reader_if_unlocked(old: int) -> Any:
    return NO_STORE if old & READ_FAILED_MASK else old + RWSEM_READER_BIAS


def _lock_if_unlocked(old: int) -> Any:
    return NO_STORE if old else RWSEM_WRITER_LOCKED


def _sub_writer(old: int) -> int:
    return old - RWSEM_WRITER_LOCKED


def _writer_to_reader(old: int) -> int:
    return old - RWSEM_WRITER_LOCKED + RWSEM_READER_BIAS


def _set_waiters(old: int) -> int:
    return old | RWSEM_FLAG_WAITERS


# ------------------------------------------------------------------------------------------------ readers


def down_read(sem: RwSemaphore) -> None:
    """Take the lock for reading. ACQUIRE: pairs with the releases of up_write() and downgrade_write()."""
    might_sleep()
    count = rmw(sem, "count", _add_reader, "acquire")
    if count & READ_FAILED_MASK:
        _down_read_slowpath(sem, count + RWSEM_READER_BIAS, TASK_UNINTERRUPTIBLE)
    lock_acquire(sem, "read")


def down_read_killable(sem: RwSemaphore) -> int:
    """down_read that a fatal signal ends: 0, or -EINTR without the lock."""
    might_sleep()
    count = rmw(sem, "count", _add_reader, "acquire")
    if count & READ_FAILED_MASK and _down_read_slowpath(sem, count + RWSEM_READER_BIAS, TASK_KILLABLE):
        return -EINTR
    lock_acquire(sem, "read")
    return 0


def down_read_trylock(sem: RwSemaphore) -> bool:
    """Take the lock for reading if no writer holds it and nobody waits."""
    if rmw(sem, "count", _add_reader_if_unlocked, "acquire") & READ_FAILED_MASK:
        return False
    lock_acquire(sem, "read")
    return True


def up_read(sem: RwSemaphore) -> None:
    """Release a read hold. RELEASE: what was read stays before the next writer's changes."""
    lock_release(sem)
    count = rmw(sem, "count", _sub_reader, "release") - RWSEM_READER_BIAS
    if count < 0:
        raise LockingBug(f"{sem!r} is released for reading by {current()!r}, but no reader holds it")
    if count & RELEASED_MASK == RWSEM_FLAG_WAITERS:
        rwsem_wake(sem)  # the last one out


def _down_read_slowpath(sem: RwSemaphore, count: int, state: int) -> int:
    """Get the lock for a reader whose share is in `count` already, or take the share back and queue; 0 or
    -EINTR.
    """
    _assert_not_writer(sem)
    readers = count >> RWSEM_READER_SHIFT
    # Stealing: the lock is free or read-held, only the wait list says no. Allowed for a reader that is the
    # only one, so that a stream of readers cannot keep a waiting writer out, and never against a handoff
    # (R3).
    if not count & (RWSEM_WRITER_LOCKED | RWSEM_FLAG_HANDOFF) and readers == 1:
        if count & RWSEM_FLAG_WAITERS:
            wake_q: list[TaskStruct] = []
            spin_lock(sem.wait_lock)
            if sem.wait_list:
                rwsem_mark_wake(sem, WAKE_READ_OWNED, wake_q)  # readers in the list may come along
            spin_unlock(sem.wait_lock)
            wake_up_q(wake_q)
        return 0
    return _queue_reader(sem, state)


def _queue_reader(sem: RwSemaphore, state: int) -> int:
    adjustment = -RWSEM_READER_BIAS
    wake_q: list[TaskStruct] = []
    spin_lock(sem.wait_lock)
    if not sem.wait_list:
        # ACQUIRE: pairs with the release of the writer's up_write(), if that is who was in the way.
        if not smp_load_acquire(sem, "count") & RWSEM_WRITER_LOCKED:
            # Whoever was in the way is gone, and our share is in the word: we have the lock.
            spin_unlock(sem.wait_lock)
            return 0
        adjustment += RWSEM_FLAG_WAITERS
    waiter = add_waiter(sem, WAITING_FOR_READ)
    # From here we only wait. Whoever could have woken us may have let go while our share kept the word busy:
    # wake for them.
    count = rmw(sem, "count", lambda old: old + adjustment) + adjustment
    cond_wake_waiter(sem, count, wake_q)
    spin_unlock(sem.wait_lock)
    wake_up_q(wake_q)
    while True:
        # The store and barrier pair with the full barrier of wake_up_process(): either it sees us asleep or
        # we see `task` cleared.
        set_current_state(state)
        # ACQUIRE: pairs with the release in rwsem_mark_wake(), and so with everything before the waker's
        # wake.
        if smp_load_acquire(waiter, "task") is None:
            break
        if signal_pending_state(state):
            spin_lock(sem.wait_lock)
            if waiter.task is not None:
                return give_up(sem, waiter)
            spin_unlock(sem.wait_lock)  # granted at the last moment: it is ours
            break
        schedule()
    WRITE_ONCE(current(), "state", TASK_RUNNING)
    return 0


# ------------------------------------------------------------------------------------------------ writers


def down_write(sem: RwSemaphore) -> None:
    """Take the lock for writing. ACQUIRE: pairs with the releases of up_read() and up_write()."""
    might_sleep()
    if rmw(sem, "count", _lock_if_unlocked, "acquire"):
        _down_write_slowpath(sem, TASK_UNINTERRUPTIBLE)
    lock_acquire(sem, "write")


def down_write_killable(sem: RwSemaphore) -> int:
    """down_write that a fatal signal ends: 0, or -EINTR without the lock."""
    might_sleep()
    if rmw(sem, "count", _lock_if_unlocked, "acquire") and _down_write_slowpath(sem, TASK_KILLABLE):
        return -EINTR
    lock_acquire(sem, "write")
    return 0


def down_write_trylock(sem: RwSemaphore) -> bool:
    """Take the lock for writing if nobody holds it or waits."""
    if rmw(sem, "count", _lock_if_unlocked, "acquire"):
        return False
    lock_acquire(sem, "write")
    return True


def up_write(sem: RwSemaphore) -> None:
    """Release the write hold. RELEASE: pairs with the acquires of whoever gets it next."""
    lock_release(sem)
    if rmw(sem, "count", _sub_writer, "release") & RWSEM_FLAG_WAITERS:
        rwsem_wake(sem)


def downgrade_write(sem: RwSemaphore) -> None:
    """Turn the write hold into a read hold in one step, so that no writer gets between, and let waiting
    readers in.
    """
    lockdep_assert_held_write(sem)
    lock_downgrade(sem)
    # RELEASE: the readers who come in see what was written.
    if rmw(sem, "count", _writer_to_reader, "release") & RWSEM_FLAG_WAITERS:
        wake_q: list[TaskStruct] = []
        spin_lock(sem.wait_lock)
        if sem.wait_list:
            rwsem_mark_wake(sem, WAKE_READ_OWNED, wake_q)
        spin_unlock(sem.wait_lock)
        wake_up_q(wake_q)


def _down_write_slowpath(sem: RwSemaphore, state: int) -> int:
    """Queue for the lock and take it; 0 or -EINTR."""
    _assert_not_held(sem)
    wake_q: list[TaskStruct] = []
    spin_lock(sem.wait_lock)
    waiter = add_waiter(sem, WAITING_FOR_WRITE)
    if sem.wait_list[0] is waiter:
        rmw(sem, "count", _set_waiters, "relaxed")
    else:
        cond_wake_waiter(sem, READ_ONCE(sem, "count"), wake_q)
    while True:
        # The state is set before the attempt: a wake-up after a failed one finds us asleep, or makes
        # schedule() return at once.
        set_current_state(state)
        if try_write_lock(sem, waiter):
            break
        spin_unlock(sem.wait_lock)
        wake_up_q(wake_q)
        if signal_pending_state(state):
            spin_lock(sem.wait_lock)
            return give_up(sem, waiter)
        schedule()
        spin_lock(sem.wait_lock)
    WRITE_ONCE(current(), "state", TASK_RUNNING)
    spin_unlock(sem.wait_lock)
    wake_up_q(wake_q)
    return 0


# ------------------------------------------------------------------------------------------------ questions


def rwsem_is_locked(sem: RwSemaphore) -> bool:
    """Whether anybody holds the lock or waits for it, at some moment."""
    return bool(READ_ONCE(sem, "count"))


def rwsem_is_contended(sem: RwSemaphore) -> bool:
    """Whether anybody waits for the lock, at some moment."""
    return bool(READ_ONCE(sem, "count") & RWSEM_FLAG_WAITERS)


def rwsem_assert_held(sem: RwSemaphore) -> None:
    """LockingBug unless current holds the lock."""
    lockdep_assert_held(sem)


def rwsem_assert_held_write(sem: RwSemaphore) -> None:
    """LockingBug unless current holds the lock for writing."""
    lockdep_assert_held_write(sem)


def _assert_not_writer(sem: RwSemaphore) -> None:
    if lock_is_held(sem, "write"):
        raise LockingBug(f"{current()!r} takes {sem!r} again while it holds it for writing")


def _assert_not_held(sem: RwSemaphore) -> None:
    if lock_is_held(sem):
        raise LockingBug(f"{current()!r} takes {sem!r} for writing while it holds it")
