"""A task hit a breakpoint: find the probe, run its handlers, and go on as if nothing had been there.

Models:      kernel/events/uprobes.c, handle_swbp, handler_chain, unapply_uprobe (7.2)
Guards:      RCU tasks trace from the lookup to the end: it keeps the uprobe and every consumer on its list
             readable
Invariants:  P7 no handler of a consumer runs after uprobe_unregister_sync(), P10 no SIGTRAP for a breakpoint
             that is ours
Leaves out:  arch_uprobe_optimize
Read next:   uprobes/lookup.py; uprobes/sstep.py for what cannot be emulated; uprobes/uretprobe.py for the
             way back

Where the task goes on, by the value of regs.ip afterwards:
    bp_vaddr        again at the place: nothing was done, or not everything; what is there now is executed
    a slot          the instruction is executed there, by one step: until then utask.active_uprobe is set
    anywhere else   the instruction was emulated, or a handler moved the task
"""

from typing import Any, Final

from kmodel.core import (
    READ_ONCE,
    WARN,
    WARN_ON_ONCE,
    TaskStruct,
    clear_bit,
    current,
    data_race,
    guards,
    smp_rmb,
)
from kmodel.core.task import TIF_UPROBE
from kmodel.rcu import list_for_each_entry_rcu, rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.sync import down_read, up_read
from kmodel.uprobes.arch import (
    PtRegs,
    arch_uprobe_skip_sstep,
    uprobe_get_swbp_addr,
)
from kmodel.uprobes.breakpoint import unapply_uprobe
from kmodel.uprobes.consumer import (
    UPROBE_HANDLER_IGNORE,
    UPROBE_HANDLER_NORMAL,
    UPROBE_HANDLER_REMOVE,
    Cookie,
    filter_chain,
)
from kmodel.uprobes.lookup import find_active_uprobe_rcu
from kmodel.uprobes.return_instance import ReturnInstance, alloc_return_instance, push_consumer
from kmodel.uprobes.sstep import handle_singlestep, pre_ssout
from kmodel.uprobes.tree import uprobe_is_active
from kmodel.uprobes.uprobe import UPROBE_COPY_INSN, Uprobe
from kmodel.uprobes.uretprobe import prepare_uretprobe, uprobe_handle_trampoline
from kmodel.uprobes.utask import SIGTRAP, UprobeTask, force_sig, get_utask, uprobe_pre_sstep_notifier
from kmodel.uprobes.xol import uprobe_get_trampoline_vaddr

guards.register(
    "no-copy-insn-test", "H46: handlers and emulation use a uprobe whose instruction was not copied yet"
)
guards.register(
    "no-removal-recheck", "H55: a breakpoint is removed although a consumer that wants it came meanwhile"
)

COPY_INSN: Final = 1 << UPROBE_COPY_INSN


def handle_swbp(regs: PtRegs) -> None:
    """Handle the breakpoint that current executed just before regs.ip."""
    task = current()
    bp_vaddr = uprobe_get_swbp_addr(regs)
    if bp_vaddr == uprobe_get_trampoline_vaddr(task):
        uprobe_handle_trampoline(regs)
        return
    rcu_read_lock_trace(task)
    try:
        uprobe, is_swbp = find_active_uprobe_rcu(bp_vaddr, task)
        if uprobe is not None:
            handle_uprobe(uprobe, regs, bp_vaddr, task)
        elif is_swbp > 0:
            force_sig(SIGTRAP, task)  # somebody else's breakpoint
        else:
            regs.ip = bp_vaddr  # ours, but gone or unreadable meanwhile: execute what is there now
    finally:
        rcu_read_unlock_trace(task)


