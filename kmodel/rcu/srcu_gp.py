"""SRCU's grace period: scan the idle index, flip, scan the other.

Models:      kernel/rcu/srcutree.c: srcu_readers_active_idx_check, try_check_zero, srcu_flip,
             srcu_advance_state, srcu_gp_end, synchronize_srcu, call_srcu, srcu_barrier, cleanup_srcu_struct
             (7.2)
Guards:      srcu_gp_mutex: one grace period of a domain at a time
Invariants:  V1 a section that was open when synchronize_srcu was called has ended when it returns, V2
             srcu_gp_seq goes IDLE, SCAN1, SCAN2, IDLE and grows, V3 one grace period serves everybody who
             asked before it began
Leaves out:  the delay before a grace period starts (callers here always count as expedited), polling, stall
             warnings (SRCU has none)
Read next:   rcu/tasks_trace.py

Who pairs with whom. A, between the two sums, with B and C of readers: if an unlock was counted, so is its
lock (H69), and whoever is not counted sees what the updater did before. E and D, before and after the flip,
with B and C: a reader whose counts this scan missed is on the new index from its next section on. They bound
how many late readers an index can have, so that the sums cannot wrap into equality; no program of the
explorer with two grace periods goes wrong without them (tests/rcu/test_srcu_explored.py).
"""

from functools import partial
from typing import Any, Final

from kmodel.core import (
    READ_ONCE,
    TASK_UNINTERRUPTIBLE,
    WARN,
    WRITE_ONCE,
    LockingBug,
    access,
    cpu_relax,
    current,
    engine,
    guards,
    might_sleep,
    schedule_timeout,
    set_current_state,
    smp_mb,
    smp_store_release,
)
from kmodel.rcu.cblist import RcuCallback, cblist_barrier, cblist_enqueue, cblist_is_idle, invoke
from kmodel.rcu.rcu import synchronize_rcu
from kmodel.rcu.srcu import (
    SRCU_READ_FLAVOR_FAST,
    SrcuData,
    SrcuStruct,
    specification,
    srcu_read_lock_held,
    srcu_readers_active,
    srcu_readers_sum,
)
from kmodel.sync import mutex_lock, mutex_unlock

RCU_SEQ_CTR_SHIFT: Final = 2
RCU_SEQ_STATE_MASK: Final = 3
SRCU_STATE_IDLE: Final = 0
SRCU_STATE_SCAN1: Final = 1
SRCU_STATE_SCAN2: Final = 2

SRCU_RETRY_CHECK_DELAY: Final = 5e-6
SRCU_MAX_INTERVAL: Final = 10
_JIFFY: Final = 1e-3
_FOLD_ABOVE: Final = 64

_UNLOCKS_FIRST = guards.register("srcu-unlocks-first", "H69: unlocks are summed before locks")
_MB_A = guards.register(
    "srcu-mb-a", "H69: a counted unlock has its lock counted, also on a weakly ordered machine"
)
_MB_D = guards.register(
    "srcu-mb-d", "a reader whose unlock is missed uses the new index from its next section on"
)
_MB_E = guards.register(
    "srcu-mb-e", "a reader whose lock is counted before the flip fetched its index before it"
)
_SCAN1 = guards.register(
    "srcu-first-scan", "H70: readers that fetched the idle index long ago are waited for too"
)
_SCAN2 = guards.register("srcu-second-scan", "V1: readers on the index before the flip are waited for")


# ------------------------------------------------------------------------------------------- sequence numbers


def rcu_seq_snap(seq: int) -> int:
    """The value of the sequence at whose reaching a grace period that starts after now has ended."""
    return (seq + 2 * RCU_SEQ_STATE_MASK + 1) & ~RCU_SEQ_STATE_MASK


def rcu_seq_state(seq: int) -> int:
    """The phase in the low bits."""
    return seq & RCU_SEQ_STATE_MASK


# ------------------------------------------------------------------------------------------------ phases


def srcu_readers_active_idx_check(ssp: SrcuStruct, idx: int) -> bool:
    """Whether at some moment of this call index `idx` had no reader that is to be waited for."""
    if _UNLOCKS_FIRST in guards.removed:
        locks = srcu_readers_sum(ssp, idx, "srcu_locks")
        _barrier_a(ssp)
        return locks == srcu_readers_sum(ssp, idx, "srcu_unlocks")
    unlocks = srcu_readers_sum(ssp, idx, "srcu_unlocks")
    _barrier_a(ssp)
    return srcu_readers_sum(ssp, idx, "srcu_locks") == unlocks


def _barrier_a(ssp: SrcuStruct) -> None:
    if _MB_A in guards.removed:
        return
    if ssp.srcu_reader_flavor == SRCU_READ_FLAVOR_FAST:
        # The increments have no barriers: wait until every one that had begun is visible with all that
        # belongs to it.
        synchronize_rcu()
    else:
        smp_mb()  # A: pairs with B and C


def _delay(attempt: int) -> None:
    """Between two looks at the counters: 5 us, then longer and longer."""
    if access._tracer is not None:
        cpu_relax()
        return
    seconds = SRCU_RETRY_CHECK_DELAY if attempt == 1 else min(attempt - 1, SRCU_MAX_INTERVAL) * _JIFFY
    set_current_state(TASK_UNINTERRUPTIBLE)
    schedule_timeout(seconds)


