"""RCU Tasks Trace: readers that may sleep, one domain for the whole system; it protects uprobes and their
consumers.

Models:      include/linux/rcupdate_trace.h (7.2: over SRCU-fast); kernel/rcu/tasks.h before 7.x (its own
             holdout scan)
Guards:      the nesting belongs to the task
Invariants:  Z1 a section that was open when synchronize_rcu_tasks_trace was called has ended when it returns,
             Z2 sections nest
Leaves out:  the barriers for architectures whose entry code RCU does not watch; how the older scan interrupts
             running CPUs
Read next:   uprobes/lookup.py

Two implementations behind one name, chosen by use_rcu_tasks_trace(): "srcu_fast"  what 7.2 has: the outermost
section is a section of one global SRCU-fast domain, its counter kept in the task "holdouts"   what the
mailing-list threads discuss: a reader only counts its nesting; a grace period looks at every task, makes a
list of those inside, and waits until each has left its section; it warns when one does not
"""

from functools import partial
from typing import Any, Final, Literal

from kmodel.core import (
    KernelBug,
    LockingBug,
    TaskStruct,
    access,
    adopt_thread,
    current,
    engine,
    initcall,
    might_sleep,
    raw_get,
    reboot_notifier,
)
from kmodel.core.task import _tasks_by_thread, get_ident  # type: ignore[attr-defined]
from kmodel.rcu.cblist import RcuCallback, RcuCbList, cblist_barrier, cblist_enqueue, invoke
from kmodel.rcu.readers import SECTIONS_MASK, enter, leave, wait_for_readers
from kmodel.rcu.srcu import (
    SRCU_READ_FLAVOR_FAST,
    SrcuStruct,
    __srcu_read_lock_fast,
    __srcu_read_unlock_fast,
    srcu_data_of,
)
from kmodel.rcu.srcu_gp import call_srcu, srcu_barrier, srcu_grace_period
from kmodel.rcu.stall import tasks_trace_stall

type Implementation = Literal["srcu_fast", "holdouts"]

_DOMAIN: Final = "rcu_tasks_trace"
_holdouts = False

rcu_tasks_trace_srcu_struct: SrcuStruct
rcu_tasks_trace_cblist: RcuCbList


def _wait_for_holdouts() -> None:
    wait_for_readers("trc_reader_nesting", "trc_reader_sections", tasks_trace_stall)


@initcall
def rcu_tasks_trace_init() -> None:
    """Start with no readers and no callbacks. Which implementation is in use stays."""
    global rcu_tasks_trace_srcu_struct, rcu_tasks_trace_cblist
    rcu_tasks_trace_srcu_struct = SrcuStruct(_DOMAIN, fast=True, use_implementation=True)
    rcu_tasks_trace_cblist = RcuCbList(_DOMAIN, _wait_for_holdouts)


def use_rcu_tasks_trace(implementation: Implementation) -> Implementation:
    """Choose the implementation and return the one used before. KernelBug while any task is in a section."""
    global _holdouts
    before: Implementation = "holdouts" if _holdouts else "srcu_fast"
    inside = [task for task in engine().tasks() if raw_get(task, "trc_reader_nesting")]
    if inside:
        raise KernelBug(f"RCU Tasks Trace cannot change while {inside} are inside")
    _holdouts = implementation == "holdouts"
    return before


# ------------------------------------------------------------------------------------------------ readers


def rcu_read_lock_trace(task: TaskStruct | None = None) -> None:
    """Enter a section, in which the task may sleep; they nest. Pass current() if it is at hand."""
    if task is None:
        try:
            task = _tasks_by_thread[get_ident()]  # current(), without the call
        except KeyError:
            task = adopt_thread()
    if access._tracer is not None:
        _lock_traced(task)
        return
    nesting = task.trc_reader_nesting
    task.trc_reader_nesting = nesting + 1
    if nesting == 0 and not _holdouts:
        # __srcu_read_lock_fast(), without the calls
        ssp = rcu_tasks_trace_srcu_struct
        try:
            scp = task.percpu[ssp].srcu_ctrs[ssp.srcu_idx]
        except KeyError:
            scp = srcu_data_of(ssp, task, SRCU_READ_FLAVOR_FAST).srcu_ctrs[ssp.srcu_idx]
        scp.srcu_locks += 1
        task.trc_reader_scp = scp


