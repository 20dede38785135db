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

from typing import Any

from kmodel.core import WARN, WARN_ON_ONCE, TaskStruct, current, data_race, guards, smp_rmb, test_bit
from kmodel.rcu import list_for_each_entry_rcu, rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.sync import down_read, up_read
from kmodel.uprobes.arch import (
    UPROBE_SWBP_INSN_SIZE,
    PtRegs,
    arch_uprobe_ignore,
    arch_uprobe_optimize,
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
    if not test_bit(UPROBE_COPY_INSN, uprobe, "flags") and "no-copy-insn-test" not in guards.removed:
        return
    smp_rmb()  # pairs with smp_wmb() in prepare_uprobe: who sees the bit sees the instruction (H47)

    arch = uprobe.arch
    utask = get_utask(task)
    if arch_uprobe_ignore(arch, regs):
        return
    utask.auprobe = arch
    handler_chain(uprobe, regs, task)
    utask.auprobe = None
    arch_uprobe_optimize(arch, bp_vaddr)
    if regs.ip != bp_vaddr:
        return  # a handler sent the task elsewhere
    if not arch_uprobe_skip_sstep(arch, regs):
        pre_ssout(regs, bp_vaddr)


def pre_ssout(regs: PtRegs, bp_vaddr: int) -> None:
    """Stub for execution out of line: the step is over at once, and leaves the task behind the breakpoint's
    byte.
    """
    regs.ip = bp_vaddr + UPROBE_SWBP_INSN_SIZE


def handler_chain(uprobe: Uprobe, regs: PtRegs, task: TaskStruct) -> None:
    """Run the handler of every consumer; if there was one and all of them want it, remove the breakpoint from
    this mm.

    Filters are not asked here: they were when the breakpoint was installed.
    """
    if call_handlers(uprobe, regs):
        remove_unwanted(uprobe, task.mm)


def call_handlers(uprobe: Uprobe, regs: PtRegs) -> bool:
    """Whether there was a consumer and every one returned UPROBE_HANDLER_REMOVE. One with only a ret_handler
    counts as 0.
    """
    has_consumers = False
    remove = True
    for uc in list_for_each_entry_rcu(uprobe.consumers):
        handler = uc.handler
        rc = 0
        if handler is not None:
            rc = handler(uc, regs, None)
            if rc != UPROBE_HANDLER_NORMAL:
                WARN(
                    rc < 0 or rc > 2, "a uprobe handler returned something that is not a UPROBE_HANDLER_ code"
                )
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
