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
    engine,
    guards,
    kernel_struct,
    lock_acquire,
    lock_downgrade,
    lock_is_held,
    lock_release,
    lockdep_assert_held,
    lockdep_assert_held_write,
    might_sleep,
    raw_get,
    rmw,
    schedule,
    set_current_state,
    smp_load_acquire,
    smp_rmb,
    smp_store_release,
    untraced,
    wake_up_process,
)
from kmodel.sync.signal import signal_pending_state
from kmodel.sync.spinlock import SpinLock, spin_lock, spin_unlock

RWSEM_WRITER_LOCKED: Final = 1 << 0
RWSEM_FLAG_WAITERS: Final = 1 << 1
RWSEM_FLAG_HANDOFF: Final = 1 << 2
RWSEM_READER_SHIFT: Final = 8
RWSEM_READER_BIAS: Final = 1 << RWSEM_READER_SHIFT
_READER_MASK: Final = ~(RWSEM_READER_BIAS - 1)
_LOCK_MASK: Final = RWSEM_WRITER_LOCKED | _READER_MASK
_READ_FAILED_MASK: Final = RWSEM_WRITER_LOCKED | RWSEM_FLAG_WAITERS | RWSEM_FLAG_HANDOFF
_RELEASED_MASK: Final = _LOCK_MASK | RWSEM_FLAG_WAITERS

RWSEM_WAIT_TIMEOUT: Final = 0.004
MAX_READERS_WAKEUP: Final = 256

_FOR_READ: Final = "read"
_FOR_WRITE: Final = "write"

# What a waker wants: anybody; readers, and readers hold the lock; readers, and it is a reader itself.
_WAKE_ANY: Final = 0
_WAKE_READERS: Final = 1
_WAKE_READ_OWNED: Final = 2

_HANDOFF = guards.register(
    "no-rwsem-handoff", "R3: a stream of readers steals the lock from a waiting writer again and again"
)


@kernel_struct
class RwsemWaiter(Struct):
    """struct rwsem_waiter: one task on a wait list.

    `task` set to None by the waker means: you have the lock.
    """

    task: TaskStruct | None = None
    type: str = untraced(default=_FOR_READ)
    # Under wait_lock.
    timeout: float = untraced(default=0.0)
    handoff_set: bool = untraced(default=False)


@kernel_struct
class RwSemaphore(Struct):
    """struct rw_semaphore."""

    count: int = atomic(default=0)
    wait_lock: SpinLock = embedded(factory=SpinLock)
    # Under wait_lock; a plain list, because only lock holders look at it.
    wait_list: list[RwsemWaiter] = untraced(factory=list, init=False)


# ----------------------------------------------------------------------------------------- updates of `count`


def _add_reader(old: int) -> int:
    return old + RWSEM_READER_BIAS


def _sub_reader(old: int) -> int:
    return old - RWSEM_READER_BIAS


def _add_reader_if_unlocked(old: int) -> Any:
    return NO_STORE if old & _READ_FAILED_MASK else old + RWSEM_READER_BIAS


def _lock_if_unlocked(old: int) -> Any:
    return NO_STORE if old else RWSEM_WRITER_LOCKED


def _sub_writer(old: int) -> int:
    return old - RWSEM_WRITER_LOCKED


def _writer_to_reader(old: int) -> int:
    return old - RWSEM_WRITER_LOCKED + RWSEM_READER_BIAS


def _set_waiters(old: int) -> int:
    return old | RWSEM_FLAG_WAITERS


def _clear_flags(old: int) -> int:
    return old & ~(RWSEM_FLAG_WAITERS | RWSEM_FLAG_HANDOFF)


# ------------------------------------------------------------------------------------------------ readers


def down_read(sem: RwSemaphore) -> None:
    """Take the lock for reading. ACQUIRE: pairs with the releases of up_write() and downgrade_write()."""
    might_sleep()
    count = rmw(sem, "count", _add_reader, "acquire")
    if count & _READ_FAILED_MASK:
        _down_read_slowpath(sem, count + RWSEM_READER_BIAS, TASK_UNINTERRUPTIBLE)
    lock_acquire(sem, "read")


def down_read_killable(sem: RwSemaphore) -> int:
    """down_read that a fatal signal ends: 0, or -EINTR without the lock."""
    might_sleep()
    count = rmw(sem, "count", _add_reader, "acquire")
    if count & _READ_FAILED_MASK and _down_read_slowpath(sem, count + RWSEM_READER_BIAS, TASK_KILLABLE):
        return -EINTR
    lock_acquire(sem, "read")
    return 0


def down_read_trylock(sem: RwSemaphore) -> bool:
    """Take the lock for reading if no writer holds it and nobody waits."""
    if rmw(sem, "count", _add_reader_if_unlocked, "acquire") & _READ_FAILED_MASK:
        return False
    lock_acquire(sem, "read")
    return True