def handle_uprobe(uprobe: Uprobe, regs: PtRegs, bp_vaddr: int, task: TaskStruct) -> None:
    """The second half of handle_swbp: the breakpoint is this uprobe's, and something keeps the uprobe
    readable.
    """
    regs.ip = bp_vaddr  # in advance, for the handlers and for every way to restart below

    # Unregister and register may have put a new uprobe here whose instruction is not copied yet: come back
    # later (H46).
    if not READ_ONCE(uprobe, "flags") & COPY_INSN and "no-copy-insn-test" not in guards.removed:
        return
    smp_rmb()  # pairs with smp_wmb() in prepare_uprobe: who sees the bit sees the instruction (H47)

    arch = uprobe.arch
    utask = get_utask(task)
    # Here the kernel asks arch_uprobe_ignore(), which no x86 has.
    handler_chain(uprobe, regs, utask, task)
    # Here it calls arch_uprobe_optimize(), which is left out.
    if regs.ip != bp_vaddr:
        return  # a handler sent the task elsewhere
    if not arch_uprobe_skip_sstep(arch, regs):
        pre_ssout(uprobe, regs, bp_vaddr, utask)  # an error: ip is at the breakpoint still, which traps again


def handler_chain(uprobe: Uprobe, regs: PtRegs, utask: UprobeTask, task: TaskStruct) -> None:
    """Run the handler of every consumer; arrange for the return if one wants it; remove the breakpoint from
    this mm if all of them returned UPROBE_HANDLER_REMOVE.

    Filters are not asked here: they were when the breakpoint was installed. A consumer with only a
    ret_handler counts as one that returned 0.
    """
    has_consumers = False
    remove = True
    ri: ReturnInstance | None = None
    no_memory = False
    utask.auprobe = uprobe.arch
    for uc in list_for_each_entry_rcu(uprobe.consumers):
        handler = uc.handler
        wants_return = uc.ret_handler is not None
        rc = 0
        cookie = None
        if handler is not None:
            if wants_return:
                cookie = Cookie()
            rc = handler(uc, regs, cookie)
            if rc != UPROBE_HANDLER_NORMAL:
                WARN(rc < 0 or rc > 2, "a uprobe handler did not return an UPROBE_HANDLER_ code")
        if rc != UPROBE_HANDLER_REMOVE:
            remove = False
        has_consumers = True

        if not wants_return or rc in (UPROBE_HANDLER_REMOVE, UPROBE_HANDLER_IGNORE) or no_memory:
            continue
        if ri is None:
            ri = alloc_return_instance(utask)
            if ri is None:
                no_memory = True
                continue
        if cookie is not None:
            push_consumer(ri, uc.id, cookie.value)
    utask.auprobe = None

    if ri is not None:
        prepare_uretprobe(uprobe, regs, ri)
    if remove and has_consumers:
        remove_unwanted(uprobe, task.mm)


def remove_unwanted(uprobe: Uprobe, mm: Any) -> None:
    """The end of handler_chain: remove the breakpoints in `mm`, if still nobody wants them there.

    A consumer may have been registered since the handlers ran. register_rwsem keeps further ones out; asking
    the filters again under it finds this one (H55).
    """
    down_read(uprobe.register_rwsem)
    if "no-removal-recheck" in guards.removed or not filter_chain(uprobe, mm):
        # Without the treelock: rotations move the link meanwhile, but none makes it say "in no tree".
        active = data_race(lambda: uprobe_is_active(uprobe))
        WARN_ON_ONCE(not active, "breakpoints of a uprobe that left the tree")
        unapply_uprobe(uprobe, mm)
    up_read(uprobe.register_rwsem)


def exc_int3(regs: PtRegs) -> None:
    """The breakpoint exception: the uprobes notifier, or else SIGTRAP (arch/x86/kernel/traps.c)."""
    task = current()
    if not uprobe_pre_sstep_notifier(regs):
        force_sig(SIGTRAP, task)
        return
    uprobe_notify_resume(regs, task)


def uprobe_notify_resume(regs: PtRegs, task: TaskStruct) -> None:
    """On the way back to user space with TIF_UPROBE set."""
    clear_bit(TIF_UPROBE, task, "thread_info_flags")
    utask = task.utask
    if utask is not None and utask.active_uprobe is not None:
        handle_singlestep(utask, regs, task)
    else:
        handle_swbp(regs)