def rcu_read_unlock_trace(task: TaskStruct | None = None) -> None:
    """Leave it."""
    if task is None:
        try:
            task = _tasks_by_thread[get_ident()]
        except KeyError:
            task = adopt_thread()
    if access._tracer is not None:
        _unlock_traced(task)
        return
    nesting = task.trc_reader_nesting - 1
    if nesting < 0:
        raise LockingBug(f"{task!r} calls rcu_read_unlock_trace() outside any section")
    task.trc_reader_nesting = nesting
    if nesting == 0:
        if _holdouts:
            # After the nesting, in this order: see rcu/readers.py.
            task.trc_reader_sections = (task.trc_reader_sections + 1) & SECTIONS_MASK
        else:
            task.trc_reader_scp.srcu_unlocks += 1


def rcu_read_lock_trace_held(task: TaskStruct | None = None) -> bool:
    """Whether current is in a section."""
    return (task if task is not None else current()).trc_reader_nesting > 0


def _lock_traced(task: TaskStruct) -> None:
    spec = engine().rcu
    if spec is None and _holdouts:
        enter(task, "trc_reader_nesting")
        return
    nesting = task.trc_reader_nesting
    task.trc_reader_nesting = nesting + 1
    if nesting == 0:
        if spec is not None:
            task.trc_reader_scp = spec.read_lock(_DOMAIN)
        else:
            task.trc_reader_scp = __srcu_read_lock_fast(rcu_tasks_trace_srcu_struct, task)


def _unlock_traced(task: TaskStruct) -> None:
    spec = engine().rcu
    if spec is None and _holdouts:
        leave(task, "trc_reader_nesting", "trc_reader_sections")
        return
    nesting = task.trc_reader_nesting - 1
    if nesting < 0:
        raise LockingBug(f"{task!r} calls rcu_read_unlock_trace() outside any section")
    task.trc_reader_nesting = nesting
    if nesting == 0:
        if spec is not None:
            spec.read_unlock(_DOMAIN, task.trc_reader_scp)
        else:
            __srcu_read_unlock_fast(task.trc_reader_scp, task)


# ------------------------------------------------------------------------------------------------ updaters


def synchronize_rcu_tasks_trace() -> None:
    """Wait until every section open now, in any task, has ended. LockingBug inside a section."""
    if rcu_read_lock_trace_held():
        raise LockingBug(f"{current()!r} calls synchronize_rcu_tasks_trace() inside a section")
    might_sleep()
    spec = engine().rcu
    if spec is not None:
        spec.synchronize(_DOMAIN)
    elif _holdouts:
        _wait_for_holdouts()
    else:
        srcu_grace_period(rcu_tasks_trace_srcu_struct)


def call_rcu_tasks_trace(obj: Any, func: RcuCallback) -> None:
    """Run func(obj) after a grace period; from any context. Callbacks run in order and must not sleep."""
    spec = engine().rcu
    if spec is not None:
        spec.call(_DOMAIN, partial(invoke, func, obj))
    elif _holdouts:
        cblist_enqueue(rcu_tasks_trace_cblist, func, obj)
    else:
        call_srcu(rcu_tasks_trace_srcu_struct, obj, func)


def rcu_barrier_tasks_trace() -> None:
    """Wait until every callback that call_rcu_tasks_trace() queued before has run."""
    might_sleep()
    spec = engine().rcu
    if spec is not None:
        spec.barrier(_DOMAIN)
    elif _holdouts:
        cblist_barrier(rcu_tasks_trace_cblist)
    else:
        srcu_barrier(rcu_tasks_trace_srcu_struct)


# As in rcu/rcu.py.
reboot_notifier(rcu_barrier_tasks_trace)
