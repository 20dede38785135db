"""Work items: functions to be called soon, by a kernel worker, where sleeping is allowed.

Models:      include/linux/workqueue.h, kernel/workqueue.c (7.2): the system workqueue
Guards:      the pending bit of an item by read-modify-write: who sets it owns the queueing; the lists by the
             pool's lock
Invariants:  K1 a queued item is on one list, once, K2 an item does not run beside itself, K3 a
             schedule_work() that returned False is covered by a run that starts after it, K4 the worker does
             not touch an item after its function has started
Leaves out:  named workqueues, per-CPU pools, ordering, concurrency management, cancellation's disable counts
             (changed: cancelling holds the pending bit, as kernels before 6.10 did)
Read next:   timer.py
"""

from collections.abc import Callable
from typing import Any, Final

import attrs

from kmodel.core import (
    KernelBug,
    LockingBug,
    Struct,
    TaskStruct,
    atomic,
    clear_bit,
    cpu_relax,
    current,
    embedded,
    engine,
    guards,
    initcall,
    kernel_struct,
    might_sleep,
    raw_get,
    reboot_notifier,
    smp_mb,
    smp_mb__before_atomic,
    smp_wmb,
    test_and_set_bit,
    test_bit,
    untraced,
)
from kmodel.sync.completion import Completion, complete, wait_for_completion
from kmodel.sync.spinlock import SpinLock, spin_lock, spin_unlock
from kmodel.sync.timer import TimerList, mod_timer, timer_delete

WORK_STRUCT_PENDING_BIT: Final = 0

_REENTRANCE = guards.register("no-workqueue-non-reentrance", "K2: two workers run one item at the same time")

WorkFunction = Callable[[Any], Any]


@kernel_struct
class WorkStruct(Struct):
    """struct work_struct. `func` gets the item; `container` is whatever it is a member of (container_of)."""

    func: WorkFunction = untraced()
    container: Any = untraced(default=None)
    data: int = atomic(default=0)


@attrs.define(eq=False)
class _Queued:
    """An item on a list, with the flushers that wait for this run of it (the kernel links barrier items
    behind it).
    """

    work: WorkStruct
    flushers: list[Completion] = attrs.Factory(list)


@attrs.define(eq=False)
class _Worker:
    """A worker while it is busy: what it runs, and the same item queued again meanwhile."""

    task: TaskStruct
    running: _Queued
    scheduled: list[_Queued] = attrs.Factory(list)


@kernel_struct
class WorkerPool(Struct):
    """struct worker_pool."""

    lock: SpinLock = embedded(factory=SpinLock)
    # Under lock.
    worklist: list[_Queued] = untraced(factory=list, init=False)
    busy: list[_Worker] = untraced(factory=list, init=False)
    # Whose workers these are. Those of a run that is over do not exist any more, and its items wait for ever.
    engine: Any = untraced(default=None, init=False)


_pool: WorkerPool


@initcall
def _workqueue_init() -> None:
    global _pool
    _pool = WorkerPool()


def work_pending(work: WorkStruct) -> bool:
    """Whether the item is queued and its run has not started, at some moment."""
    return test_bit(WORK_STRUCT_PENDING_BIT, work, "data")


def schedule_work(work: WorkStruct) -> bool:
    """Queue the item; False if it was queued already, and then the run to come covers this call too (K3)."""
    # The full barrier pairs with the one after the bit is cleared in _worker_turn(): either we see it clear
    # and queue, or the run sees everything we did before this call.
    if test_and_set_bit(WORK_STRUCT_PENDING_BIT, work, "data"):
        return False
    _insert_work(work)
    return True


def _insert_work(work: WorkStruct) -> None:
    pool, here = _pool, engine()
    spin_lock(pool.lock)
    if pool.engine is not here:
        pool.engine = here
        pool.worklist, pool.busy = [], []
    pool.worklist.append(_Queued(work))
    spin_unlock(pool.lock)
    here.run_later(_worker_turn, 0.0, "kworker")


def _worker_turn() -> None:
    """One worker, one item: the oldest on the list."""
    pool = _pool
    spin_lock(pool.lock)
    if not pool.worklist:  # its item was cancelled
        spin_unlock(pool.lock)
        return
    item = pool.worklist.pop(0)
    collision = _find_busy(pool, item.work)
    if collision is not None and _REENTRANCE not in guards.removed:
        collision.scheduled.append(item)  # K2: whoever runs it now runs it again
        spin_unlock(pool.lock)
        return
    worker = _Worker(current(), item)
    pool.busy.append(worker)
    failure: Exception | None = None
    while True:
        work, worker.running = item.work, item
        func = work.func
        smp_wmb()  # that it runs here, before that it may be queued again
        clear_bit(WORK_STRUCT_PENDING_BIT, work, "data")
        smp_mb()  # pairs with test_and_set_bit() in schedule_work(): K3
        spin_unlock(pool.lock)
        try:
            func(work)
        except Exception as error:  # noqa: BLE001  # flushers must not hang; raised below
            failure = error
        # K4: `work` may have been freed by its own function.
        spin_lock(pool.lock)
        for flusher in item.flushers:
            complete(flusher)
        if not worker.scheduled:
            break
        item = worker.scheduled.pop(0)
    pool.busy.remove(worker)
    spin_unlock(pool.lock)
    if failure is not None:
        raise failure


