"""The build ID of an ELF file: the note that its linker left.

Models:      lib/buildid.c, build_id_parse_file, get_build_id, parse_build_id (7.2)
Guards:      the file is held
Invariants:  none
Leaves out:  files whose pages are not in the page cache (the kernel may wait for them; here they are read)
Read next:   proc/query.py
"""

import struct
from errno import EINVAL
from typing import Final

from kmodel.fs import File, kernel_read

BUILD_ID_SIZE_MAX: Final = 20
_PT_NOTE: Final = 4
_NT_GNU_BUILD_ID: Final = 3
# offsets of e_phoff, e_phnum, and of p_offset, p_filesz in a program header
_HEADERS: Final = {
    1: ("<28xI12xH", 32, "<I4xI8xI12x"),  # ELFCLASS32
    2: ("<32xQ16xH", 56, "<I4xQ16xQ16x"),  # ELFCLASS64
}


def build_id_parse_file(file: File) -> bytes | int:
    """The build ID, or -EINVAL if the file has none."""
    ident = _read(file, 0, 64)
    if len(ident) < 52 or ident[:4] != b"\x7fELF" or ident[4] not in _HEADERS:
        return -EINVAL
    header, phdr_size, phdr = _HEADERS[ident[4]]
    phoff, phnum = struct.unpack_from(header, ident)
    table = _read(file, phoff, phnum * phdr_size)
    for at in range(0, len(table) - phdr_size + 1, phdr_size):
        p_type, p_offset, p_filesz = struct.unpack_from(phdr, table, at)
        if p_type == _PT_NOTE:
            found = _parse_notes(_read(file, p_offset, p_filesz))
            if found is not None:
                return found
    return -EINVAL


def _parse_notes(notes: bytes) -> bytes | None:
    at = 0
    while at + 12 <= len(notes):
        namesz, descsz, n_type = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + namesz]
        desc_at = at + 12 + (namesz + 3 & ~3)
        if n_type == _NT_GNU_BUILD_ID and name == b"GNU\0" and 0 < descsz <= BUILD_ID_SIZE_MAX:
            desc = notes[desc_at : desc_at + descsz]
            if len(desc) == descsz:
                return desc
        at = desc_at + (descsz + 3 & ~3)
    return None


def _read(file: File, offset: int, n: int) -> bytes:
    data = kernel_read(file, offset, n)
    return b"" if isinstance(data, int) else data
