"""Real programs: which functions an ELF file has, where they are in the file, and the bytes found there.

Models:      what perf probe and tracefs users do before they write PATH:OFFSET: a symbol becomes an offset in
             a file
Guards:      none; files are read once, before any task runs
Invariants:  Y1 an offset given out lies in an executable PT_LOAD segment's file bytes
Leaves out:  symbol versions, separate debug files, compressed sections
Read next:   torture/probes.py
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

STT_FUNC = 2
STT_GNU_IFUNC = 10
PF_X = 1
_SYMBOL_TABLES = ("SHT_DYNSYM", "SHT_SYMTAB")


@attrs.frozen(order=True)
class Function:
    """A function symbol: its place in the file (bytes) and its name."""

    offset: int
    name: str
    size: int


class NotElf(ValueError):
    """The file is not one whose functions can be read."""


@attrs.frozen
class _Segment:
    vaddr: int
    offset: int
    filesz: int


def is_elf(path: str | Path) -> bool:
    """Whether the file is there, may be read and begins like an ELF file."""
    try:
        with open(path, "rb") as stream:
            return stream.read(4) == b"\x7fELF"
    except OSError:
        return False


def functions(path: str | Path) -> list[Function]:
    """The function symbols of an ELF file that lie in executable bytes of the file, one per offset, in file
    order.

    The dynamic symbols if there are any, else the full symbol table. NotElf says why there is no answer.
    """
    for table in _SYMBOL_TABLES:
        found: dict[int, Function] = {}
        for function in _read(path, table):
            # Of several names for one place (write, __write) the shortest is what people call it.
            known = found.get(function.offset)
            if known is None or (len(function.name), function.name) < (len(known.name), known.name):
                found[function.offset] = function
        if found:
            return sorted(found.values())
    return []


def find_function(path: str | Path, name: str) -> Function | None:
    """The function called `name`, searched in both symbol tables."""
    for table in _SYMBOL_TABLES:
        for function in _read(path, table):
            if function.name == name:
                return function
    return None


def bytes_at(path: str | Path, offset: int, count: int) -> bytes:
    """Up to `count` bytes of the file; fewer at its end, none behind it."""
    with open(path, "rb") as stream:
        stream.seek(offset)
        return stream.read(count)


def _read(path: str | Path, table: str) -> list[Function]:
    with open(path, "rb") as stream:
        try:
            return list(_functions(ELFFile(stream), table))
        except ELFError as error:
            raise NotElf(f"{path} is not an ELF file: {error}") from error
        except Exception as error:  # the library stops at a damaged header with whatever that leads it to
            raise NotElf(f"{path} is a damaged ELF file: {type(error).__name__}: {error}") from error


def _functions(elf: ELFFile, table: str) -> Iterator[Function]:
    segments = [
        _Segment(s["p_vaddr"], s["p_offset"], s["p_filesz"])
        for s in elf.iter_segments()
        if s["p_type"] == "PT_LOAD" and s["p_flags"] & PF_X
    ]
    for section in elf.iter_sections():
        if section["sh_type"] == table and isinstance(section, SymbolTableSection):
            for value, size, name in _function_symbols(elf, section):
                offset = _file_offset(segments, value)
                if offset is not None:
                    yield Function(offset, name, size)


def _file_offset(segments: list[_Segment], vaddr: int) -> int | None:
    for segment in segments:
        if segment.vaddr <= vaddr < segment.vaddr + segment.filesz:
            return vaddr - segment.vaddr + segment.offset
    return None


def _function_symbols(elf: Any, section: Any) -> Iterator[tuple[int, int, str]]:
    """(address, size, name) of each defined function.

    Decoded here and not by the library's iter_symbols, which takes 0.6 s for the 8,000 symbols of a Python
    interpreter.
    """
    names = section.stringtable.data()
    order = "<" if elf.little_endian else ">"
    if elf.elfclass == 64:
        rows = (
            (name, info, shndx, value, size)
            for name, info, _other, shndx, value, size in struct.iter_unpack(order + "IBBHQQ", section.data())
        )
    else:
        rows = (
            (name, info, shndx, value, size)
            for name, value, size, info, _other, shndx in struct.iter_unpack(order + "IIIBBH", section.data())
        )
    for name, info, shndx, value, size in rows:
        if info & 15 in (STT_FUNC, STT_GNU_IFUNC) and shndx and value:
            yield value, size, names[name : names.index(b"\0", name)].decode("utf-8", "replace")
