"""A program's side of probes: calls, returns and jumps, with the traps that they meet.

Models:      nothing in Linux: what a processor does between one trap and the next
Guards:      registers and stack are the calling task's own
Invariants:  none of its own
Leaves out:  everything but the stack discipline of calls; arguments, results, other instructions
Read next:   uprobes/handler.py, where the traps arrive
"""

from kmodel.core import current
from kmodel.uprobes.arch import UPROBE_SWBP_INSN, UPROBE_SWBP_INSN_SIZE, PtRegs
from kmodel.uprobes.handler import exc_int3
from kmodel.uprobes.pages import fetch_opcode
from kmodel.uprobes.xol import uprobe_get_trampoline_vaddr

WORD = 8


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


def setjmp(regs: PtRegs) -> tuple[int, int]:
    """Where longjmp() shall lead: the stack pointer and the address."""
    return regs.sp, regs.ip


def longjmp(regs: PtRegs, env: tuple[int, int]) -> None:
    """Go on there, past every frame that was entered since."""
    regs.sp, regs.ip = env
    for address in [address for address in regs.stack if address < regs.sp]:
        del regs.stack[address]
