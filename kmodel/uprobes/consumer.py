"""struct uprobe_consumer: somebody who wants to know about hits, and the list a uprobe keeps of them.

Models:      include/linux/uprobes.h, struct uprobe_consumer; kernel/events/uprobes.c, consumer_add,
             filter_chain (7.2)
Guards:      writers of the list hold the uprobe's consumer_rwsem; handler_chain walks it as an RCU tasks
             trace reader
Invariants:  N1 a consumer is on one list at most, N2 after uprobe_unregister_sync() nobody walks over one
             that was deleted
Leaves out:  nothing
Read next:   uprobes/handler.py, which calls the handlers
"""

from collections.abc import Callable
from typing import Any, Final

import attrs

from kmodel.core import Struct, atomic, atomic_inc_return, field, guards, initcall, kernel_struct
from kmodel.rcu import ListHead, list_add_rcu, list_del_rcu, list_for_each_entry
from kmodel.sync import down_read, down_write, up_read, up_write
from kmodel.uprobes.uprobe import Uprobe

_ID_LATE = guards.register(
    "consumer-id-after-add",
    "H65: what Linux 7.2 does, rather than a guard: a session is on the list before it has its id. Without "
    "it the id comes first",
)

# What a handler may return.
UPROBE_HANDLER_NORMAL: Final = 0
UPROBE_HANDLER_REMOVE: Final = 1
"""Take the breakpoint out of this mm, if every consumer agrees."""
UPROBE_HANDLER_IGNORE: Final = 2
"""Do not call my ret_handler for this call."""

type Handler = Callable[[Any, Any, Any], int]
type RetHandler = Callable[[Any, int, Any, Any], int]
type Filter = Callable[[Any, Any], bool]


@attrs.define
class Cookie:
    """The __u64 that a handler's `data` points to: a session's two handlers share its value."""

    value: int = 0


@kernel_struct
class UprobeConsumer(ListHead):
    """Who wants to know. handler(self, regs, data) runs at the probed place, in the task that hit it.

    ret_handler(self, func, regs, data) runs when the function returns; a consumer with both is a "session",
    and `data` is what they share. filter(self, mm) says which address spaces get a breakpoint: it is asked
    when breakpoints are installed or removed, not at every hit, so a handler can be called in an mm its
    filter refuses.
    """

    handler: Handler | None = field(default=None, kw_only=True)
    ret_handler: RetHandler | None = field(default=None, kw_only=True)
    filter: Filter | None = field(default=None, kw_only=True)
    # names the consumer to the return side; set only after the consumer is on the list (H65)
    id: int = field(default=0, init=False)


@kernel_struct
class ConsumerIds(Struct):
    """The counter behind uprobe_consumer.id (a static variable of consumer_add)."""

    last: int = atomic(default=0)


consumer_ids: ConsumerIds


@initcall
def consumers_init() -> None:
    """Start the ids at 1 again."""
    global consumer_ids
    consumer_ids = ConsumerIds()


def consumer_add(uprobe: Uprobe, uc: UprobeConsumer) -> None:
    """Publish a consumer: from here on handlers of `uc` may run."""
    down_write(uprobe.consumer_rwsem)
    if _ID_LATE in guards.removed:
        uc.id = atomic_inc_return(consumer_ids, "last")
        list_add_rcu(uc, uprobe.consumers)
    else:
        list_add_rcu(uc, uprobe.consumers)
        uc.id = atomic_inc_return(consumer_ids, "last")
    up_write(uprobe.consumer_rwsem)


def consumer_del(uprobe: Uprobe, uc: UprobeConsumer) -> None:
    """Unlink a consumer that is on the list. Walkers may still be at it until a grace period has passed."""
    down_write(uprobe.consumer_rwsem)
    list_del_rcu(uc)
    up_write(uprobe.consumer_rwsem)


def consumer_filter(uc: UprobeConsumer, mm: Any) -> bool:
    """Whether this consumer wants breakpoints in `mm`."""
    return uc.filter is None or uc.filter(uc, mm)


def filter_chain(uprobe: Uprobe, mm: Any) -> bool:
    """Whether any consumer wants breakpoints in `mm`."""
    ret = False
    down_read(uprobe.consumer_rwsem)
    for uc in list_for_each_entry(uprobe.consumers):
        ret = consumer_filter(uc, mm)
        if ret:
            break
    up_read(uprobe.consumer_rwsem)
    return ret
