"""struct return_instance: one call of a probed function that has not returned yet, and its second life.

Models:      kernel/events/uprobes.c, alloc_return_instance, free_ret_instance, ri_pool_push / _pop, ri_free,
             cleanup_return_instances, push_consumer, return_consumer_find; arch/x86/kernel/uprobes.c,
             arch_uretprobe_is_alive (7.2)
Guards:      the list is changed by its own task only; the timer walks it inside RCU, as ri_seqcount's writer
Invariants:  R1 an instance that the timer may be looking at is freed after a grace period, not reused (H61)
Leaves out:  the inline first consumer beside the array of further ones: here it is one list
Read next:   uprobes/uretprobe.py, which pushes and pops
"""

from typing import Any, Final

import attrs

from kmodel.core import Pooled, embedded, guards, kernel_struct, rcu_assign_pointer, untraced
from kmodel.rcu import kfree_rcu
from kmodel.slab import kfree, kzalloc
from kmodel.sync import raw_seqcount_try_begin
from kmodel.uprobes.arch import PtRegs
from kmodel.uprobes.hprobe import Hprobe, hprobe_consume, hprobe_finalize

_SEQ = guards.register(
    "no-ri-seqcount", "H61: an instance is reused while the timer looks at it, and leads it astray"
)
_RCU = guards.register("no-ri-rcu", "H61: an instance is freed while the timer looks at it")
_ALIVE = guards.register("no-uretprobe-alive-check", "H64: frames that a longjmp left out keep their leases")

# Who asks whether a frame is alive: a call, a tail call, a return (enum rp_check).
RP_CHECK_CALL: Final = 0
RP_CHECK_CHAIN_CALL: Final = 1
RP_CHECK_RET: Final = 2


@attrs.define
class ReturnConsumer:
    """struct return_consumer: what a session's entry handler left for its return handler."""

    id: int
    cookie: int


@kernel_struct
class ReturnInstance(Pooled):
    """struct return_instance."""

    hprobe: Hprobe = embedded(factory=Hprobe)

    # the owner's
    func: int = untraced(default=0)  # the probed address
    stack: int = untraced(default=0)  # the stack pointer at its entry
    orig_ret_vaddr: int = untraced(default=0)
    chained: bool = untraced(default=False)  # entered by a tail call: shares the return with the next one
    consumers: list[ReturnConsumer] = untraced(factory=list)

    # write: the owner; read: the timer, inside RCU
    next: Any = None


# ------------------------------------------------------------------------------------------------ memory


def ri_pool_push(utask: Any, ri: ReturnInstance) -> None:
    """Keep the instance for the task's next probed call."""
    ri.consumers.clear()
    ri.next = utask.ri_pool
    utask.ri_pool = ri


def ri_pool_pop(utask: Any) -> ReturnInstance | None:
    """An instance kept from earlier, or None."""
    ri: ReturnInstance | None = utask.ri_pool
    if ri is not None:
        utask.ri_pool = ri.next
    return ri


def alloc_return_instance(utask: Any) -> ReturnInstance | None:
    """An instance for a call that begins; None without memory."""
    ri = ri_pool_pop(utask)
    if ri is not None:
        return ri
    ri = kzalloc(ReturnInstance)
    if ri is not None:
        ri.consumers = []
    return ri


def ri_free(ri: ReturnInstance) -> None:
    """Free an instance that the timer may still be looking at."""
    if _RCU in guards.removed:
        kfree(ri)
    else:
        kfree_rcu(ri)


def free_ret_instance(utask: Any, ri: ReturnInstance, cleanup_hprobe: bool) -> None:
    """An instance left the list. `cleanup_hprobe`: its function did not return, end its lease."""
    if cleanup_hprobe:
        _uprobe, hstate = hprobe_consume(ri.hprobe)
        hprobe_finalize(ri.hprobe, hstate)
    # The timer's turn is a write section. Even: the timer is not at it, and a turn that begins now finds the
    # list without the instance. Odd: it may have the instance in its hand.
    quiet, _seq = raw_seqcount_try_begin(utask.ri_seqcount)
    if quiet or _SEQ in guards.removed:
        ri_pool_push(utask, ri)
    else:
        ri_free(ri)


# ------------------------------------------------------------------------------------------------ sessions


def push_consumer(ri: ReturnInstance, consumer_id: int, cookie: int) -> None:
    """Remember that this session's entry handler wants its return, and with what."""
    ri.consumers.append(ReturnConsumer(consumer_id, cookie))


def return_consumer_find(
    ri: ReturnInstance, begin: int, consumer_id: int
) -> tuple[ReturnConsumer | None, int]:
    """(what this session left here or None, where to begin next time).

    Consumers are walked in the same order on both sides, so each search begins where the last one ended.
    """
    for idx in range(begin, len(ri.consumers)):
        if ri.consumers[idx].id == consumer_id:
            return ri.consumers[idx], idx + 1
    return None, begin


# ------------------------------------------------------------------------------------------------ frames


def arch_uretprobe_is_alive(ret: ReturnInstance, ctx: int, regs: PtRegs) -> bool:
    """Whether the frame can still return: the stack pointer has not passed it. A tail call may be at the very
    same place.
    """
    return regs.sp < ret.stack if ctx == RP_CHECK_CALL else regs.sp <= ret.stack


def cleanup_return_instances(utask: Any, chained: bool, regs: PtRegs) -> None:
    """Drop the instances of frames that a longjmp() skipped; they would give a wrong return address and keep
    their leases (H64).
    """
    if _ALIVE in guards.removed:
        return
    ctx = RP_CHECK_CHAIN_CALL if chained else RP_CHECK_CALL
    ri = utask.return_instances
    while ri is not None and not arch_uretprobe_is_alive(ri, ctx, regs):
        ri_next = ri.next
        rcu_assign_pointer(utask, "return_instances", ri_next)
        utask.depth -= 1
        free_ret_instance(utask, ri, cleanup_hprobe=True)
        ri = ri_next


def find_next_ret_chain(ri: ReturnInstance) -> ReturnInstance | None:
    """The first instance below that has a return of its own to wait for: behind `ri` and its tail callers."""
    nxt: Any = ri
    while True:
        chained = nxt.chained
        nxt = nxt.next
        if not chained:
            return nxt  # type: ignore[no-any-return]
