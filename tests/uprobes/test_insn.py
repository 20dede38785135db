"""Lengths of instructions, beside what the assembler and the processor's manual say."""

import pytest

from kmodel.uprobes.insn import insn_decode


@pytest.mark.parametrize(
    ("code", "length"),
    [
        ("90", 1),
        ("55", 1),
        ("4157", 2),
        ("c3", 1),
        ("c20800", 3),
        ("f30f1efa", 4),  # endbr64
        ("4889e5", 3),  # mov %rsp,%rbp
        ("4883ec10", 4),  # sub $16,%rsp
        ("4881ec00010000", 7),
        ("31c0", 2),
        ("b801000000", 5),
        ("48b80102030405060708", 10),
        ("66b80100", 4),
        ("8b442408", 4),  # mov 8(%rsp),%eax
        ("8b0425ffffffff", 7),  # mov absolute
        ("488d3d10000000", 7),  # lea 16(%rip),%rdi
        ("488b8510ffffff", 7),
        ("f60701", 3),  # testb $1,(%rdi)
        ("f7d8", 2),  # neg %eax
        ("48f7c701000000", 7),
        ("0f1f440000", 5),
        ("660f1f440000", 6),
        ("0f84aabbccdd", 6),
        ("7505", 2),
        ("e8aabbccdd", 5),
        ("0fbae31f", 4),
        ("0f05", 2),
        ("c5f877", 0),  # VEX
    ],
)
def test_lengths(code: str, length: int) -> None:
    """Bytes that follow do not matter; what the decoder leaves out is unknown."""
    assert insn_decode(bytes.fromhex(code).ljust(16, b"\xcc")).length == length


def test_a_cut_off_instruction_is_unknown() -> None:
    """The page ended: no length."""
    assert insn_decode(bytes.fromhex("4881ec0001")).length == 0
