"""The probed instruction that cannot be emulated: executed out of line, in a slot, by one step.

Models:      kernel/events/uprobes.c, pre_ssout, handle_singlestep, uprobe_deny_signal,
             uprobe_post_sstep_notifier; arch/x86/kernel/uprobes.c, arch_uprobe_pre_xol / _post_xol /
             _abort_xol (7.2)
Guards:      a reference keeps the uprobe: the step ends long after RCU tasks trace was left; the slot is the
             task's own
Invariants:  S1 the reference and the slot are given back at the step's end, however it ends
             S2 no signal handler is entered with ip in a slot (H66)
             S3 who cannot have the uprobe executes the breakpoint again (H02)
Leaves out:  fix-ups of ip-relative operands and of pushed return addresses; the trap flag and trap numbers
Read next:   uprobes/xol.py; uprobes/usermode.py, which does the step
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kmodel.core import (
    WARN_ON_ONCE,
    TaskStruct,
    clear_bit,
    current,
    fatal_signal_pending,
    guards,
    set_bit,
    test_bit,
)
from kmodel.core.task import TIF_SIGPENDING, TIF_UPROBE
from kmodel.sync import spin_lock, spin_unlock
from kmodel.uprobes.arch import UPROBE_FIX_IP, ArchUprobe, PtRegs
from kmodel.uprobes.lifetime import get_uprobe, put_uprobe, try_get_uprobe
from kmodel.uprobes.sigpending import recalc_sigpending, sighand_of
from kmodel.uprobes.uprobe import Uprobe
from kmodel.uprobes.utask import (
    SIGILL,
    UTASK_RUNNING,
    UTASK_SSTEP,
    UTASK_SSTEP_ACK,
    UTASK_SSTEP_TRAPPED,
    UprobeTask,
    force_sig,
)
from kmodel.uprobes.xol import xol_free_insn_slot, xol_get_insn_slot

_PLAIN_GET = guards.register(
    "plain-get-for-step", "H02: a dying uprobe is revived for a single-step, and freed under it"
)
_DENY = guards.register(
    "no-deny-signal", "H66: a signal handler is entered with ip in a slot, which is somebody else's soon"
)

_siglock = False


@contextmanager
def older_deny_signal() -> Iterator[None]:
    """Run the block as before 6.13: siglock is taken to put a signal off and to find it again."""
    global _siglock
    before, _siglock = _siglock, True
    try:
        yield
    finally:
        _siglock = before


# ------------------------------------------------------------------------------------------------ arch


def arch_uprobe_pre_xol(auprobe: ArchUprobe, regs: PtRegs, utask: UprobeTask) -> int:
    """Let the task go on in its slot; 0."""
    regs.ip = utask.xol_vaddr
    return 0


def arch_uprobe_post_xol(auprobe: ArchUprobe, regs: PtRegs, utask: UprobeTask) -> int:
    """The step was made: put ip behind the instruction at its place, unless it jumped by itself; 0."""
    if auprobe.fixups & UPROBE_FIX_IP:
        regs.ip += utask.vaddr - utask.xol_vaddr
    return 0


def arch_uprobe_abort_xol(auprobe: ArchUprobe, regs: PtRegs, utask: UprobeTask) -> None:
    """The step was not made: the task is at the breakpoint again."""
    regs.ip = utask.vaddr


# ------------------------------------------------------------------------------------------------ the step


def pre_ssout(uprobe: Uprobe, regs: PtRegs, bp_vaddr: int, utask: UprobeTask) -> int:
    """Prepare the step: 0, or -EINVAL (the uprobe is dying) or -ENOMEM (no slot), and then the task executes
    what is at the place again. The caller is an RCU tasks trace reader.
    """
    # Readable is not alive: once we leave the section only a reference keeps the uprobe (H02).
    if _PLAIN_GET in guards.removed:
        get_uprobe(uprobe)
    elif try_get_uprobe(uprobe) is None:
        return -errno.EINVAL
    if not xol_get_insn_slot(uprobe.arch.insn, utask):
        put_uprobe(uprobe)
        return -errno.ENOMEM
    utask.vaddr = bp_vaddr
    err = arch_uprobe_pre_xol(uprobe.arch, regs, utask)
    if err:
        xol_free_insn_slot(utask)
        put_uprobe(uprobe)
        return err
    utask.active_uprobe = uprobe
    utask.state = UTASK_SSTEP
    return 0


def uprobe_post_sstep_notifier(regs: PtRegs) -> int:
    """In the debug exception after one instruction: 1 if it was the step of a probe."""
    task = current()
    utask = task.utask
    if utask is None or utask.active_uprobe is None:
        return 0
    utask.state = UTASK_SSTEP_ACK
    set_bit(TIF_UPROBE, task, "thread_info_flags")
    return 1


def handle_singlestep(utask: UprobeTask, regs: PtRegs, task: TaskStruct) -> None:
    """On the way to user space after a step, or after one that a signal prevented."""
    err = 0
    uprobe = utask.active_uprobe
    if utask.state == UTASK_SSTEP_ACK:
        err = arch_uprobe_post_xol(uprobe.arch, regs, utask)
    elif utask.state == UTASK_SSTEP_TRAPPED:
        arch_uprobe_abort_xol(uprobe.arch, regs, utask)
    else:
        WARN_ON_ONCE(True, "a single-step in no known state")
    put_uprobe(uprobe)
    utask.active_uprobe = None
    utask.state = UTASK_RUNNING
    xol_free_insn_slot(utask)

    if _siglock:
        sighand = sighand_of(task)
        spin_lock(sighand.siglock)
        recalc_sigpending(task)  # see uprobe_deny_signal()
        spin_unlock(sighand.siglock)
    elif utask.signal_denied:
        set_bit(TIF_SIGPENDING, task, "thread_info_flags")
        utask.signal_denied = False
    if err:
        force_sig(SIGILL, task)


def uprobe_deny_signal(trapped: bool = False) -> bool:
    """Asked by get_signal(): whether current is in a step, and signals have to wait for its end.

    A fatal one, or a fault of the instruction itself (`trapped`), ends the step at the breakpoint.
    """
    task = current()
    utask: Any = task.utask
    if utask is None or utask.active_uprobe is None or _DENY in guards.removed:
        return False
    WARN_ON_ONCE(utask.state != UTASK_SSTEP, "a signal in a single-step that is over")
    if test_bit(TIF_SIGPENDING, task, "thread_info_flags") or fatal_signal_pending(task):
        # Out of the way, or the task would never get to make its step. Whoever sends another signal meanwhile
        # sets the flag again, and we come here once more.
        if _siglock:
            sighand = sighand_of(task)
            spin_lock(sighand.siglock)
            clear_bit(TIF_SIGPENDING, task, "thread_info_flags")
            spin_unlock(sighand.siglock)
        else:
            utask.signal_denied = True
            clear_bit(TIF_SIGPENDING, task, "thread_info_flags")
        if fatal_signal_pending(task) or trapped:
            utask.state = UTASK_SSTEP_TRAPPED
            set_bit(TIF_UPROBE, task, "thread_info_flags")
    return True