def up_read(sem: RwSemaphore) -> None:
    """Release a read hold. RELEASE: what was read stays before the next writer's changes."""
    lock_release(sem)
    count = rmw(sem, "count", _sub_reader, "release") - RWSEM_READER_BIAS
    if count < 0:
        raise LockingBug(f"{sem!r} is released for reading by {current()!r}, but no reader holds it")
    if count & _RELEASED_MASK == RWSEM_FLAG_WAITERS:
        _rwsem_wake(sem)  # the last one out


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
                _rwsem_mark_wake(sem, _WAKE_READ_OWNED, wake_q)  # readers in the list may come along
            spin_unlock(sem.wait_lock)
            _wake_up_q(wake_q)
        return 0
    return _queue_reader(sem, state)


def _queue_reader(sem: RwSemaphore, state: int) -> int:
    adjustment = -RWSEM_READER_BIAS
    wake_q: list[TaskStruct] = []
    spin_lock(sem.wait_lock)
    if not sem.wait_list:
        if not READ_ONCE(sem, "count") & RWSEM_WRITER_LOCKED:
            # Whoever was in the way is gone, and our share is in the word: we have the lock. ACQUIRE of the
            # control dependency, pairs with the release of the writer's up_write().
            smp_rmb()
            spin_unlock(sem.wait_lock)
            return 0
        adjustment += RWSEM_FLAG_WAITERS
    waiter = _add_waiter(sem, _FOR_READ)
    # From here we only wait. Whoever could have woken us may have let go while our share kept the word busy:
    # wake for them.
    count = rmw(sem, "count", lambda old: old + adjustment) + adjustment
    _cond_wake_waiter(sem, count, wake_q)
    spin_unlock(sem.wait_lock)
    _wake_up_q(wake_q)
    while True:
        # The store and barrier pair with the full barrier of wake_up_process(): either it sees us asleep or
        # we see `task` cleared.
        set_current_state(state)
        # ACQUIRE: pairs with the release in _rwsem_mark_wake(), and so with everything before the waker's
        # wake.
        if smp_load_acquire(waiter, "task") is None:
            break
        if signal_pending_state(state):
            spin_lock(sem.wait_lock)
            if waiter.task is not None:
                return _give_up(sem, waiter)
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
        _rwsem_wake(sem)


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
            _rwsem_mark_wake(sem, _WAKE_READ_OWNED, wake_q)
        spin_unlock(sem.wait_lock)
        _wake_up_q(wake_q)


def _down_write_slowpath(sem: RwSemaphore, state: int) -> int:
    """Queue for the lock and take it; 0 or -EINTR."""
    _assert_not_held(sem)
    wake_q: list[TaskStruct] = []
    spin_lock(sem.wait_lock)
    waiter = _add_waiter(sem, _FOR_WRITE)
    if sem.wait_list[0] is waiter:
        rmw(sem, "count", _set_waiters, "relaxed")
    else:
        _cond_wake_waiter(sem, READ_ONCE(sem, "count"), wake_q)
    while True:
        # The state is set before the attempt: a wake-up after a failed one finds us asleep, or makes
        # schedule() return at once.
        set_current_state(state)
        if _try_write_lock(sem, waiter):
            break
        spin_unlock(sem.wait_lock)
        _wake_up_q(wake_q)
        if signal_pending_state(state):
            spin_lock(sem.wait_lock)
            return _give_up(sem, waiter)
        schedule()
        spin_lock(sem.wait_lock)
    WRITE_ONCE(current(), "state", TASK_RUNNING)
    spin_unlock(sem.wait_lock)
    _wake_up_q(wake_q)
    return 0


def _try_write_lock(sem: RwSemaphore, waiter: RwsemWaiter) -> bool:
    """Take the lock for the waiting writer `waiter`, or ask for a handoff if it has waited long enough.

    Under wait_lock.
    """
    first = sem.wait_list[0]
    impatient = _impatient(waiter)
    alone = len(sem.wait_list) == 1

    def update(old: int) -> Any:
        if old & RWSEM_FLAG_HANDOFF and first.handoff_set and waiter is not first:
            return NO_STORE  # R3
        if old & _LOCK_MASK:
            return NO_STORE if old & RWSEM_FLAG_HANDOFF or not impatient else old | RWSEM_FLAG_HANDOFF
        new = (old | RWSEM_WRITER_LOCKED) & ~RWSEM_FLAG_HANDOFF
        return new & ~RWSEM_FLAG_WAITERS if alone else new

    old = rmw(sem, "count", update, "acquire")
    new = update(old)
    if new is NO_STORE:
        return False
    if new & RWSEM_FLAG_HANDOFF:
        first.handoff_set = True  # asked for by whoever was impatient, granted to whoever is first
        return False
    sem.wait_list.remove(waiter)
    return True


# ---------------------------------------------------------------------------- the wait list (under wait_lock)


def _add_waiter(sem: RwSemaphore, type_: str) -> RwsemWaiter:
    waiter = RwsemWaiter(task=current(), type=type_, timeout=engine().now() + RWSEM_WAIT_TIMEOUT)
    sem.wait_list.append(waiter)
    return waiter


