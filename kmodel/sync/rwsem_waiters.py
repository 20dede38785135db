"""The wait list of a rw_semaphore: who waits, who is let in next, and how to leave.

Models:      kernel/locking/rwsem.c, rwsem_mark_wake / rwsem_try_write_lock / rwsem_del_wake_waiter (7.2)
Guards:      everything here is called with wait_lock held, but wake_up_q() and rwsem_wake()
Invariants:  R2, R3 and R4 of rwsem.py
Leaves out:  see rwsem.py
Read next:   rwsem.py, the operations

Readers are granted the lock by whoever wakes them: their shares are in the count before they run. A writer is
only woken, stays on the list and competes; handoff is what makes it win in the end.
"""

from errno import EINTR
from typing import Any, Final

from kmodel.core import (
    NO_STORE,
    TASK_RUNNING,
    WRITE_ONCE,
    KernelBug,
    Struct,
    TaskStruct,
    atomic,
    current,
    embedded,
    engine,
    guards,
    kernel_struct,
    raw_get,
    rmw,
    smp_store_release,
    untraced,
    wake_up_process,
)
from kmodel.sync.spinlock import SpinLock, spin_lock, spin_unlock

RWSEM_WRITER_LOCKED: Final = 1 << 0
RWSEM_FLAG_WAITERS: Final = 1 << 1
RWSEM_FLAG_HANDOFF: Final = 1 << 2
RWSEM_READER_SHIFT: Final = 8
RWSEM_READER_BIAS: Final = 1 << RWSEM_READER_SHIFT
READER_MASK: Final = ~(RWSEM_READER_BIAS - 1)
LOCK_MASK: Final = RWSEM_WRITER_LOCKED | READER_MASK
READ_FAILED_MASK: Final = RWSEM_WRITER_LOCKED | RWSEM_FLAG_WAITERS | RWSEM_FLAG_HANDOFF
RELEASED_MASK: Final = LOCK_MASK | RWSEM_FLAG_WAITERS

RWSEM_WAIT_TIMEOUT: Final = 0.004
MAX_READERS_WAKEUP: Final = 256

WAITING_FOR_READ: Final = "read"
WAITING_FOR_WRITE: Final = "write"

# What a waker wants: anybody; readers, and readers hold the lock; readers, and it is a reader itself.
WAKE_ANY: Final = 0
WAKE_READERS: Final = 1
WAKE_READ_OWNED: Final = 2

_HANDOFF = guards.register(
    "no-rwsem-handoff", "R3: a stream of readers steals the lock from a waiting writer again and again"
)


@kernel_struct
class RwsemWaiter(Struct):
    """struct rwsem_waiter: one task on a wait list.

    `task` set to None by the waker means: you have the lock.
    """

    task: TaskStruct | None = None
    type: str = untraced(default=WAITING_FOR_READ)
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


def _add_reader(old: int) -> int:
    return old + RWSEM_READER_BIAS


def _clear_flags(old: int) -> int:
    return old & ~(RWSEM_FLAG_WAITERS | RWSEM_FLAG_HANDOFF)


def try_write_lock(sem: RwSemaphore, waiter: RwsemWaiter) -> bool:
    """Take the lock for the waiting writer `waiter`, or ask for a handoff if it has waited long enough.

    Under wait_lock.
    """
    first = sem.wait_list[0]
    impatient = _impatient(waiter)
    alone = len(sem.wait_list) == 1

    def update(old: int) -> Any:
        if old & RWSEM_FLAG_HANDOFF and first.handoff_set and waiter is not first:
            return NO_STORE  # R3
        if old & LOCK_MASK:
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


def add_waiter(sem: RwSemaphore, type_: str) -> RwsemWaiter:
    """Queue current last, for WAITING_FOR_READ or WAITING_FOR_WRITE."""
    waiter = RwsemWaiter(task=current(), type=type_, timeout=engine().now() + RWSEM_WAIT_TIMEOUT)
    sem.wait_list.append(waiter)
    return waiter


def _impatient(waiter: RwsemWaiter) -> bool:
    if _HANDOFF in guards.removed:
        return False
    return bool(engine().now() > waiter.timeout or (waiter.task is not None and waiter.task.local.get("rt")))


def give_up(sem: RwSemaphore, waiter: RwsemWaiter) -> int:
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
        rwsem_mark_wake(sem, WAKE_ANY, wake_q)
    spin_unlock(sem.wait_lock)
    wake_up_q(wake_q)
    return -EINTR


def cond_wake_waiter(sem: RwSemaphore, count: int, wake_q: list[TaskStruct]) -> None:
    """Let in whom the new value `count` of the word allows."""
    if count & RWSEM_WRITER_LOCKED:
        return  # its up_write() will wake
    rwsem_mark_wake(sem, WAKE_READERS if count & READER_MASK else WAKE_ANY, wake_q)


def rwsem_wake(sem: RwSemaphore) -> None:
    """The lock was released with the waiters bit set: let in whoever is next. Takes wait_lock."""
    wake_q: list[TaskStruct] = []
    spin_lock(sem.wait_lock)
    if sem.wait_list:
        rwsem_mark_wake(sem, WAKE_ANY, wake_q)
    spin_unlock(sem.wait_lock)
    wake_up_q(wake_q)


def rwsem_mark_wake(sem: RwSemaphore, wake_type: int, wake_q: list[TaskStruct]) -> None:
    """Grant the lock to waiting readers, or put the first writer on `wake_q` to try for itself."""
    first = sem.wait_list[0]
    if first.type is WAITING_FOR_WRITE:
        # A writer stays on the list and competes when it runs; waking it while readers hold the lock would be
        # in vain.
        if wake_type == WAKE_ANY and first.task is not None:
            wake_q.append(first.task)
        return
    granted = 0
    if wake_type != WAKE_READ_OWNED:
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
    readers = [waiter for waiter in sem.wait_list if waiter.type is WAITING_FOR_READ][:MAX_READERS_WAKEUP]
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


def wake_up_q(wake_q: list[TaskStruct]) -> None:
    """Wake what was marked, outside wait_lock."""
    for task in wake_q:
        wake_up_process(task)
    wake_q.clear()


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
