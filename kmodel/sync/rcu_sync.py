"""rcu_sync: a switch that readers look at for free, and whose writers pay with grace periods.

Models:      include/linux/rcu_sync.h, kernel/rcu/sync.c (7.2)
Guards:      all fields are changed under gp_wait.lock; readers look at gp_state inside an RCU section
Invariants:  Y1 after rcu_sync_enter() no reader is inside, and none will come, that found the switch idle, Y2
             readers find it idle again only a grace period after the last rcu_sync_exit()
Leaves out:  rcu_sync_dtor()
Read next:   percpu_rwsem.py, the reason it exists

Linux has this file in kernel/rcu/; here it belongs to sync/, which rcu/ builds on, so the grace period comes
in by a hook that rcu/ fills when it is imported. Until then the switch never reads as idle: every reader
takes the slow path, which needs no grace period.

States: IDLE readers are fast; ENTER a writer waits for the grace period; PASSED readers are slow and writers
come and go freely; EXIT the last writer left and a grace period runs; REPLAY a writer came and left
meanwhile, so run another one.
"""

from collections.abc import Callable
from typing import Any, Final

from kmodel.core import READ_ONCE, WRITE_ONCE, KernelBug, Pooled, embedded, kernel_struct, raw_get
from kmodel.sync.spinlock import spin_lock, spin_unlock
from kmodel.sync.wait import WaitQueueHead, __wake_up_locked, wait_event

GP_IDLE: Final = 0
GP_ENTER: Final = 1
GP_PASSED: Final = 2
GP_EXIT: Final = 3
GP_REPLAY: Final = 4

# The grace period of rcu/, or None as long as nobody imported it.
_synchronize: Callable[[], Any] | None = None
_call: Callable[[Any, Callable[[Any], Any]], Any] | None = None
read_lock: Callable[[], Any] | None = None
"""rcu_read_lock, or None: then no reader may take a fast path, because nobody could wait for it."""
read_unlock: Callable[[], Any] | None = None


def register_grace_period(
    synchronize: Callable[[], Any],
    call: Callable[[Any, Callable[[Any], Any]], Any],
    lock: Callable[[], Any] | None = None,
    unlock: Callable[[], Any] | None = None,
) -> None:
    """Called by rcu/: synchronize_rcu, call_rcu(obj, func), and rcu_read_lock and _unlock, which the fast
    path needs.
    """
    global _synchronize, _call, read_lock, read_unlock
    _synchronize, _call = synchronize, call
    read_lock, read_unlock = (lock, unlock) if lock is not None and unlock is not None else (None, None)


@kernel_struct
class RcuSync(Pooled):
    """struct rcu_sync."""

    gp_state: int = GP_IDLE
    gp_count: int = 0
    gp_wait: WaitQueueHead = embedded(factory=WaitQueueHead)


def rcu_sync_is_idle(rss: RcuSync) -> bool:
    """Whether a reader may be fast.

    Inside an RCU section only: its end is what a writer's grace period waits for (Y1).
    """
    return READ_ONCE(rss, "gp_state") == GP_IDLE  # type: ignore[no-any-return]


def rcu_sync_enter(rss: RcuSync) -> None:
    """Send readers the slow way and wait until no fast one is left; blocks for a grace period if the switch
    was idle.
    """
    spin_lock(rss.gp_wait.lock)
    gp_state = rss.gp_state
    if gp_state == GP_IDLE:
        WRITE_ONCE(rss, "gp_state", GP_ENTER)
    rss.gp_count += 1
    spin_unlock(rss.gp_wait.lock)
    if gp_state == GP_IDLE:
        # We are the one who pays; a callback would do too, but waiting here is sooner.
        if _synchronize is not None:
            _synchronize()
        _rcu_sync_func(rss)
        return
    wait_event(rss.gp_wait, lambda: READ_ONCE(rss, "gp_state") >= GP_PASSED)


def rcu_sync_exit(rss: RcuSync) -> None:
    """Undo one rcu_sync_enter(); after the last one readers get fast again, a grace period later."""
    spin_lock(rss.gp_wait.lock)
    rss.gp_count -= 1
    ready = False
    if rss.gp_count == 0:
        if rss.gp_state == GP_PASSED:
            WRITE_ONCE(rss, "gp_state", GP_EXIT)
            ready = not _rcu_sync_call(rss)
        elif rss.gp_state == GP_EXIT:
            # The running grace period began before our readers; they need one of their own.
            WRITE_ONCE(rss, "gp_state", GP_REPLAY)
    spin_unlock(rss.gp_wait.lock)
    if ready:
        _rcu_sync_func(rss)


def _rcu_sync_call(rss: RcuSync) -> bool:
    """Run _rcu_sync_func after a grace period; False if there are none to wait for."""
    if _call is None:
        return False
    _call(rss, _rcu_sync_func)
    return True


def _rcu_sync_func(rss: RcuSync) -> None:
    """A grace period has passed."""
    spin_lock(rss.gp_wait.lock)
    if rss.gp_count:
        # A writer is inside or waits: its grace period, or one that somebody else paid for.
        WRITE_ONCE(rss, "gp_state", GP_PASSED)
        __wake_up_locked(rss.gp_wait, nr_exclusive=0)
    elif rss.gp_state == GP_REPLAY:
        WRITE_ONCE(rss, "gp_state", GP_EXIT)
        _rcu_sync_call(rss)
    else:
        # Y2: what the last writer did is visible to every reader that starts now.
        WRITE_ONCE(rss, "gp_state", GP_IDLE)
    spin_unlock(rss.gp_wait.lock)


def check_invariants(rss: RcuSync) -> None:
    """KernelBug unless the state fits the count. Nobody may be inside an operation on `rss`."""
    state, count = raw_get(rss, "gp_state"), raw_get(rss, "gp_count")
    if count < 0 or (count and state not in (GP_ENTER, GP_PASSED)) or (not count and state == GP_PASSED):
        raise KernelBug(f"{rss!r}: state {state} with {count} writers")
