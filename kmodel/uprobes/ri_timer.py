"""The timer that ends leases which take too long, and struct uprobe_task's end.

Models:      kernel/events/uprobes.c, ri_timer, RI_TIMER_PERIOD, uprobe_free_utask (7.2)
Guards:      a section of uretprobes_srcu keeps the uprobes, RCU the instances; ri_seqcount tells the owner
             that the walk is on
Invariants:  L3 no lease is older than the period and one walk (H58)
Leaves out:  nothing
Read next:   uprobes/hprobe.py; docs/findings/ about the start of the walk (H62)
"""

from typing import Any, Final

from kmodel.core import READ_ONCE, WARN_ON_ONCE, TaskStruct, current, guards, rcu_dereference, smp_mb
from kmodel.rcu import rcu_read_lock, rcu_read_unlock, srcu_read_lock, srcu_read_unlock
from kmodel.slab import kfree
from kmodel.sync import (
    TimerList,
    raw_write_seqcount_begin,
    raw_write_seqcount_end,
    timer_delete_sync,
)
from kmodel.uprobes import lifetime
from kmodel.uprobes.hprobe import hprobe_expire
from kmodel.uprobes.return_instance import free_ret_instance, ri_free

RI_TIMER_PERIOD: Final = 0.1
"""Seconds a function may take before its lease is traded for a reference."""

_NO_MB = guards.register(
    "ri-timer-without-mb",
    "H62: what Linux 7.2 does, rather than a guard: nothing orders the timer's odd ri_seqcount before its "
    "look at the list. Without it there is a full barrier in between",
)
_SRCU = guards.register("no-ri-timer-srcu", "H57: an expirer that loses touches a uprobe that nothing keeps")


def ri_timer(timer: TimerList) -> None:
    """In softirq, 100 ms after the task's last probed call: end every lease it has."""
    utask: Any = timer.container
    keep_uprobes = _SRCU not in guards.removed
    idx = srcu_read_lock(lifetime.uretprobes_srcu) if keep_uprobes else -1
    rcu_read_lock()
    raw_write_seqcount_begin(utask.ri_seqcount)
    if _NO_MB in guards.removed:
        smp_mb()  # not in Linux: see the guard
    ri = rcu_dereference(utask, "return_instances")
    while ri is not None:
        hprobe_expire(ri.hprobe, get=False)
        ri = READ_ONCE(ri, "next")
    raw_write_seqcount_end(utask.ri_seqcount)
    rcu_read_unlock()
    if keep_uprobes:
        srcu_read_unlock(lifetime.uretprobes_srcu, idx)


def uprobe_free_utask(task: TaskStruct | None = None) -> None:
    """The task ends, or execs: forget its pending returns. Called by the task itself, or when it is gone."""
    if task is None:
        task = current()
    utask = task.utask
    if utask is None:
        return
    task.utask = None
    WARN_ON_ONCE(utask.active_uprobe is not None or utask.xol_vaddr, "a task ends inside a single-step")
    # No walk goes on, and none begins: only the task itself arms the timer.
    timer_delete_sync(utask.ri_timer)
    ri = utask.return_instances
    utask.return_instances = None
    while ri is not None:
        ri_next = ri.next
        free_ret_instance(utask, ri, cleanup_hprobe=True)
        ri = ri_next
    # Last, because the loop above adds to it.
    ri = utask.ri_pool
    while ri is not None:
        ri_next = ri.next
        ri_free(ri)
        ri = ri_next
    kfree(utask)
