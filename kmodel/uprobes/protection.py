"""What keeps a uprobe and its consumers readable from the lookup of a hit to the end of its handlers.

Models:      kernel/events/uprobes.c, the reader section of handle_swbp and what waits for it: uprobes_srcu in
             6.12, RCU tasks trace since 6.13 (7.2 too)
Guards:      see the flavour
Invariants:  Z1 of rcu/tasks_trace.py: who waits, waits for every section that was open
Leaves out:  nothing of its own
Read next:   rcu/srcu.py and rcu/tasks_trace.py; then uprobes/lifetime.py, whose chain waits here

The threads: SRCU is a domain of the uprobes' own, so that an unregister waits for nobody else, and its
readers pay a full barrier twice. RCU tasks trace has no barrier in its readers, warns when one does not
end, and waits for everybody's. Tasks trace itself was rewritten since, from a scan of all tasks
("holdouts") to SRCU-fast.
"""

from collections.abc import Callable
from typing import Any

import attrs

from kmodel.core import TaskStruct, initcall
from kmodel.rcu import (
    SrcuStruct,
    call_rcu_tasks_trace,
    call_srcu,
    rcu_read_lock_trace,
    rcu_read_unlock_trace,
    srcu_barrier,
    srcu_read_lock,
    srcu_read_unlock,
    synchronize_rcu_tasks_trace,
    synchronize_srcu,
)
from kmodel.rcu.tasks_trace import rcu_barrier_tasks_trace

uprobes_srcu: SrcuStruct


@initcall
def uprobes_protection_init() -> None:
    """Create the SRCU domain, which only schemes with SRCU use."""
    global uprobes_srcu
    uprobes_srcu = SrcuStruct("uprobes_srcu")


@attrs.frozen
class Protection:
    """A flavour of RCU: its readers, and the three ways to wait for them."""

    name: str
    read_lock: Callable[[TaskStruct], Any]
    """Begin a section; what it returns goes to read_unlock."""
    read_unlock: Callable[[TaskStruct, Any], None]
    call: Callable[[Any, Callable[[Any], None]], None]
    """Run func(obj) when every section open now has ended."""
    synchronize: Callable[[], None]
    barrier: Callable[[], None]


def _trace_lock(task: TaskStruct) -> None:
    rcu_read_lock_trace(task)


def _trace_unlock(task: TaskStruct, _token: Any) -> None:
    rcu_read_unlock_trace(task)


def _srcu_lock(task: TaskStruct) -> int:
    return srcu_read_lock(uprobes_srcu, task)


def _srcu_unlock(task: TaskStruct, idx: int) -> None:
    srcu_read_unlock(uprobes_srcu, idx, task)


def _srcu_call(obj: Any, func: Callable[[Any], None]) -> None:
    call_srcu(uprobes_srcu, obj, func)


def _srcu_synchronize() -> None:
    synchronize_srcu(uprobes_srcu)


def _srcu_barrier() -> None:
    srcu_barrier(uprobes_srcu)


TASKS_TRACE = Protection(
    "RCU tasks trace",
    _trace_lock,
    _trace_unlock,
    call_rcu_tasks_trace,
    synchronize_rcu_tasks_trace,
    rcu_barrier_tasks_trace,
)
SRCU = Protection("SRCU", _srcu_lock, _srcu_unlock, _srcu_call, _srcu_synchronize, _srcu_barrier)

implementation: Protection = TASKS_TRACE
