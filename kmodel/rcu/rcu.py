"""RCU: readers that write only to themselves, writers that wait for those who were there.

Models:      include/linux/rcupdate.h, kernel/rcu/tree_plugin.h __rcu_read_lock, kernel/rcu/tree.c
             synchronize_rcu, call_rcu (7.2)
Guards:      the read-side words belong to their task; the callback list has its lock
Invariants:  G1 a section that was open when synchronize_rcu was called has ended when it returns, G2 what was
             stored before a grace period began is seen by sections that begin after it, G3 sections nest
Leaves out:  quiescent states of CPUs, the node tree, boosting, polling for grace periods, softirq and
             scheduler flavours
Read next:   rcu/readers.py for the wait, rcu/cblist.py for callbacks, rcu/srcu.py

Real threads pay for a section what a preemptible kernel pays: the task's own words, no atomic operation, no
barrier, no shared line. Traced engines that offer a specification (engine().rcu) get that instead; the
nesting is counted in the task either way, because "am I in a reader?" is asked of it.
"""

from functools import partial
from typing import Any

from kmodel.core import (
    WRITE_ONCE,
    LockingBug,
    TaskStruct,
    access,
    adopt_thread,
    current,
    engine,
    initcall,
    kfree,
    might_sleep,
    reboot_notifier,
)
from kmodel.core.task import _tasks_by_thread, get_ident  # type: ignore[attr-defined]
from kmodel.rcu.cblist import (
    RcuCallback,
    RcuCbList,
    cblist_barrier,
    cblist_enqueue,
    invoke,
)
from kmodel.rcu.readers import SECTIONS_MASK, enter, leave, wait_for_readers
from kmodel.rcu.stall import note_entry, rcu_stall
from kmodel.sync.rcu_sync import register_grace_period

_DOMAIN = "rcu"
_record_entries = False

rcu_cblist: RcuCbList


def _wait_for_a_grace_period() -> None:
    wait_for_readers("rcu_read_lock_nesting", "rcu_read_sections", rcu_stall)


@initcall
def rcu_init() -> None:
    """Start with no callbacks queued."""
    global rcu_cblist
    rcu_cblist = RcuCbList("rcu_preempt", _wait_for_a_grace_period)


def record_entries(on: bool) -> None:
    """Debug: let every outermost rcu_read_lock() record its line for stall warnings."""
    global _record_entries
    _record_entries = on


# ------------------------------------------------------------------------------------------------ readers


def rcu_read_lock(task: TaskStruct | None = None) -> None:
    """Enter a read-side critical section; they nest. Pass current() if it is at hand: finding it is a third
    of the cost.
    """
    if task is None:
        try:
            task = _tasks_by_thread[get_ident()]  # current(), without the call
        except KeyError:
            task = adopt_thread()
    if access._tracer is not None or _record_entries:
        _rcu_read_lock_slow(task)
        return
    task.rcu_read_lock_nesting += 1


def rcu_read_unlock(task: TaskStruct | None = None) -> None:
    """Leave it. A grace period that waited for the outermost one may end now."""
    if task is None:
        try:
            task = _tasks_by_thread[get_ident()]
        except KeyError:
            task = adopt_thread()
    if access._tracer is not None:
        _rcu_read_unlock_traced(task)
        return
    nesting = task.rcu_read_lock_nesting - 1
    task.rcu_read_lock_nesting = nesting
    if nesting == 0:
        # After the nesting, in this order: see rcu/readers.py.
        task.rcu_read_sections = (task.rcu_read_sections + 1) & SECTIONS_MASK
    elif nesting < 0:
        task.rcu_read_lock_nesting = 0
        raise LockingBug(f"{task!r} calls rcu_read_unlock() outside any section")


def rcu_read_lock_held(task: TaskStruct | None = None) -> bool:
    """Whether current is in a read-side critical section."""
    return (task if task is not None else current()).rcu_read_lock_nesting > 0


def _rcu_read_lock_slow(task: TaskStruct) -> None:
    nesting = task.rcu_read_lock_nesting
    if _record_entries and nesting == 0:
        note_entry(task, depth=3)
    if access._tracer is None:
        task.rcu_read_lock_nesting = nesting + 1
        return
    spec = engine().rcu
    if spec is None:
        enter(task, "rcu_read_lock_nesting")
        return
    if nesting == 0:
        task.local[_DOMAIN] = spec.read_lock(_DOMAIN)
    WRITE_ONCE(task, "rcu_read_lock_nesting", nesting + 1)


def _rcu_read_unlock_traced(task: TaskStruct) -> None:
    spec = engine().rcu
    if spec is None:
        leave(task, "rcu_read_lock_nesting", "rcu_read_sections")
        return
    nesting = task.rcu_read_lock_nesting
    if nesting <= 0:
        raise LockingBug(f"{task!r} calls rcu_read_unlock() outside any section")
    WRITE_ONCE(task, "rcu_read_lock_nesting", nesting - 1)
    if nesting == 1:
        spec.read_unlock(_DOMAIN, task.local.pop(_DOMAIN))


# ---------------------------------------------------------------------------------------------- grace periods


def synchronize_rcu() -> None:
    """Wait until every section open now has ended; full barrier. LockingBug inside a section: it would wait
    for itself.
    """
    if rcu_read_lock_held():
        raise LockingBug(f"{current()!r} calls synchronize_rcu() inside an RCU read-side critical section")
    might_sleep()
    spec = engine().rcu
    if spec is not None:
        spec.synchronize(_DOMAIN)
    else:
        _wait_for_a_grace_period()


def synchronize_rcu_expedited() -> None:
    """synchronize_rcu() at once, by interrupting every CPU. Nobody batches grace periods here, so it is the
    same thing.
    """
    synchronize_rcu()


def call_rcu(obj: Any, func: RcuCallback) -> None:
    """Run func(obj) after a grace period; from any context. Callbacks run in order and must not sleep.

    The kernel passes an rcu_head that obj embeds and func finds obj from it by container_of().
    """
    spec = engine().rcu
    if spec is not None:
        spec.call(_DOMAIN, partial(invoke, func, obj))
    else:
        cblist_enqueue(rcu_cblist, func, obj)


call_rcu_hurry = call_rcu


def rcu_barrier() -> None:
    """Wait until every callback that call_rcu() queued before has run (not for a grace period as such)."""
    might_sleep()
    spec = engine().rcu
    if spec is not None:
        spec.barrier(_DOMAIN)
    else:
        cblist_barrier(rcu_cblist)


def kfree_rcu(obj: Any) -> None:
    """Free `obj` after a grace period."""
    call_rcu(obj, kfree)


# percpu_rw_semaphore's fast readers live in sync/, below this room: this is the grace period they need.
register_grace_period(synchronize_rcu, call_rcu, rcu_read_lock, rcu_read_unlock)

# A callback of this boot must not free an object of the next.
reboot_notifier(rcu_barrier)
