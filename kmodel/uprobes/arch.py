"""x86-64: the breakpoint instruction, what can be emulated, and the registers of a probed task.

Models:      arch/x86/kernel/uprobes.c, arch_uprobe_analyze_insn, arch_uprobe_skip_sstep;
             arch/x86/include/asm/uprobes.h (7.2)
Guards:      an ArchUprobe is written once, by prepare_uprobe, before UPROBE_COPY_INSN is set; read by anybody
             afterwards
Invariants:  X1 `ops` is set exactly when `insn` was copied
Leaves out:  the 10-byte nop optimisation, ip-relative operands (stubbed: docs/limits.md); arm64
Read next:   uprobes/uprobe.py, where it is embedded; uprobes/handler.py, its user
"""

import errno
from typing import Final

import attrs

from kmodel.core import Pooled, kernel_struct
from kmodel.uprobes.insn import Insn, insn_decode

UPROBE_SWBP_INSN: Final = 0xCC
UPROBE_SWBP_INSN_SIZE: Final = 1
MAX_UINSN_BYTES: Final = 16

# What the analysis chose (`ops` of struct arch_uprobe; 0 means not analysed).
OPS_NONE: Final = 0
OPS_NOP: Final = 1
OPS_PUSH: Final = 2
OPS_XOL: Final = 3
OPS_BRANCH: Final = 4

UPROBE_FIX_IP: Final = 1
"""After the step ip is relative to the slot, and must be moved to the place."""

# Bits of the flags register that conditional jumps look at.
X86_EFLAGS_CF: Final = 1 << 0
X86_EFLAGS_PF: Final = 1 << 2
X86_EFLAGS_ZF: Final = 1 << 6
X86_EFLAGS_SF: Final = 1 << 7
X86_EFLAGS_OF: Final = 1 << 11

_CALL: Final = 0xE8
# ret, with and without a number, near and far: they say themselves where to go on.
_RETURNS: Final = frozenset({0xC2, 0xC3, 0xCA, 0xCB})

_REX_B: Final = 0x41
# lock, and the segments that 64-bit code does not have (cs, ds, es, ss; ds doubles as a branch hint).
_BAD_PREFIXES: Final = frozenset({0xF0, 0x26, 0x2E, 0x36, 0x3E})
# What the kernel's table of good instructions leaves out: hlt, cli, sti, in and out, int and iret, which are
# not for user space, so not for a probe either; and what is no instruction in 64-bit code.
_BAD_OPCODES: Final = frozenset(
    {0xF4, 0xFA, 0xFB, *range(0xE4, 0xE8), *range(0xEC, 0xF0), *range(0x6C, 0x70)}
    | {0xCC, 0xCD, 0xCE, 0xCF, 0xF1}
    | {0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0x27, 0x2F, 0x37, 0x3F}
    | {0x60, 0x61, 0x82, 0x9A, 0xD4, 0xD6, 0xEA}
)
# Prefixes of newer instructions: bad only behind a REX prefix, which they do not go with.
_EVEX: Final = 0x62
_REX2: Final = 0xD5


@kernel_struct
class ArchUprobe(Pooled):
    """struct arch_uprobe: the original instruction and what is known about it."""

    # Written by prepare_uprobe under consumer_rwsem, before UPROBE_COPY_INSN is set; constant afterwards.
    # Zeroes until then, as kzalloc() left them: an unregister may meet a mapping nobody prepared for.
    insn: bytes = bytes(MAX_UINSN_BYTES)
    ops: int = OPS_NONE
    push_reg: int = 0
    # the instruction's length, 0 if it is not known
    ilen: int = 0
    fixups: int = 0
    # a branch: its opcode (jcc: 0x70 + condition), and how far from its end it goes
    opc1: int = 0
    offs: int = 0


