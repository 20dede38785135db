"""The smallest ELF file that has functions: made by hand, so that tests know every offset in it."""

import struct
from pathlib import Path

TEXT_OFFSET = 0x1000
TEXT_VADDR = 0x401000


def tiny_elf(path: Path, functions: dict[str, tuple[int, int]], text: bytes, *, dynamic: bool = True) -> Path:
    """Write a 64-bit little-endian ELF file whose one executable segment holds `text` at file offset 0x1000.

    `functions` maps a name to (offset within text, symbol type).
    """
    strings = b"\0"
    symbols = bytes(24)
    for name, (offset, kind) in functions.items():
        symbols += struct.pack("<IBBHQQ", len(strings), 1 << 4 | kind, 0, 1, TEXT_VADDR + offset, 16)
        strings += name.encode() + b"\0"
    section_names = b"\0.text\0.sym\0.str\0.shstrtab\0"
    end = TEXT_OFFSET + len(text)
    sym_at, str_at = end, end + len(symbols)
    names_at = str_at + len(strings)
    headers_at = names_at + len(section_names)
    sym_type = 11 if dynamic else 2

    def section(
        name: bytes, kind: int, flags: int, addr: int, at: int, size: int, link: int, entry: int
    ) -> bytes:
        return struct.pack(
            "<IIQQQQIIQQ", section_names.index(name), kind, flags, addr, at, size, link, 0, 1, entry
        )

    sections = (
        bytes(64)
        + section(b".text\0", 1, 6, TEXT_VADDR, TEXT_OFFSET, len(text), 0, 0)
        + section(b".sym\0", sym_type, 2, 0, sym_at, len(symbols), 3, 24)
        + section(b".str\0", 3, 2, 0, str_at, len(strings), 0, 0)
        + section(b".shstrtab\0", 3, 0, 0, names_at, len(section_names), 0, 0)
    )
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        3,
        62,
        1,
        TEXT_VADDR,
        64,
        headers_at,
        0,
        64,
        56,
        1,
        64,
        5,
        4,
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, TEXT_OFFSET, TEXT_VADDR, TEXT_VADDR, len(text), len(text), 0x1000)
    content = (header + load).ljust(TEXT_OFFSET, b"\0") + text + symbols + strings + section_names + sections
    path.write_bytes(content)
    return path