def _drain(ssp: SrcuStruct, idx: int) -> None:
    """Look at an index until it has no readers."""
    attempt = 0
    while not srcu_readers_active_idx_check(ssp, idx):
        attempt += 1
        ssp.srcu_retries += 1
        _delay(attempt)


def srcu_flip(ssp: SrcuStruct) -> None:
    """Send new readers to the other index."""
    if _MB_E not in guards.removed:
        smp_mb()  # E: pairs with B and C
    WRITE_ONCE(ssp, "srcu_idx", 1 - READ_ONCE(ssp, "srcu_idx"))
    if _MB_D not in guards.removed:
        smp_mb()  # D: pairs with C


def _run_grace_period(ssp: SrcuStruct) -> None:
    """One grace period; the caller holds srcu_gp_mutex."""
    seq = READ_ONCE(ssp, "srcu_gp_seq")
    WRITE_ONCE(ssp, "srcu_gp_seq", seq | SRCU_STATE_SCAN1)
    smp_mb()  # the updater's stores before; pairs with B of readers that this grace period does not wait for
    if _SCAN1 not in guards.removed:
        # Nobody enters here now, but whoever fetched this index before the last flip may have been late to
        # count (H70).
        _drain(ssp, 1 - READ_ONCE(ssp, "srcu_idx"))
    old = READ_ONCE(ssp, "srcu_idx")
    srcu_flip(ssp)
    WRITE_ONCE(ssp, "srcu_gp_seq", seq | SRCU_STATE_SCAN2)
    if _SCAN2 not in guards.removed:
        _drain(ssp, old)
    _fold_the_dead(ssp)
    smp_mb()
    WRITE_ONCE(ssp, "srcu_gp_seq", seq + (1 << RCU_SEQ_CTR_SHIFT))


def _fold_the_dead(ssp: SrcuStruct) -> None:
    """Add the counters of tasks that have ended to the domain's base, so that the list does not grow for
    ever.

    Between grace periods nobody compares sums, and a dead task's counters do not move.
    """
    if access._tracer is not None or len(ssp.srcu_data) <= _FOLD_ABOVE:
        return
    engine().spin_lock(ssp, "lock")
    base, *others = ssp.srcu_data
    alive = set(engine().tasks())
    kept: list[SrcuData] = [base]
    for data in others:
        if data.task in alive:
            kept.append(data)
            continue
        for mine, theirs in zip(base.srcu_ctrs, data.srcu_ctrs, strict=True):
            mine.srcu_locks += theirs.srcu_locks
            mine.srcu_unlocks += theirs.srcu_unlocks
    smp_store_release(ssp, "srcu_data", tuple(kept))
    engine().spin_unlock(ssp, "lock")


def srcu_grace_period(ssp: SrcuStruct) -> None:
    """Wait for a grace period that starts after this call does, running it unless somebody else
    does so (V3).
    """
    snap = rcu_seq_snap(READ_ONCE(ssp, "srcu_gp_seq"))
    smp_mb()
    mutex_lock(ssp.srcu_gp_mutex)
    if READ_ONCE(ssp, "srcu_gp_seq") < snap:
        _run_grace_period(ssp)
    mutex_unlock(ssp.srcu_gp_mutex)
    smp_mb()


# ----------------------------------------------------------------------------------------------- for updaters


def synchronize_srcu(ssp: SrcuStruct) -> None:
    """Wait until every section of the domain that is open now has ended. LockingBug inside one
    of one's own.
    """
    if srcu_read_lock_held(ssp):
        raise LockingBug(
            f"{current()!r} calls synchronize_srcu({ssp.name}) inside a section of the same domain"
        )
    might_sleep()
    spec = specification(ssp)
    if spec is not None:
        spec.synchronize(ssp)
    else:
        srcu_grace_period(ssp)


synchronize_srcu_expedited = synchronize_srcu


def call_srcu(ssp: SrcuStruct, obj: Any, func: RcuCallback) -> None:
    """Run func(obj) after a grace period of the domain; from any context. Callbacks run in order and must not
    sleep.
    """
    spec = specification(ssp)
    if spec is not None:
        spec.call(ssp, partial(invoke, func, obj))
    else:
        cblist_enqueue(ssp.srcu_cblist, func, obj)


def srcu_barrier(ssp: SrcuStruct) -> None:
    """Wait until every callback that call_srcu() queued on the domain before has run."""
    might_sleep()
    spec = specification(ssp)
    if spec is not None:
        spec.barrier(ssp)
    else:
        cblist_barrier(ssp.srcu_cblist)


def cleanup_srcu_struct(ssp: SrcuStruct) -> None:
    """The domain is not needed any more. Warns, and leaks it, if it has readers or callbacks."""
    if specification(ssp) is not None:
        return
    if WARN(srcu_readers_active(ssp), f"cleanup_srcu_struct({ssp.name}) with active readers"):
        return
    if WARN(not cblist_is_idle(ssp.srcu_cblist), f"cleanup_srcu_struct({ssp.name}) with callbacks queued"):
        return
    ssp.srcu_data = ()


def check_invariants(ssp: SrcuStruct) -> None:
    """Assert V2 and U1 on a domain without readers."""
    assert rcu_seq_state(ssp.srcu_gp_seq) == SRCU_STATE_IDLE, f"V2: {ssp.name} is in a grace period"
    for idx in (0, 1):
        locks, unlocks = (srcu_readers_sum(ssp, idx, field) for field in ("srcu_locks", "srcu_unlocks"))
        assert locks == unlocks, f"U1: {ssp.name} index {idx}: {locks} locks, {unlocks} unlocks"
