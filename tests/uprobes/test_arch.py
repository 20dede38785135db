"""The x86 part: what is analysed, what is emulated."""

import pytest

from kmodel.slab import kzalloc
from kmodel.uprobes.arch import (
    ENOTSUPP,
    OPS_NOP,
    OPS_PUSH,
    OPS_XOL,
    ArchUprobe,
    PtRegs,
    arch_uprobe_analyze_insn,
    arch_uprobe_skip_sstep,
    is_trap_insn,
)


def analyzed(insn: bytes) -> tuple[int, ArchUprobe]:
    arch = kzalloc(ArchUprobe)
    assert arch is not None
    return arch_uprobe_analyze_insn(arch, insn.ljust(16, b"\0")), arch


@pytest.mark.parametrize(
    ("insn", "ops", "reg"),
    [
        (b"\x90", OPS_NOP, 0),
        (b"\x55", OPS_PUSH, 5),
        (b"\x41\x57", OPS_PUSH, 15),
        (b"\xf3\x0f\x1e\xfa", OPS_XOL, 0),
        (b"\x48\x89\xe5", OPS_XOL, 0),
        (b"\xc3", OPS_XOL, 0),
    ],
)
def test_analysis_chooses_how_an_instruction_is_executed(insn: bytes, ops: int, reg: int) -> None:
    """nop and push are emulated, everything else is stepped out of line."""
    ret, arch = analyzed(insn)

    assert (ret, arch.ops, arch.push_reg) == (0, ops, reg)


# Recorded on Linux 6.18: of the 256 first bytes (zeroes behind them) those that enabling a probe refuses with
# ENOTSUPP, alone and behind REX.W. tests/uprobes/test_live_kernel.py asks again.
REFUSED = """06 07 0e 16 17 1e 1f 26 27 2e 2f 36 37 3e 3f 60 61 6c 6d 6e 6f 82 9a cd ce cf d4 d6
    e4 e5 e6 e7 ea ec ed ee ef f0 f1 f4 fa fb"""
REFUSED_REX = """06 07 0e 16 17 1e 1f 27 2f 37 3f 60 61 62 6c 6d 6e 6f 82 9a cc cd ce cf d4 d5 d6
    e4 e5 e6 e7 ea ec ed ee ef f1 f4 fa fb"""


@pytest.mark.parametrize(("before", "refused"), [(b"", REFUSED), (b"\x48", REFUSED_REX)])
def test_the_kernel_s_table_of_instructions(before: bytes, refused: str) -> None:
    """Exactly those first bytes are refused; 0xCC alone is the caller's business (__prepare_uprobe)."""
    bad = {byte for byte in range(256) if analyzed(before + bytes([byte]))[0]} - (
        {0xCC} if not before else set()
    )

    assert bad == set(bytes.fromhex(refused))


@pytest.mark.parametrize("insn", ["2e90", "662e0f1f840000000000", "3ee9"])
def test_segment_prefixes_are_refused(insn: str) -> None:
    """cs, ds, es and ss mean nothing in 64-bit code, and the kernel does not probe behind them."""
    assert analyzed(bytes.fromhex(insn))[0] == -ENOTSUPP


@pytest.mark.parametrize("insn", [b"\xf4", b"\xf0\x48", b"\xee"])
def test_instructions_that_must_not_be_probed_are_refused(insn: bytes) -> None:
    """hlt, lock prefixes and port accesses give -ENOTSUPP."""
    assert analyzed(insn)[0] == -ENOTSUPP


def test_nop_is_emulated() -> None:
    """An emulated nop only moves ip."""
    _ret, arch = analyzed(b"\x90")
    regs = PtRegs(ip=100, sp=800)

    assert arch_uprobe_skip_sstep(arch, regs)
    assert (regs.ip, regs.sp, regs.stack) == (101, 800, {})


@pytest.mark.parametrize(("insn", "reg", "length"), [(b"\x53", 3, 1), (b"\x41\x54", 12, 2)])
def test_push_is_emulated(insn: bytes, reg: int, length: int) -> None:
    """An emulated push stores the register below the stack pointer."""
    _ret, arch = analyzed(insn)
    regs = PtRegs(ip=100, sp=800)
    regs.gpr[reg] = 42

    assert arch_uprobe_skip_sstep(arch, regs)
    assert (regs.ip, regs.sp, regs.stack) == (100 + length, 792, {792: 42})


def test_other_instructions_are_not_emulated() -> None:
    """arch_uprobe_skip_sstep leaves the registers alone and says no."""
    _ret, arch = analyzed(b"\xc3")
    regs = PtRegs(ip=100)

    assert not arch_uprobe_skip_sstep(arch, regs)
    assert regs.ip == 100


def test_int3_is_the_only_trap() -> None:
    """0xCC is the trap instruction."""
    assert [byte for byte in range(256) if is_trap_insn(byte)] == [0xCC]


@pytest.mark.parametrize("insn", ["0f1f00", "0f1f440000", "660f1f440000", "6690"])
def test_long_nops_are_emulated(insn: str) -> None:
    """A nop of any length only moves ip, by its length."""
    code = bytes.fromhex(insn)
    _ret, arch = analyzed(code)
    regs = PtRegs(ip=100)

    assert arch_uprobe_skip_sstep(arch, regs)
    assert regs.ip == 100 + len(code)


@pytest.mark.parametrize(
    ("insn", "flags", "ip"),
    [
        ("eb10", 0, 0x112),
        ("ebfe", 0, 0x100),
        ("e900010000", 0, 0x205),
        ("7410", 0, 0x102),  # je, not equal
        ("7410", 1 << 6, 0x112),
        ("7510", 1 << 6, 0x102),
        ("7c10", 1 << 7, 0x112),  # jl: SF != OF
        ("7c10", 1 << 7 | 1 << 11, 0x102),
        ("7e10", 1 << 6, 0x112),
        ("7710", 1, 0x102),  # ja, carry
        ("0f8710000000", 0, 0x116),
    ],
)
def test_jumps_are_emulated(insn: str, flags: int, ip: int) -> None:
    """Relative jumps go where they would from their place; conditional ones by the flags."""
    _ret, arch = analyzed(bytes.fromhex(insn))
    regs = PtRegs(ip=0x100, flags=flags)

    assert arch_uprobe_skip_sstep(arch, regs)
    assert regs.ip == ip


def test_calls_are_emulated() -> None:
    """The return address that is pushed is that of the place."""
    _ret, arch = analyzed(bytes.fromhex("e810000000"))
    regs = PtRegs(ip=0x100, sp=800)

    assert arch_uprobe_skip_sstep(arch, regs)
    assert (regs.ip, regs.sp, regs.stack) == (0x115, 792, {792: 0x105})
