"""A task hit a breakpoint: find the probe, run its handlers, and go on as if nothing had been there.

Models:      kernel/events/uprobes.c, handle_swbp, handler_chain, unapply_uprobe (7.2)
Guards:      RCU tasks trace from the lookup to the end: it keeps the uprobe and every consumer on its list
             readable
Invariants:  P7 no handler of a consumer runs after uprobe_unregister_sync(), P10 no SIGTRAP for a breakpoint
             that is ours
Leaves out:  (later parts add these) the return trampoline, return instances and session data, execution out
             of line: an instruction that cannot be emulated is taken to have been stepped (docs/limits.md)
Read next:   uprobes/lookup.py

Where the task goes on, by the value of regs.ip afterwards:
    bp_vaddr        again at the place: nothing was done, or not everything; what is there now is executed
    anywhere else   the instruction was emulated or stepped, or a handler moved the task
"""

from typing import Any, Final

from kmodel.core import READ_ONCE, WARN, WARN_ON_ONCE, TaskStruct, current, data_race, guards, smp_rmb
from kmodel.rcu import list_for_each_entry_rcu, rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.sync import down_read, up_read
from kmodel.uprobes.arch import (
    UPROBE_SWBP_INSN_SIZE,
    PtRegs,
    arch_uprobe_skip_sstep,
    uprobe_get_swbp_addr,
)
from kmodel.uprobes.breakpoint import unapply_uprobe
from kmodel.uprobes.consumer import UPROBE_HANDLER_NORMAL, UPROBE_HANDLER_REMOVE, filter_chain
from kmodel.uprobes.lookup import find_active_uprobe_rcu
from kmodel.uprobes.tree import uprobe_is_active
from kmodel.uprobes.uprobe import UPROBE_COPY_INSN, Uprobe
from kmodel.uprobes.utask import SIGTRAP, force_sig, get_utask

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
    utask.auprobe = arch
    if handler_chain(uprobe, regs):
        remove_unwanted(uprobe, task.mm)
    utask.auprobe = None
    # Here it calls arch_uprobe_optimize(), which is left out.
    if regs.ip != bp_vaddr:
        return  # a handler sent the task elsewhere
    if not arch_uprobe_skip_sstep(arch, regs):
        pre_ssout(regs, bp_vaddr)


def pre_ssout(regs: PtRegs, bp_vaddr: int) -> None:
    """Stub for execution out of line: the step is over at once, and ip is behind the breakpoint's byte."""
    regs.ip = bp_vaddr + UPROBE_SWBP_INSN_SIZE


def handler_chain(uprobe: Uprobe, regs: PtRegs) -> bool:
    """Run the handler of every consumer. Whether there was one and all of them returned
    UPROBE_HANDLER_REMOVE.

    Filters are not asked here: they were when the breakpoint was installed. A consumer with only a
    ret_handler counts as one that returned 0.
    """
    has_consumers = False
    remove = True
    for uc in list_for_each_entry_rcu(uprobe.consumers):
        handler = uc.handler
        rc = 0
        if handler is not None:
            rc = handler(uc, regs, None)
            if rc != UPROBE_HANDLER_NORMAL:
                WARN(rc < 0 or rc > 2, "a uprobe handler did not return an UPROBE_HANDLER_ code")
        if rc != UPROBE_HANDLER_REMOVE:
            remove = False
        has_consumers = True
    return remove and has_consumers


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
