"""Callbacks: queued by anybody, run in order, each after a grace period that began after it was queued.

Models:      kernel/rcu/rcu_segcblist.c in what it achieves; rcu_do_batch, rcu_barrier (7.2)
Guards:      `lock` guards `pending` and `running`
Invariants:  Y1 callbacks run one at a time and in the order of their queueing, Y2 a grace period lies between
             queueing and running, Y3 callbacks do not sleep
Leaves out:  segments (a batch is what was queued when the worker looked), per-CPU lists, offloading, lazy
             callbacks
Read next:   rcu/rcu.py
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from kmodel.core import (
    Struct,
    atomic,
    current,
    engine,
    guards,
    kernel_struct,
    smp_cond_load_acquire,
    smp_store_release,
    untraced,
)

_GRACE = guards.register("call-rcu-grace-period", "H08: a callback runs after a grace period, not at once")

type RcuCallback = Callable[[Any], Any]


@kernel_struct
class RcuCbList(Struct):
    """The callbacks of one RCU flavour or SRCU domain."""

    name: str = untraced()
    synchronize: Callable[[], Any] = untraced()

    lock: int = atomic(default=0)
    # write, read: lock
    pending: list[tuple[RcuCallback, Any]] = untraced(factory=list)
    running: bool = untraced(default=False)
    # the engine whose worker `running` speaks of
    engine: Any = untraced(default=None)


@kernel_struct
class RcuSynchronize(Struct):
    """struct rcu_synchronize: somebody waits until a callback ran."""

    done: bool = False


def wakeme_after_rcu(rs: RcuSynchronize) -> None:
    """Callback: let the waiter go on."""
    # RELEASE: pairs with the waiter's acquire in cblist_barrier().
    smp_store_release(rs, "done", True)


def invoke(func: RcuCallback, obj: Any) -> None:
    """Run one callback as softirq would: it must not sleep (Y3)."""
    task = current()
    task.preempt_count += 1
    try:
        func(obj)
    finally:
        task.preempt_count -= 1


def cblist_enqueue(cblist: RcuCbList, func: RcuCallback, obj: Any) -> None:
    """Queue func(obj) and start a worker if none is at it."""
    here = engine()
    here.spin_lock(cblist, "lock")
    if cblist.engine is not here:  # the worker of another engine's run does not exist any more
        cblist.engine = here
        cblist.running = False
        cblist.pending = []
    cblist.pending.append((func, obj))
    start = not cblist.running
    cblist.running = True
    here.spin_unlock(cblist, "lock")
    if start:
        here.run_later(partial(_worker, cblist), 0.0, cblist.name)


def _worker(cblist: RcuCbList) -> None:
    """One grace period for each batch, until nothing is queued."""
    here = engine()
    while True:
        here.spin_lock(cblist, "lock")
        batch = cblist.pending
        if not batch:
            cblist.running = False
            here.spin_unlock(cblist, "lock")
            return
        cblist.pending = []
        here.spin_unlock(cblist, "lock")
        if _GRACE not in guards.removed:
            cblist.synchronize()
        done = 0
        try:
            for func, obj in batch:
                done += 1
                invoke(func, obj)
        except BaseException:
            _give_up(cblist, batch[done:])
            raise


def _give_up(cblist: RcuCbList, rest: list[tuple[RcuCallback, Any]]) -> None:
    """A callback failed, which would be an oops: leave the rest to the next worker."""
    here = engine()
    here.spin_lock(cblist, "lock")
    cblist.pending[:0] = rest
    cblist.running = False
    here.spin_unlock(cblist, "lock")


def cblist_is_idle(cblist: RcuCbList) -> bool:
    """Whether nothing is queued or running."""
    here = engine()
    here.spin_lock(cblist, "lock")
    idle = cblist.engine is not here or not (cblist.running or cblist.pending)
    here.spin_unlock(cblist, "lock")
    return idle


def cblist_barrier(cblist: RcuCbList) -> None:
    """Wait until every callback queued before has run."""
    if cblist_is_idle(cblist):
        return
    rs = RcuSynchronize()
    cblist_enqueue(cblist, wakeme_after_rcu, rs)
    smp_cond_load_acquire(rs, "done", bool)
