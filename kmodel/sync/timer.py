"""timer_list: a function to be called once, later, in a context that may not sleep.

Models:      include/linux/timer.h, kernel/time/timer.c (7.2)
Guards:      a timer belongs to a base, whose lock guards `pending`, `expires` and what runs
Invariants:  T1 a timer's function does not run beside itself, T2 one arming leads to one call, unless deleted
             or re-armed first, T3 when timer_delete_sync() returns, the function is not running and (nobody
             else arming it) will not
Leaves out:  the wheel (the engine keeps the queue), slack and rounding (exact times), migration between bases
Read next:   workqueue.py, for what must sleep

Functions run with preemption disabled, as in a softirq: might_sleep() objects. A timer whose owner may go
away must be deleted with timer_delete_sync() first; to arm it again and again from its own function is fine,
the loop in there takes care of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    LockingBug,
    PerCpu,
    Struct,
    alloc_percpu,
    current,
    embedded,
    engine,
    guards,
    initcall,
    kernel_struct,
    smp_cond_load_acquire,
    smp_store_release,
    this_cpu_ptr,
    untraced,
)
from kmodel.sync.spinlock import SpinLock, spin_lock, spin_unlock

_SYNC = guards.register(
    "no-timer-delete-sync-wait", "T3: the owner goes away while the timer's function still uses it (H61)"
)

TimerFunction = Callable[["TimerList"], Any]


@kernel_struct
class TimerBase(Struct):
    """struct timer_base: one CPU's timers."""

    lock: SpinLock = embedded(factory=SpinLock)
    # write: lock; read: lock, or an acquire load to wait for a timer's function to end
    running: tuple["TimerList", ...] = ()
    # Under lock: due, but their function still runs.
    deferred: list["TimerList"] = untraced(factory=list, init=False)


_bases: PerCpu


@initcall
def _timers_init() -> None:
    global _bases
    _bases = alloc_percpu(TimerBase)


def _this_base() -> TimerBase:
    return this_cpu_ptr(_bases)  # type: ignore[no-any-return]


@kernel_struct
class TimerList(Struct):
    """struct timer_list.

    `function` gets the timer; `container` is whatever it is a member of (container_of).
    """

    function: TimerFunction | None = untraced(default=None)
    container: Any = untraced(default=None)
    base: TimerBase = untraced(factory=_this_base, init=False)
    # write: base.lock; read: base.lock, or READ_ONCE in timer_pending()
    pending: bool = False
    # Under base.lock.
    expires: float = untraced(default=0.0, init=False)
    scheduled: float | None = untraced(default=None, init=False)


def timer_setup(timer: TimerList, function: TimerFunction) -> None:
    """Prepare a timer that is not armed."""
    timer.function = function


def timer_pending(timer: TimerList) -> bool:
    """Whether the timer is armed and not due yet, at some moment."""
    return bool(READ_ONCE(timer, "pending"))


def mod_timer(timer: TimerList, seconds: float) -> bool:
    """Arm the timer to go off in `seconds` from now, whatever it was armed for before; whether it was armed.

    After timer_shutdown_sync() it does nothing.
    """
    spin_lock(timer.base.lock)
    was = timer.pending
    later = None
    if timer.function is not None:
        if not was:
            WRITE_ONCE(timer, "pending", True)
        timer.expires = engine().now() + seconds
        later = _rearm(timer)
    spin_unlock(timer.base.lock)
    _start(timer, later)
    return was


def timer_delete(timer: TimerList) -> bool:
    """Disarm the timer; whether it was armed. Its function may be running, and go on."""
    spin_lock(timer.base.lock)
    was = _detach(timer)
    spin_unlock(timer.base.lock)
    return was


def timer_delete_sync(timer: TimerList) -> bool:
    """Disarm the timer and wait for its function to end; whether it was armed.

    The caller may not hold a lock that the function takes, and sees to it that nobody else arms the timer
    meanwhile.
    """
    return _delete_sync(timer, shutdown=False)


def timer_shutdown_sync(timer: TimerList) -> bool:
    """timer_delete_sync, after which the timer cannot be armed any more."""
    return _delete_sync(timer, shutdown=True)


def _delete_sync(timer: TimerList, *, shutdown: bool) -> bool:
    base = timer.base
    if current().local.get("timer") is timer:
        raise LockingBug(f"{timer!r} is deleted with _sync by its own function, which would wait for itself")
    while True:
        spin_lock(base.lock)
        if shutdown:
            timer.function = None
        if timer not in base.running or _SYNC in guards.removed:
            was = _detach(timer)
            spin_unlock(base.lock)
            return was
        spin_unlock(base.lock)
        # It may arm itself again before it ends: so wait, and look again. ACQUIRE: pairs with the release in
        # _expire().
        smp_cond_load_acquire(base, "running", lambda running: timer not in running)


def _detach(timer: TimerList) -> bool:
    was = timer.pending
    if was:
        WRITE_ONCE(timer, "pending", False)
    if timer in timer.base.deferred:
        timer.base.deferred.remove(timer)
    return was


def _rearm(timer: TimerList) -> float | None:
    """When the engine has to call, if the call it owes us already comes too late. Under base.lock."""
    if timer.scheduled is not None and timer.scheduled <= timer.expires:
        return None  # that call finds the timer re-armed and passes itself on
    timer.scheduled = timer.expires
    return timer.expires


def _start(timer: TimerList, when: float | None) -> None:
    if when is not None:
        engine().run_later(partial(_expire, timer, when), max(0.0, when - engine().now()), "ktimer")


def _expire(timer: TimerList, when: float) -> None:
    """The engine calls: the timer armed for `when` may be due, re-armed or deleted."""
    base = timer.base
    spin_lock(base.lock)
    if timer.scheduled == when:
        timer.scheduled = None
    if not timer.pending:
        spin_unlock(base.lock)
        return
    if engine().now() < timer.expires:
        later = _rearm(timer)
        spin_unlock(base.lock)
        _start(timer, later)
        return
    if timer in base.running:
        if timer not in base.deferred:
            base.deferred.append(timer)  # T1
        spin_unlock(base.lock)
        return
    WRITE_ONCE(base, "running", (*base.running, timer))
    task = current()
    while True:
        function = timer.function
        WRITE_ONCE(timer, "pending", False)
        spin_unlock(base.lock)
        if function is not None:
            task.preempt_count += 1
            task.local["timer"] = timer
            function(timer)
            del task.local["timer"]
            task.preempt_count -= 1
        # From here the timer is touched only if it was armed again: its function may have freed what it is
        # part of.
        spin_lock(base.lock)
        if timer not in base.deferred:
            break
        base.deferred.remove(timer)
    # RELEASE: pairs with the acquire in _delete_sync(), which lets the owner go on.
    smp_store_release(base, "running", tuple(other for other in base.running if other is not timer))
    spin_unlock(base.lock)
