"""x86-64: the breakpoint instruction, what can be emulated, and the registers of a probed task.

Models:      arch/x86/kernel/uprobes.c, arch_uprobe_analyze_insn, arch_uprobe_skip_sstep;
             arch/x86/include/asm/uprobes.h (7.2)
Guards:      an ArchUprobe is written once, by prepare_uprobe, before UPROBE_COPY_INSN is set; read by anybody
             afterwards
Invariants:  X1 `ops` is set exactly when `insn` was copied
Leaves out:  jmp, jcc and call emulation, the 10-byte nop optimisation, instruction lengths (stubbed:
             docs/limits.md)
Read next:   uprobes/uprobe.py, where it is embedded; uprobes/handler.py, its user
"""

import errno
from typing import Final

import attrs

from kmodel.core import Pooled, kernel_struct

UPROBE_SWBP_INSN: Final = 0xCC
UPROBE_SWBP_INSN_SIZE: Final = 1
MAX_UINSN_BYTES: Final = 16

# What the analysis chose (`ops` of struct arch_uprobe; 0 means not analysed).
OPS_NONE: Final = 0
OPS_NOP: Final = 1
OPS_PUSH: Final = 2
OPS_XOL: Final = 3

_REX_MASK: Final = 0xF0
_REX: Final = 0x40
_REX_B: Final = 0x41
_LOCK: Final = 0xF0
# hlt, cli, sti and in/out: not for user space, so not for a probe either.
_BAD_OPCODES: Final = frozenset({0xF4, 0xFA, 0xFB, 0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF})


@kernel_struct
class ArchUprobe(Pooled):
    """struct arch_uprobe: the original instruction and what is known about it."""

    # Written by prepare_uprobe under consumer_rwsem, before UPROBE_COPY_INSN is set; constant afterwards.
    # Zeroes until then, as kzalloc() left them: an unregister may meet a mapping nobody prepared for.
    insn: bytes = bytes(MAX_UINSN_BYTES)
    ops: int = OPS_NONE
    push_reg: int = 0


@attrs.define(eq=False)
class PtRegs:
    """struct pt_regs: what the trap saved. It belongs to the task that trapped, so engines do not watch
    it.
    """

    ip: int = 0
    sp: int = 0x7FFF_FFFF_E000
    # The sixteen general registers in the instruction set's own numbering, and the words the task has pushed
    # (stub for its stack).
    gpr: list[int] = attrs.field(factory=lambda: [0] * 16)
    stack: dict[int, int] = attrs.field(factory=dict)


def instruction_pointer(regs: PtRegs) -> int:
    """Where the task will go on."""
    return regs.ip


def instruction_pointer_set(regs: PtRegs, ip: int) -> None:
    """Let the task go on at `ip`."""
    regs.ip = ip


def uprobe_get_swbp_addr(regs: PtRegs) -> int:
    """The address of the breakpoint that was just executed: the trap leaves ip behind it."""
    return regs.ip - UPROBE_SWBP_INSN_SIZE


def is_swbp_insn(opcode: int) -> bool:
    """Whether this byte is the breakpoint that uprobes writes."""
    return opcode == UPROBE_SWBP_INSN


def is_trap_insn(opcode: int) -> bool:
    """Whether this byte is any trap instruction of the architecture (here the same one)."""
    return opcode == UPROBE_SWBP_INSN


def arch_uprobe_analyze_insn(auprobe: ArchUprobe, insn: bytes) -> int:
    """Decide how the instruction will be executed; 0, or -ENOTSUPP's stand-in -EOPNOTSUPP for one that must
    not be probed.
    """
    opcode, rest = insn[0], insn[1:]
    if opcode in _BAD_OPCODES or opcode == _LOCK:
        return -ENOTSUPP
    rex_b = 0
    if opcode & _REX_MASK == _REX and rest:
        rex_b = 8 if opcode & 1 else 0
        opcode = rest[0]
    if opcode == 0x90 and insn[0] == 0x90:
        auprobe.ops = OPS_NOP
    elif 0x50 <= opcode <= 0x57 and insn[0] in (opcode, _REX_B):
        auprobe.push_reg = opcode - 0x50 + rex_b
        auprobe.ops = OPS_PUSH
    else:
        auprobe.ops = OPS_XOL
    return 0


ENOTSUPP: Final = 524
"""The kernel's own ENOTSUPP, which user space never sees by name (errno.ENOTSUP is another number)."""

assert ENOTSUPP not in errno.errorcode


def arch_uprobe_skip_sstep(auprobe: ArchUprobe, regs: PtRegs) -> bool:
    """Emulate the probed instruction if that is possible; whether it was. `regs.ip` is at the instruction."""
    ops = auprobe.ops
    if ops == OPS_NOP:
        regs.ip += 1
        return True
    if ops == OPS_PUSH:
        reg = auprobe.push_reg
        regs.sp -= 8
        regs.stack[regs.sp] = regs.gpr[reg]
        regs.ip += 1 if reg < 8 else 2
        return True
    return False