def _impatient(waiter: RwsemWaiter) -> bool:
    if _HANDOFF in guards.removed:
        return False
    return bool(engine().now() > waiter.timeout or (waiter.task is not None and waiter.task.local.get("rt")))


def _give_up(sem: RwSemaphore, waiter: RwsemWaiter) -> int:
    """Leave the wait list after a signal, under wait_lock, which is released (R4)."""
    wake_q: list[TaskStruct] = []
    WRITE_ONCE(current(), "state", TASK_RUNNING)
    was_first = sem.wait_list[0] is waiter
    sem.wait_list.remove(waiter)
    if not sem.wait_list:
        rmw(sem, "count", _clear_flags, "relaxed")
    elif was_first:
        # The one behind us may have been kept out by us alone (a reader behind a writer, or behind our
        # handoff).
        _rwsem_mark_wake(sem, _WAKE_ANY, wake_q)
    spin_unlock(sem.wait_lock)
    _wake_up_q(wake_q)
    return -EINTR


def _cond_wake_waiter(sem: RwSemaphore, count: int, wake_q: list[TaskStruct]) -> None:
    if count & RWSEM_WRITER_LOCKED:
        return  # its up_write() will wake
    _rwsem_mark_wake(sem, _WAKE_READERS if count & _READER_MASK else _WAKE_ANY, wake_q)


def _rwsem_wake(sem: RwSemaphore) -> None:
    wake_q: list[TaskStruct] = []
    spin_lock(sem.wait_lock)
    if sem.wait_list:
        _rwsem_mark_wake(sem, _WAKE_ANY, wake_q)
    spin_unlock(sem.wait_lock)
    _wake_up_q(wake_q)


def _rwsem_mark_wake(sem: RwSemaphore, wake_type: int, wake_q: list[TaskStruct]) -> None:
    """Grant the lock to waiting readers, or put the first writer on `wake_q` to try for itself."""
    first = sem.wait_list[0]
    if first.type is _FOR_WRITE:
        # A writer stays on the list and competes when it runs; waking it while readers hold the lock would be
        # in vain.
        if wake_type == _WAKE_ANY and first.task is not None:
            wake_q.append(first.task)
        return
    granted = 0
    if wake_type != _WAKE_READ_OWNED:
        # Take a share before looking, so that a writer who comes now fails and one who came first is seen.
        granted = RWSEM_READER_BIAS
        if rmw(sem, "count", _add_reader) & RWSEM_WRITER_LOCKED:
            if _impatient(first):
                # The first reader has waited too long for writers who come and go: nobody may steal any more.
                first.handoff_set = True
            handoff = RWSEM_FLAG_HANDOFF if first.handoff_set else 0
            rmw(sem, "count", lambda old: (old - RWSEM_READER_BIAS) | handoff, "relaxed")
            return
    # All the waiting readers, also those behind a writer: readers share, so letting them in together delays
    # the writer least.
    readers = [waiter for waiter in sem.wait_list if waiter.type is _FOR_READ][:MAX_READERS_WAKEUP]
    for waiter in readers:
        sem.wait_list.remove(waiter)
    adjustment = len(readers) * RWSEM_READER_BIAS - granted
    clear = RWSEM_FLAG_HANDOFF if sem.wait_list else RWSEM_FLAG_HANDOFF | RWSEM_FLAG_WAITERS
    rmw(sem, "count", lambda old: (old + adjustment) & ~clear, "relaxed")
    for waiter in readers:
        task = waiter.task
        assert task is not None
        # RELEASE: pairs with the acquire in _queue_reader(). After it the waiter may be gone: the task was
        # read before.
        smp_store_release(waiter, "task", None)
        wake_q.append(task)


def _wake_up_q(wake_q: list[TaskStruct]) -> None:
    """Wake what was marked, outside wait_lock."""
    for task in wake_q:
        wake_up_process(task)
    wake_q.clear()


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


def check_invariants(sem: RwSemaphore) -> None:
    """KernelBug unless R1 to R3 hold.

    Nobody may be inside an operation on `sem` (holders and sleepers are fine).
    """
    count, waiting = raw_get(sem, "count"), len(sem.wait_list)
    readers = count >> RWSEM_READER_SHIFT
    broken = []
    if count & RWSEM_WRITER_LOCKED and readers:
        broken.append("R1: a writer and readers hold it")
    if bool(count & RWSEM_FLAG_WAITERS) != bool(waiting):
        broken.append("R2: the waiters bit does not match the wait list")
    if count & RWSEM_FLAG_HANDOFF and not waiting:
        broken.append("R3: handoff with nobody waiting")
    if count < 0 or count & 0xF8:
        broken.append("bits that nobody sets")
    if broken:
        raise KernelBug(f"{sem!r}: count {count:#x}, {waiting} waiting: {'; '.join(broken)}")
