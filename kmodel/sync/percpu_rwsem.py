"""percpu_rw_semaphore: readers touch only their own CPU's counter; writers pay for it.

Models:      include/linux/percpu-rwsem.h, kernel/locking/percpu-rwsem.c (7.2)
Guards:      `block` by read-modify-write; `waiters` by its own lock; the counters belong to their CPUs
Invariants:  B1 never a writer and a reader, B2 one writer, B3 the sum of the counters is the number of
             readers inside (when no reader is on its way in or out), whatever CPUs they came and left on
Leaves out:  freezable waits; interrupts
Read next:   rcuwait.py for the writer's sleep, rcu_sync.py for the switch between the two ways in

Fast way in, while the rcu_sync is idle: count++ inside an RCU section, no barrier, no shared cache line. Slow
way in:

    reader                                        writer
      count++                                       block = 1  (xchg, a full barrier)   D
      smp_mb                  A                     sum of the counts == 0?
      block == 0? inside                            smp_mb                              C
                                                    inside
      ... section ...
      smp_mb                  B
      count--; wake the writer

A pairs with D: either the reader sees `block` or the writer sees the count; both may see the other, and then
the reader backs out. B pairs with C: a writer that sees the count gone sees everything the reader did. A fast
reader has no A; the writer's grace period in rcu_sync_enter() stands in for it. (The writer's rcuwait has a
full barrier between the exchange and the sum too, so here the lack of D alone breaks nothing.)
"""

from typing import Any

from kmodel.core import (
    READ_ONCE,
    TASK_NORMAL,
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
    WRITE_ONCE,
    KernelBug,
    LockingBug,
    PerCpu,
    Pooled,
    Struct,
    alloc_percpu,
    atomic,
    current,
    embedded,
    for_each_possible_cpu,
    guards,
    kernel_struct,
    lock_acquire,
    lock_is_held,
    lock_release,
    might_sleep,
    raw_get,
    schedule,
    set_current_state,
    smp_load_acquire,
    smp_mb,
    smp_store_release,
    this_cpu_dec,
    this_cpu_inc,
    untraced,
    wake_up_process,
    xchg,
    xchg_relaxed,
)
from kmodel.sync import rcu_sync
from kmodel.sync.rcu_sync import RcuSync, rcu_sync_enter, rcu_sync_exit, rcu_sync_is_idle
from kmodel.sync.rcuwait import Rcuwait, rcuwait_wait_event, rcuwait_wake_up
from kmodel.sync.spinlock import spin_lock, spin_unlock
from kmodel.sync.wait import (
    WaitQueueEntry,
    WaitQueueHead,
    __add_wait_queue_entry_tail,
    __remove_wait_queue,
    __wake_up,
)

_MB_A = guards.register(
    "no-percpu-rwsem-mb-a", "H71: the reader looks at `block` before its count is visible"
)
_MB_B = guards.register("no-percpu-rwsem-mb-b", "B1: the count is gone before the reader's section is over")
_MB_C = guards.register(
    "no-percpu-rwsem-mb-c", "B1: the writer's section starts before the last reader's is seen to be over"
)
_MB_D = guards.register("no-percpu-rwsem-mb-d", "H71: the writer sums the counts before `block` is visible")


@kernel_struct
class PercpuReadCount(Struct):
    """One CPU's share of the readers; only the sum over all CPUs means anything."""

    read_count: int = atomic(default=0)


@kernel_struct
class PercpuRwSemaphore(Pooled):
    """struct percpu_rw_semaphore."""

    rss: RcuSync = embedded(factory=RcuSync)
    read_count: PerCpu = untraced(factory=lambda: alloc_percpu(PercpuReadCount), init=False)
    writer: Rcuwait = embedded(factory=Rcuwait)
    waiters: WaitQueueHead = embedded(factory=WaitQueueHead)
    block: int = atomic(default=0)


@kernel_struct
class _Waiter(WaitQueueEntry):
    """A reader or writer on `waiters`; `private` set to None by the waker means: you have the lock."""

    sem: Any = untraced(default=None)
    reader: bool = untraced(default=False)


# ------------------------------------------------------------------------------------------------ readers


def percpu_down_read(sem: PercpuRwSemaphore) -> None:
    """Take the lock for reading."""
    might_sleep()
    if not _fast_inc(sem) and not _down_read_trylock(sem):
        _percpu_rwsem_wait(sem, reader=True)
    lock_acquire(sem, "read")


def percpu_down_read_trylock(sem: PercpuRwSemaphore) -> bool:
    """Take the lock for reading if no writer holds it or waits."""
    if not _fast_inc(sem) and not _down_read_trylock(sem):
        return False
    lock_acquire(sem, "read")
    return True


def percpu_up_read(sem: PercpuRwSemaphore) -> None:
    """Release a read hold."""
    lock_release(sem)
    enter, leave = rcu_sync.read_lock, rcu_sync.read_unlock
    if enter is not None and leave is not None:
        enter()
        idle = rcu_sync_is_idle(sem.rss)
        if idle:
            this_cpu_dec(sem.read_count, "read_count")
        leave()
        if idle:
            return
    # Barrier B: the section before the count; pairs with C in _readers_active_check().
    if _MB_B not in guards.removed:
        smp_mb()
    this_cpu_dec(sem.read_count, "read_count")
    rcuwait_wake_up(sem.writer)


