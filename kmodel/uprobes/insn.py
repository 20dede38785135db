"""How long an x86-64 instruction is.

Models:      arch/x86/lib/insn.c, insn_decode, insn_get_length (7.2), for general-purpose instructions
Guards:      pure functions
Invariants:  none
Leaves out:  VEX, EVEX and three-byte opcodes, moffs, enter, far jumps: their length is "unknown" (0)
Read next:   uprobes/arch.py
"""

import attrs

_PREFIXES = frozenset({0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3})
_OPERAND_SIZE = 0x66

# One-byte opcodes: with a ModR/M byte; with an immediate of one byte; with one of four (two after 0x66).
_ARITHMETIC = range(0, 0x40, 8)
_MODRM = frozenset(
    {base + n for base in _ARITHMETIC for n in range(4)}
    | {0x63, 0x69, 0x6B, 0x80, 0x81, 0x83, *range(0x84, 0x8C), 0x8D, 0x8F}
    | {0xC0, 0xC1, 0xC6, 0xC7, *range(0xD0, 0xD4), *range(0xD8, 0xE0), 0xF6, 0xF7, 0xFE, 0xFF}
)
_IMM8 = frozenset(
    {base + 4 for base in _ARITHMETIC}
    | {0x6A, 0x6B, *range(0x70, 0x80), 0x80, 0x83, 0xA8, *range(0xB0, 0xB8), 0xC0, 0xC1, 0xC6}
    | {0xCD, *range(0xE0, 0xE4), 0xEB}
)
_IMM32 = frozenset({base + 5 for base in _ARITHMETIC} | {0x68, 0x69, 0x81, 0xA9, *range(0xB8, 0xC0), 0xC7})
_REL32 = frozenset({0xE8, 0xE9})
_UNKNOWN = frozenset({0x62, 0x9A, *range(0xA0, 0xA4), 0xC4, 0xC5, 0xC8, 0xCA, 0xEA})

# Two-byte opcodes (0x0F ..): without ModR/M; with an immediate of one byte.
_PLAIN_0F = frozenset(
    {*range(0x05, 0x0A), 0x0B, *range(0x30, 0x38), 0x77, 0xA0, 0xA1, 0xA2, 0xA8, 0xA9, *range(0xC8, 0xD0)}
)
_IMM8_0F = frozenset({*range(0x70, 0x74), 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6})


@attrs.frozen
class Insn:
    """struct insn, as far as uprobes ask. `length` 0: unknown."""

    prefixes: tuple[int, ...]
    rex: int
    opcode: bytes
    modrm: int | None
    immediate: int
    length: int


def insn_decode(code: bytes) -> Insn:
    """Take the instruction apart. Bytes behind its end do not matter; one that is cut off is unknown."""
    try:
        return _decode(code)
    except IndexError:
        return Insn((), 0, code[:1], None, 0, 0)


def _decode(code: bytes) -> Insn:
    at = 0
    while code[at] in _PREFIXES:
        at += 1
    prefixes = tuple(code[:at])
    rex = 0
    if code[at] & 0xF0 == 0x40:
        rex = code[at]
        at += 1
    first = code[at]
    at += 1
    two_bytes = first == 0x0F
    opcode = bytes([first, code[at]]) if two_bytes else bytes([first])
    at += two_bytes
    last = opcode[-1]
    if (not two_bytes and last in _UNKNOWN) or (two_bytes and last in (0x38, 0x3A)):
        return Insn(prefixes, rex, opcode, None, 0, 0)
    near = two_bytes and 0x80 <= last <= 0x8F
    has_modrm = last not in _PLAIN_0F and not near if two_bytes else last in _MODRM
    modrm = None
    if has_modrm:
        modrm = code[at]
        at += 1 + _address_bytes(code, at)
    short = 2 if _OPERAND_SIZE in prefixes else 4
    size = 0
    if two_bytes:
        size = 4 if near else 1 if last in _IMM8_0F else 0
    else:
        if last in _IMM8:
            size = 1
        elif last in _REL32:
            size = 4
        elif last in _IMM32:
            size = 8 if rex & 8 and 0xB8 <= last < 0xC0 else short
        elif last == 0xC2:
            size = 2
        elif last in (0xF6, 0xF7) and modrm is not None and modrm >> 3 & 7 < 2:
            size = 1 if last == 0xF6 else short
    immediate = int.from_bytes(code[at : at + size], "little", signed=True) if size else 0
    if at + size > len(code):
        raise IndexError
    return Insn(prefixes, rex, opcode, modrm, immediate, at + size)


def _address_bytes(code: bytes, at: int) -> int:
    """How many bytes follow the ModR/M byte for its memory operand."""
    mod, rm = code[at] >> 6, code[at] & 7
    if mod == 3:
        return 0
    sib = rm == 4
    if mod == 0:
        far = rm == 5 or (sib and code[at + 1] & 7 == 5)
        return sib + (4 if far else 0)
    return sib + (1 if mod == 1 else 4)
