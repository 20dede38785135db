"""mutex: one holder, sleeping waiters, and no starvation of the first of them.

Models:      include/linux/mutex.h, kernel/locking/mutex.c (7.2)
Guards:      `owner` by read-modify-write; `wait_list` by `wait_lock`
Invariants:  X1 one holder, X2 only the holder unlocks, X3 once the first waiter has asked for a handoff
             nobody else gets the lock, X4 the waiters flag is set exactly while somebody waits (wait_lock
             free)
Leaves out:  optimistic spinning on a running owner (stubbed), wound/wait mutexes, debugging fields
Read next:   percpu_rwsem.py

The owner word is the holder's task with three flags in the low bits of the pointer. Here it is None (free), a
task, or a pair (task or None, flags); the two fast paths are one read-modify-write between None and a task.
Flags: WAITERS, somebody waits and unlock must look; HANDOFF, the first waiter has been woken once in vain and
wants the lock given, not released; PICKUP, unlock has given it, and only the task in the word may take it.
"""

from errno import EINTR
from typing import Any, Final

from kmodel.core import (
    NO_STORE,
    READ_ONCE,
    TASK_KILLABLE,
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
    WRITE_ONCE,
    KernelBug,
    LockingBug,
    Struct,
    TaskStruct,
    atomic,
    current,
    embedded,
    guards,
    kernel_struct,
    lock_acquire,
    lock_release,
    might_sleep,
    raw_get,
    rmw,
    schedule,
    set_current_state,
    untraced,
    wake_up_process,
)
from kmodel.sync.signal import signal_pending_state
from kmodel.sync.spinlock import SpinLock, spin_lock, spin_unlock

MUTEX_FLAG_WAITERS: Final = 1
MUTEX_FLAG_HANDOFF: Final = 2
MUTEX_FLAG_PICKUP: Final = 4

_HANDOFF = guards.register(
    "no-mutex-handoff", "X3: tasks that come and go steal the lock from its first waiter again and again"
)


@kernel_struct
class Mutex(Struct):
    """struct mutex."""

    owner: Any = atomic(default=None)
    wait_lock: SpinLock = embedded(factory=SpinLock)
    # Under wait_lock.
    wait_list: list[TaskStruct] = untraced(factory=list, init=False)


def _split(word: Any) -> tuple[TaskStruct | None, int]:
    return word if type(word) is tuple else (word, 0)


def _word(task: TaskStruct | None, flags: int) -> Any:
    return (task, flags) if flags else task


def mutex_lock(lock: Mutex) -> None:
    """Take the mutex. ACQUIRE: pairs with the release in mutex_unlock()."""
    _lock(lock, TASK_UNINTERRUPTIBLE)


def mutex_lock_killable(lock: Mutex) -> int:
    """mutex_lock that a fatal signal ends: 0, or -EINTR without the mutex."""
    return _lock(lock, TASK_KILLABLE)


def mutex_trylock(lock: Mutex) -> bool:
    """Take the mutex if it is free."""
    if not _trylock(lock, current(), False):
        return False
    lock_acquire(lock)
    return True


def mutex_unlock(lock: Mutex) -> None:
    """Release the mutex, or give it to the first waiter if it asked.

    RELEASE: pairs with the acquires of mutex_lock().
    """
    lock_release(lock)
    me = current()
    if rmw(lock, "owner", lambda old: None if old is me else NO_STORE, "release") is not me:
        _unlock_slowpath(lock, me)


def mutex_is_locked(lock: Mutex) -> bool:
    """Whether somebody holds the mutex, at some moment."""
    return _split(READ_ONCE(lock, "owner"))[0] is not None


def _lock(lock: Mutex, state: int) -> int:
    might_sleep()
    me = current()
    if rmw(lock, "owner", lambda old: me if old is None else NO_STORE, "acquire") is not None:
        if _lock_slowpath(lock, me, state):
            return -EINTR
    lock_acquire(lock)
    return 0


