"""A single-step out of line: the uprobe under it, and a signal in the middle.

Models:      kernel/events/uprobes.c, pre_ssout, handle_singlestep, uprobe_deny_signal (7.2)
Guards:      see uprobes/sstep.py
Invariants:  S2 and S3 of uprobes/sstep.py
Leaves out:  the lookup: uprobes/handler.py calls pre_ssout() with what it found
Read next:   uprobes/xol.py
"""

from kmodel.core import boot, current
from kmodel.fs import open_file
from kmodel.hazards.catalogue import Scenario, register
from kmodel.mm import MmStruct
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.uprobes import PtRegs, Uprobe, find_uprobe_rcu, get_xol_area, put_uprobe
from kmodel.uprobes.breakpoint import prepare_uprobe
from kmodel.uprobes.register import alloc_uprobe
from kmodel.uprobes.sigpending import send_sig
from kmodel.uprobes.sstep import pre_ssout
from kmodel.uprobes.usermode import delivered, finish_step
from kmodel.uprobes.utask import alloc_utask
from kmodel.uprobes.xol import UPROBE_XOL_SLOT_BYTES

OFFSET = 0x10
PLACE = 0x400010
MOV = bytes.fromhex("4889e5")
SIGUSR1 = 10


class State:
    """A task with an XOL area, and a probe on an instruction that has to be stepped."""

    def __init__(self) -> None:
        boot()
        file = open_file("/bin/prog", contents=bytes(OFFSET) + MOV + bytes(64))
        self.inode = file.f_inode
        uprobe = alloc_uprobe(self.inode, OFFSET, 0)
        assert isinstance(uprobe, Uprobe)
        assert prepare_uprobe(uprobe) == 0
        self.uprobe = uprobe
        self.mm = MmStruct()
        task = current()
        before, task.mm = task.mm, self.mm
        area = get_xol_area(task)
        task.mm = before
        assert area is not None
        self.slot = area.vaddr + UPROBE_XOL_SLOT_BYTES
        self.utask = alloc_utask()
        self.utask.ri_timer.function = None


def hit_and_step(state: State) -> None:
    """The second half of handle_swbp(), the step, and the way back."""
    task = current()
    task.mm, task.utask = state.mm, state.utask
    regs = PtRegs(ip=PLACE)
    rcu_read_lock_trace(task)
    uprobe = find_uprobe_rcu(state.inode, OFFSET)
    if uprobe is not None:
        pre_ssout(uprobe, regs, PLACE, state.utask)
    rcu_read_unlock_trace(task)
    finish_step(regs)
    assert regs.ip in (PLACE, PLACE + len(MOV)), f"the task goes on at {regs.ip:#x}"


def unregister(state: State) -> None:
    """The last put."""
    put_uprobe(state.uprobe)


register(
    Scenario(
        name="step-dying-uprobe",
        hazards="H02",
        summary="A task revives a dying uprobe for its single-step, and steps on when it is freed.",
        setup=State,
        threads=(unregister, hit_and_step),
        memory="sc",
        without="plain-get-for-step",
        breaks="use-after-free",
        options={"warnings": False},
    )
)


def hit_with_signal(state: State) -> None:
    """Somebody sends a signal while the task is in its slot (its own call, to have them in this order)."""
    task = current()
    task.mm, task.utask = state.mm, state.utask
    regs = PtRegs(ip=PLACE)
    rcu_read_lock_trace(task)
    assert pre_ssout(state.uprobe, regs, PLACE, state.utask) == 0
    rcu_read_unlock_trace(task)
    send_sig(SIGUSR1, task)
    finish_step(regs)
    for sig, ip in delivered():
        assert not state.slot <= ip < state.slot + UPROBE_XOL_SLOT_BYTES, (
            f"the handler of signal {sig} will return to {ip:#x}, a slot"
        )


register(
    Scenario(
        name="step-signal",
        hazards="H66",
        summary="A signal arrives in a single-step, and its handler is entered with ip in the slot.",
        setup=State,
        threads=(hit_with_signal,),
        memory="sc",
        without="no-deny-signal",
        breaks="assertion",
    )
)