def _find_busy(pool: WorkerPool, work: WorkStruct) -> _Worker | None:
    for worker in pool.busy:
        if worker.running.work is work:
            return worker
    return None


def _find_queued(pool: WorkerPool, work: WorkStruct) -> tuple[list[_Queued], _Queued] | None:
    for queue in (pool.worklist, *(worker.scheduled for worker in pool.busy)):
        for item in queue:
            if item.work is work:
                return queue, item
    return None


def flush_work(work: WorkStruct) -> bool:
    """Wait until the last queueing of the item so far has run to its end; False if it was idle.

    An item that somebody else is just about to queue (pending, not on the list yet) counts as idle, as in the
    kernel.
    """
    might_sleep()
    pool = _pool
    spin_lock(pool.lock)
    queued = _find_queued(pool, work)
    worker = _find_busy(pool, work)
    item = queued[1] if queued is not None else worker.running if worker is not None else None
    if item is None:
        spin_unlock(pool.lock)
        return False
    if worker is not None and worker.task is current():
        spin_unlock(pool.lock)
        raise LockingBug(f"{work!r} is flushed by its own function, which would wait for itself")
    done = Completion()
    item.flushers.append(done)
    spin_unlock(pool.lock)
    wait_for_completion(done)
    return True


@reboot_notifier
def flush_scheduled_work() -> None:
    """Wait until every item queued so far has run to its end."""
    might_sleep()
    pool, waits = _pool, []
    if pool.engine is not engine():
        return
    spin_lock(pool.lock)
    items = [*pool.worklist]
    for worker in pool.busy:
        if worker.task is not current():
            items += [worker.running, *worker.scheduled]
    for item in items:
        waits.append(Completion())
        item.flushers.append(waits[-1])
    spin_unlock(pool.lock)
    for done in waits:
        wait_for_completion(done)


def cancel_work(work: WorkStruct) -> bool:
    """Take the item off its list; whether it was queued. Its function may be running, and go on."""
    was = _grab_pending(work, None)
    _let_go(work)
    return was


def cancel_work_sync(work: WorkStruct) -> bool:
    """Take the item off its list and wait for its function to end; whether it was queued.

    Meanwhile nobody can queue it, its own function included: the pending bit is held.
    """
    might_sleep()
    was = _grab_pending(work, None)
    flush_work(work)
    _let_go(work)
    return was


def _grab_pending(work: WorkStruct, timer: TimerList | None) -> bool:
    """Own the pending bit, by setting it (False) or by taking the item off a list or its timer (True)."""
    while True:
        if timer is not None and timer_delete(timer):
            return True
        if not test_and_set_bit(WORK_STRUCT_PENDING_BIT, work, "data"):
            return False
        spin_lock(_pool.lock)
        found = _find_queued(_pool, work)
        if found is not None:
            queue, item = found
            queue.remove(item)
            for flusher in item.flushers:
                complete(flusher)
        spin_unlock(_pool.lock)
        if found is not None:
            return True
        cpu_relax()  # somebody has set the bit and is about to queue it, or a worker is about to clear it


def _let_go(work: WorkStruct) -> None:
    smp_mb__before_atomic()  # everything the caller did, before the item can be queued again
    clear_bit(WORK_STRUCT_PENDING_BIT, work, "data")


# ----------------------------------------------------------------------------------------------- delayed work


def _queue_delayed(timer: TimerList) -> None:
    _insert_work(timer.container)


@kernel_struct
class DelayedWork(WorkStruct):
    """struct delayed_work: an item that a timer queues. Pending from the arming on."""

    timer: TimerList = embedded(factory=lambda: TimerList(function=_queue_delayed))


def schedule_delayed_work(dwork: DelayedWork, seconds: float) -> bool:
    """Queue the item in `seconds`; False if it is pending already."""
    if test_and_set_bit(WORK_STRUCT_PENDING_BIT, dwork, "data"):
        return False
    if seconds <= 0:
        _insert_work(dwork)
    else:
        dwork.timer.container = dwork
        mod_timer(dwork.timer, seconds)
    return True


def flush_delayed_work(dwork: DelayedWork) -> bool:
    """Queue the item now if its timer runs, and wait until it has run; False if it was idle."""
    if timer_delete(dwork.timer):
        _insert_work(dwork)
    return flush_work(dwork)


def cancel_delayed_work_sync(dwork: DelayedWork) -> bool:
    """cancel_work_sync, timer included."""
    might_sleep()
    was = _grab_pending(dwork, dwork.timer)
    flush_work(dwork)
    _let_go(dwork)
    return was


def check_invariants() -> None:
    """KernelBug unless the lists are sound.

    Nobody may be inside an operation (running functions are fine).
    """
    queued = [item.work for item in _pool.worklist]
    queued += [item.work for worker in _pool.busy for item in worker.scheduled]
    running = [worker.running.work for worker in _pool.busy]
    if len(set(map(id, queued))) != len(queued):
        raise KernelBug("K1: an item is queued twice")
    if len(set(map(id, running))) != len(running):
        raise KernelBug("K2: an item runs beside itself")
    if not all(raw_get(work, "data") & 1 << WORK_STRUCT_PENDING_BIT for work in queued):
        raise KernelBug("K1: a queued item is not marked pending")