def _trylock(lock: Mutex, me: TaskStruct, handoff: bool) -> bool:
    """Take the mutex if it is free or was given to `me`; else, if `handoff`, ask its holder to give it."""

    def update(old: Any) -> Any:
        owner, flags = _split(old)
        if owner is None:
            return _word(me, flags)
        if owner is me and flags & MUTEX_FLAG_PICKUP:
            return _word(me, flags & ~MUTEX_FLAG_PICKUP)
        if handoff and not flags & (MUTEX_FLAG_HANDOFF | MUTEX_FLAG_PICKUP):
            return _word(owner, flags | MUTEX_FLAG_HANDOFF)
        return NO_STORE

    owner, flags = _split(rmw(lock, "owner", update, "acquire"))
    return owner is None or (owner is me and bool(flags & MUTEX_FLAG_PICKUP))


def _lock_slowpath(lock: Mutex, me: TaskStruct, state: int) -> int:
    if _split(raw_get(lock, "owner"))[0] is me and any(held is lock for held, _ in me.held_locks):
        raise LockingBug(f"{me!r} takes {lock!r} again while it holds it")
    spin_lock(lock.wait_lock)
    lock.wait_list.append(me)
    if lock.wait_list[0] is me:
        rmw(lock, "owner", lambda old: _word(_split(old)[0], _split(old)[1] | MUTEX_FLAG_WAITERS), "relaxed")
    ret, woken = 0, False
    while True:
        # Asleep before the attempt: an unlock after a failed attempt finds us so, or makes schedule() return
        # at once.
        set_current_state(state)
        if _trylock(lock, me, woken and lock.wait_list[0] is me and _HANDOFF not in guards.removed):
            break
        if signal_pending_state(state):
            ret = -EINTR
            break
        spin_unlock(lock.wait_lock)
        schedule()
        woken = True
        spin_lock(lock.wait_lock)
    WRITE_ONCE(current(), "state", TASK_RUNNING)
    lock.wait_list.remove(me)
    if not lock.wait_list:
        rmw(lock, "owner", lambda old: _split(old)[0], "relaxed")
    spin_unlock(lock.wait_lock)
    return ret


def _unlock_slowpath(lock: Mutex, me: TaskStruct) -> None:
    def update(old: Any) -> Any:
        owner, flags = _split(old)
        # With a handoff wanted the mutex is not let go here: nobody may get between us and the first waiter
        # (X3).
        return NO_STORE if owner is not me or flags & MUTEX_FLAG_HANDOFF else _word(None, flags)

    owner, flags = _split(rmw(lock, "owner", update, "release"))
    if owner is not me:
        raise LockingBug(f"{me!r} unlocks {lock!r}, whose owner is {owner!r}")
    if not flags:
        return
    first: TaskStruct | None = None
    spin_lock(lock.wait_lock)
    if lock.wait_list:
        first = lock.wait_list[0]
    if flags & MUTEX_FLAG_HANDOFF:
        _handoff(lock, first)
    spin_unlock(lock.wait_lock)
    if first is not None:
        wake_up_process(first)


def _handoff(lock: Mutex, to: TaskStruct | None) -> None:
    """Give the mutex to `to`, or free it if the one who asked has gone (-EINTR).

    RELEASE: as in mutex_unlock().
    """
    pickup = MUTEX_FLAG_PICKUP if to is not None else 0
    rmw(lock, "owner", lambda old: _word(to, _split(old)[1] & MUTEX_FLAG_WAITERS | pickup), "release")


def check_invariants(lock: Mutex) -> None:
    """KernelBug unless X1 and X4 hold.

    Nobody may be inside an operation on `lock` (holders and sleepers are fine).
    """
    _owner, flags = _split(raw_get(lock, "owner"))
    if bool(flags & MUTEX_FLAG_WAITERS) != bool(lock.wait_list):
        raise KernelBug(f"X4: {lock!r}: flags {flags}, {len(lock.wait_list)} waiting")