@attrs.define(eq=False)
class PtRegs:
    """struct pt_regs: what the trap saved. It belongs to the task that trapped, so engines do not watch
    it.
    """

    ip: int = 0
    flags: int = 0
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
    """Decide how the instruction will be executed; 0, or -ENOTSUPP for one that must not be probed."""
    decoded = insn_decode(insn)
    if is_prefix_bad(decoded) or decoded.opcode[0] in _BAD_OPCODES:
        return -ENOTSUPP
    if decoded.rex and decoded.opcode[0] in (_EVEX, _REX2):
        return -ENOTSUPP
    auprobe.ilen = decoded.length
    opcode = decoded.opcode
    if _insn_is_nop(decoded):
        auprobe.ops = OPS_NOP
    elif _branch_setup(auprobe, decoded):
        auprobe.ops = OPS_BRANCH
    elif 0x50 <= opcode[0] <= 0x57 and not decoded.prefixes and decoded.rex in (0, _REX_B):
        auprobe.push_reg = opcode[0] - 0x50 + (8 if decoded.rex else 0)
        auprobe.ops = OPS_PUSH
    else:
        auprobe.ops = OPS_XOL
        auprobe.fixups = 0 if opcode[0] in _RETURNS else UPROBE_FIX_IP
    return 0


def is_prefix_bad(insn: Insn) -> bool:
    """Whether a prefix forbids to probe the instruction."""
    return not _BAD_PREFIXES.isdisjoint(insn.prefixes)


def _insn_is_nop(insn: Insn) -> bool:
    """0x90 (which with REX.B is an exchange) and the multi-byte nop, 0x0F 0x1F /0."""
    if any(prefix != 0x66 for prefix in insn.prefixes):
        return False
    if insn.opcode == b"\x90":
        return not insn.rex & 1
    return insn.opcode == b"\x0f\x1f" and insn.modrm is not None and insn.modrm >> 3 & 7 == 0


def _branch_setup(auprobe: ArchUprobe, insn: Insn) -> bool:
    """Whether this is a relative jump or call, which can be emulated; remember where it goes."""
    if insn.prefixes or not insn.length:
        return False
    opcode = insn.opcode
    if opcode in (b"\xe8", b"\xe9", b"\xeb") or (len(opcode) == 1 and 0x70 <= opcode[0] <= 0x7F):
        auprobe.opc1 = opcode[0]
    elif len(opcode) == 2 and 0x80 <= opcode[1] <= 0x8F:
        auprobe.opc1 = opcode[1] - 0x10
    else:
        return False
    auprobe.offs = insn.immediate
    return True


def check_jmp_cond(opc1: int, flags: int) -> bool:
    """Whether the jump 0x70 + condition is taken with these flags."""
    cf, zf, pf = bool(flags & X86_EFLAGS_CF), bool(flags & X86_EFLAGS_ZF), bool(flags & X86_EFLAGS_PF)
    sf, of = bool(flags & X86_EFLAGS_SF), bool(flags & X86_EFLAGS_OF)
    taken = (of, cf, zf, cf or zf, sf, pf, sf != of, zf or sf != of)[opc1 >> 1 & 7]
    return taken != bool(opc1 & 1)


ENOTSUPP: Final = 524
"""The kernel's own ENOTSUPP, which user space never sees by name (errno.ENOTSUP is another number)."""

assert ENOTSUPP not in errno.errorcode


def arch_uprobe_skip_sstep(auprobe: ArchUprobe, regs: PtRegs) -> bool:
    """Emulate the probed instruction if that is possible; whether it was. `regs.ip` is at the instruction."""
    ops = auprobe.ops
    if ops == OPS_NOP:
        regs.ip += auprobe.ilen
        return True
    if ops == OPS_PUSH:
        reg = auprobe.push_reg
        regs.sp -= 8
        regs.stack[regs.sp] = regs.gpr[reg]
        regs.ip += auprobe.ilen
        return True
    if ops == OPS_BRANCH:
        return _branch_emulate_op(auprobe, regs)
    return False


def _branch_emulate_op(auprobe: ArchUprobe, regs: PtRegs) -> bool:
    new_ip = regs.ip + auprobe.ilen
    opc1 = auprobe.opc1
    offs = auprobe.offs
    if opc1 == _CALL:
        # The return address is that of the place, not of a slot: why calls are better emulated than stepped.
        regs.sp -= 8
        regs.stack[regs.sp] = new_ip
    elif 0x70 <= opc1 <= 0x7F and not check_jmp_cond(opc1, regs.flags):
        offs = 0
    regs.ip = new_ip + offs
    return True