def _fast_inc(sem: PercpuRwSemaphore) -> bool:
    """The fast way in: the RCU section makes look and count one step for the writer's grace period."""
    enter, leave = rcu_sync.read_lock, rcu_sync.read_unlock
    if enter is None or leave is None:
        return False
    enter()
    idle = rcu_sync_is_idle(sem.rss)
    if idle:
        this_cpu_inc(sem.read_count, "read_count")
    leave()
    return idle


def _down_read_trylock(sem: PercpuRwSemaphore) -> bool:
    this_cpu_inc(sem.read_count, "read_count")
    # Barrier A: the count before the look at `block`; pairs with D in _down_write_trylock().
    if _MB_A not in guards.removed:
        smp_mb()
    # ACQUIRE: pairs with the release in percpu_up_write().
    if not smp_load_acquire(sem, "block"):
        return True
    this_cpu_dec(sem.read_count, "read_count")
    rcuwait_wake_up(sem.writer)  # it may have seen the count that was just taken back
    return False


# ------------------------------------------------------------------------------------------------ writers


def percpu_down_write(sem: PercpuRwSemaphore) -> None:
    """Take the lock for writing: up to a grace period, then until the readers inside have left."""
    might_sleep()
    if lock_is_held(sem):
        raise LockingBug(f"{current()!r} takes {sem!r} for writing while it holds it")
    rcu_sync_enter(sem.rss)  # from here readers take the slow way
    if not _down_write_trylock(sem):
        _percpu_rwsem_wait(sem, reader=False)
    rcuwait_wait_event(sem.writer, lambda: _readers_active_check(sem), TASK_UNINTERRUPTIBLE)
    lock_acquire(sem, "write")


def percpu_up_write(sem: PercpuRwSemaphore) -> None:
    """Release the write hold: to the waiters in order of arrival, readers until the next writer; fast readers
    come later.
    """
    lock_release(sem)
    # RELEASE: pairs with the acquire of a reader that finds `block` clear, and with the xchg of the next
    # writer.
    smp_store_release(sem, "block", 0)
    __wake_up(sem.waiters, TASK_NORMAL, 1)
    rcu_sync_exit(sem.rss)


def _down_write_trylock(sem: PercpuRwSemaphore) -> bool:
    if READ_ONCE(sem, "block"):
        return False
    # Barrier D is the full barrier of the exchange: `block` before the sum; pairs with A in
    # _down_read_trylock().
    exchange = xchg_relaxed if _MB_D in guards.removed else xchg
    return bool(exchange(sem, "block", 1) == 0)


def _readers_active_check(sem: PercpuRwSemaphore) -> bool:
    """Whether every reader has left."""
    if sum(READ_ONCE(cpu, "read_count") for cpu in for_each_possible_cpu(sem.read_count)):
        return False
    # Barrier C: the sum before the section; pairs with B in percpu_up_read().
    if _MB_C not in guards.removed:
        smp_mb()
    return True


# ------------------------------------------------------------------------------------------------ waiting


def _trylock(sem: PercpuRwSemaphore, reader: bool) -> bool:
    return _down_read_trylock(sem) if reader else _down_write_trylock(sem)


def _percpu_rwsem_wait(sem: PercpuRwSemaphore, *, reader: bool) -> None:
    """Queue until a waker has taken the lock for us."""
    entry = _Waiter(private=current(), exclusive=True, func=_wake_function, sem=sem, reader=reader)
    spin_lock(sem.waiters.lock)
    # Again under the lock, or the last percpu_up_write() could find the queue empty before we are on it.
    wait = not _trylock(sem, reader)
    if wait:
        __add_wait_queue_entry_tail(sem.waiters, entry)
    spin_unlock(sem.waiters.lock)
    while wait:
        set_current_state(TASK_UNINTERRUPTIBLE)
        # ACQUIRE: pairs with the release in _wake_function().
        if smp_load_acquire(entry, "private") is None:
            break
        schedule()
    WRITE_ONCE(current(), "state", TASK_RUNNING)


def _wake_function(entry: WaitQueueEntry, _mode: int) -> int:
    """Take the lock for the waiter (on the waker's CPU: only the sum counts) and wake it.

    Stop after a writer or a failure.
    """
    assert isinstance(entry, _Waiter)
    if not _trylock(entry.sem, entry.reader):
        return 1  # somebody was quicker; whoever it is will wake again
    task = entry.private
    assert task is not None
    __remove_wait_queue(entry.sem.waiters, entry)
    smp_store_release(entry, "private", None)
    wake_up_process(task)
    return 0 if entry.reader else 1


def percpu_is_write_locked(sem: PercpuRwSemaphore) -> bool:
    """Whether a writer holds the lock or is about to, at some moment."""
    return bool(READ_ONCE(sem, "block"))


def percpu_is_read_locked(sem: PercpuRwSemaphore) -> bool:
    """Whether readers hold the lock, at some moment."""
    counts = sum(READ_ONCE(cpu, "read_count") for cpu in for_each_possible_cpu(sem.read_count))
    return counts != 0 and not READ_ONCE(sem, "block")


def check_invariants(sem: PercpuRwSemaphore) -> None:
    """KernelBug unless the counts make sense. Nobody may be inside an operation on `sem`."""
    readers = sum(raw_get(cpu, "read_count") for cpu in for_each_possible_cpu(sem.read_count))
    block = raw_get(sem, "block")
    if readers < 0 or (readers and block) or block not in (0, 1):
        raise KernelBug(f"B1: {sem!r}: {readers} readers, block {block}")
    rcu_sync.check_invariants(sem.rss)
