"""A program's side of probes: calls, returns and jumps, with the traps that they meet.

Models:      nothing in Linux: what a processor does between one trap and the next
Guards:      registers and stack are the calling task's own
Invariants:  none of its own
Leaves out:  what instructions do, but for the stack and ip; one of unknown length is taken for one byte
Read next:   uprobes/handler.py, where the traps arrive; uprobes/sstep.py
"""

from typing import Final

from kmodel.core import current, test_bit
from kmodel.core.task import TIF_SIGPENDING, TIF_UPROBE
from kmodel.uprobes.arch import UPROBE_FIX_IP, UPROBE_SWBP_INSN, UPROBE_SWBP_INSN_SIZE, PtRegs
from kmodel.uprobes.handler import exc_int3, uprobe_notify_resume
from kmodel.uprobes.pages import fetch_opcode
from kmodel.uprobes.sigpending import dequeue_signal, send_sig, sighand_of
from kmodel.uprobes.sstep import uprobe_deny_signal, uprobe_post_sstep_notifier
from kmodel.uprobes.utask import UTASK_SSTEP, UprobeTask
from kmodel.uprobes.xol import uprobe_get_trampoline_vaddr

WORD: Final = 8
SIGSEGV: Final = 11


def call(regs: PtRegs, function: int, return_to: int) -> bool:
    """Call the function at that address: push where to go on, and execute its first byte; whether that was a
    breakpoint.
    """
    regs.sp -= WORD
    regs.stack[regs.sp] = return_to
    return jump(regs, function)


def jump(regs: PtRegs, function: int) -> bool:
    """Go on at a function without a return address of its own: a tail call, if the stack is as at our entry;
    whether its first byte is a breakpoint.
    """
    regs.ip = function
    if fetch_opcode(current().mm, function) != UPROBE_SWBP_INSN:
        return False
    regs.ip += UPROBE_SWBP_INSN_SIZE
    exc_int3(regs)
    finish_step(regs)
    return True


def ret(regs: PtRegs) -> bool:
    """Return: pop the address and go on there; whether that was the trampoline of return probes."""
    regs.ip = regs.stack.pop(regs.sp)
    regs.sp += WORD
    if regs.ip != uprobe_get_trampoline_vaddr():
        return False
    regs.ip += UPROBE_SWBP_INSN_SIZE
    exc_int3(regs)
    return True


def finish_step(regs: PtRegs, fault: bool = False) -> None:
    """If the task was sent to a slot, execute the instruction there and take the trap that follows, as often
    as it takes until the task is out of it. `fault`: the instruction itself faults.
    """
    task = current()
    while True:
        utask = task.utask
        if utask is None or utask.active_uprobe is None:
            return
        get_signal(regs, trapped=fault)  # on the way out, before the step
        if utask.active_uprobe is None or utask.state != UTASK_SSTEP:
            _to_user_mode(regs)
            continue
        step(regs, utask)
        uprobe_post_sstep_notifier(regs)
        _to_user_mode(regs)


def step(regs: PtRegs, utask: UprobeTask) -> None:
    """Execute the instruction at ip, in the slot."""
    arch = utask.active_uprobe.arch
    if arch.fixups & UPROBE_FIX_IP:
        regs.ip += arch.ilen or 1
    else:
        regs.ip = regs.stack.pop(regs.sp, 0)
        regs.sp += WORD


def _to_user_mode(regs: PtRegs) -> None:
    """The loop before user space: probes first, then signals."""
    task = current()
    if test_bit(TIF_UPROBE, task, "thread_info_flags"):
        uprobe_notify_resume(regs, task)
    get_signal(regs)


def get_signal(regs: PtRegs, trapped: bool = False) -> None:
    """Deliver what waits: the handler is entered with ip as it is, delivered() remembers. A fault of the
    instruction is a SIGSEGV for the task itself.
    """
    task = current()
    if trapped and not sighand_of(task).pending >> SIGSEGV & 1:
        send_sig(SIGSEGV, task)
    if not test_bit(TIF_SIGPENDING, task, "thread_info_flags"):
        return
    if uprobe_deny_signal(trapped):
        return
    while sig := dequeue_signal(task):
        task.local.setdefault("delivered", []).append((sig, regs.ip))


def delivered() -> list[tuple[int, int]]:
    """The signals that current took, and where it was then."""
    return list(current().local.get("delivered", ()))


def setjmp(regs: PtRegs) -> tuple[int, int]:
    """Where longjmp() shall lead: the stack pointer and the address."""
    return regs.sp, regs.ip


def longjmp(regs: PtRegs, env: tuple[int, int]) -> None:
    """Go on there, past every frame that was entered since."""
    regs.sp, regs.ip = env
    for address in [address for address in regs.stack if address < regs.sp]:
        del regs.stack[address]
