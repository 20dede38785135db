"""A model address space from the /proc/PID/maps of a real one.

Models:      nothing in Linux; the reverse of fs/proc/task_mmu.c show_map_vma (see proc/maps.py)
Guards:      the new mm is nobody else's yet; its mmap_lock is taken all the same
Invariants:  R1 proc_maps() of the result is the text it was made from
Leaves out:  what the text does not say: one struct file per name and inode is assumed, no anon_vma, VM_MAY
             bits and accounting as a plain mmap would have set them
Read next:   proc/maps.py
"""

import os
import re
from pathlib import Path
from typing import Any, Final

import attrs

from kmodel.fs import (
    O_RDONLY,
    O_RDWR,
    File,
    alloc_empty_file,
    file_init_path,
    fput,
    get_file,
    iget_path,
    iput,
)
from kmodel.fs.inode import OnDisk
from kmodel.mm.flags import (
    DEFAULT_MMAP_BASE,
    PAGE_SHIFT,
    VM_ACCOUNT,
    VM_DONTDUMP,
    VM_DONTEXPAND,
    VM_EXEC,
    VM_GROWSDOWN,
    VM_IO,
    VM_MAYEXEC,
    VM_MAYREAD,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_PFNMAP,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
)
from kmodel.mm.fork import mm_alloc
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap import generic_file_vm_ops, shmem_dev, shmem_vm_ops
from kmodel.mm.mmap_lock import mmap_write_lock, mmap_write_unlock
from kmodel.mm.special_mapping import insert_vm_struct, special_mapping_vmops
from kmodel.mm.vma import VmAreaStruct, vm_area_alloc, vm_flags_init, vma_set_range

_LINE: Final = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)"
)
_PLAIN_NAMES: Final = ("[heap]", "[stack]", "")


@attrs.frozen
class MapsLine:
    """One line of /proc/PID/maps."""

    start: int
    end: int
    perms: str
    offset: int
    dev: tuple[int, int]
    ino: int
    name: str

    @property
    def is_file(self) -> bool:
        """Whether the line has a file behind it."""
        return bool(self.ino or (self.name and not self.name.startswith("[")))


def parse_maps(text: str) -> list[MapsLine]:
    """The lines of a /proc/PID/maps text; ValueError for one that is none."""
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is not a line of /proc/PID/maps: {line!r}")
        start, end, perms, offset, major, minor, ino, name = match.groups()
        lines.append(
            MapsLine(
                int(start, 16),
                int(end, 16),
                perms,
                int(offset, 16),
                (int(major, 16), int(minor, 16)),
                int(ino),
                name.replace("\\012", "\n"),
            )
        )
    return lines


def read_maps_text(path_or_pid: Any) -> str:
    """The text: of process PID (a number), of a file (a path), or given as it is (if it has a newline)."""
    if isinstance(path_or_pid, int) or (isinstance(path_or_pid, str) and path_or_pid.isdecimal()):
        path_or_pid = f"/proc/{path_or_pid}/maps"
    if isinstance(path_or_pid, str) and "\n" in path_or_pid:
        return path_or_pid
    return os.fsdecode(Path(path_or_pid).read_bytes())


def load_proc_maps(path_or_pid: Any) -> MmStruct:
    """See MmStruct.from_proc_maps(). OSError if the text cannot be read, ValueError if it is none."""
    lines = parse_maps(read_maps_text(path_or_pid))
    mm = mm_alloc()
    if mm is None:
        raise MemoryError
    files: dict[Any, File] = {}
    mmap_write_lock(mm)
    for line in lines:
        if line.name == "[vsyscall]":
            _set_gate_vma(mm, line)
        else:
            _insert(mm, line, lines, files)
    _set_layout(mm, lines)
    mmap_write_unlock(mm)
    for file in files.values():  # the mappings hold their own references
        fput(file)
    return mm


def _insert(mm: MmStruct, line: MapsLine, lines: list[MapsLine], files: dict[Any, File]) -> None:
    vma = vm_area_alloc(mm)
    if vma is None:
        raise MemoryError
    pgoff = (line.offset if line.is_file else line.start) >> PAGE_SHIFT
    vma_set_range(vma, line.start, line.end, pgoff)
    if line.is_file:
        key = (line.dev, line.ino, line.name)
        if key not in files:
            files[key] = _open(line, lines)
        vma.vm_file = get_file(files[key])
        vma.vm_ops = shmem_vm_ops if line.dev == shmem_dev else generic_file_vm_ops
        if line.name.startswith("[anon_shmem:"):
            vma.anon_name = line.name[len("[anon_shmem:") : -1]
    elif line.name.startswith("[anon:"):
        vma.anon_name = line.name[len("[anon:") : -1]
    elif line.name not in _PLAIN_NAMES:
        vma.vm_ops = special_mapping_vmops
        vma.vm_private_data = line.name
    vm_flags_init(vma, _vm_flags(line, vma))
    if insert_vm_struct(mm, vma):
        raise MemoryError


def _set_gate_vma(mm: MmStruct, line: MapsLine) -> None:
    vma = VmAreaStruct()
    vma_set_range(vma, line.start, line.end, 0)
    vma.vm_ops = special_mapping_vmops
    vma.vm_private_data = line.name
    vm_flags_init(vma, (VM_READ if "r" in line.perms else 0) | VM_EXEC)
    mm.gate_vma = vma


def _vm_flags(line: MapsLine, vma: VmAreaStruct) -> int:
    flags = VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC
    for letter, flag in (("r", VM_READ), ("w", VM_WRITE), ("x", VM_EXEC)):
        if letter in line.perms:
            flags |= flag
    if line.perms.endswith("s"):
        flags |= VM_MAYSHARE | VM_SHARED
        if vma.vm_file is not None and not vma.vm_file.f_mode & 2:
            flags &= ~(VM_MAYWRITE | VM_SHARED)
    elif flags & VM_WRITE:
        flags |= VM_ACCOUNT
    if line.name == "[stack]":
        flags |= VM_GROWSDOWN
    elif line.name.startswith("[vvar"):
        flags = flags & ~(VM_MAYWRITE | VM_MAYEXEC) | VM_IO | VM_DONTEXPAND | VM_DONTDUMP | VM_PFNMAP
    elif vma.vm_ops is special_mapping_vmops:
        flags |= VM_DONTEXPAND
    return flags


def _open(line: MapsLine, lines: list[MapsLine]) -> File:
    """The file behind a line, as large as its mappings need, or as it is on this machine."""
    same = [other for other in lines if (other.dev, other.ino) == (line.dev, line.ino)]
    size = max(other.offset + other.end - other.start for other in same)
    written = any("w" in other.perms and other.perms.endswith("s") for other in same)
    contents = None
    path = line.name
    # The text escapes a newline, but not the backslash of a name that looks like one.
    for name in {path, path.replace("\n", "\\012")}:
        try:
            real = os.stat(name)
        except (OSError, ValueError):
            continue
        if real.st_ino == line.ino:
            path, size, contents = name, real.st_size, OnDisk(name)
    # A name that is gone, or that leads elsewhere by now, must not hide the file that has it today.
    nameless = contents is None and (path.endswith(" (deleted)") or not path.startswith("/"))
    key = f"{path}#{line.dev[0]:x}:{line.dev[1]:x}:{line.ino}"
    inode = iget_path(key if nameless else path, size=size, ino=line.ino, dev=line.dev, contents=contents)
    if inode is not None and (inode.i_dev, inode.i_ino) != (line.dev, line.ino):
        iput(inode)  # another file by the same name: of another mount, or of another process's
        inode = iget_path(key, size=size, ino=line.ino, dev=line.dev, contents=contents)
    file = alloc_empty_file(O_RDWR if written else O_RDONLY)
    if inode is None or isinstance(file, int):
        raise MemoryError
    file_init_path(file, "/dev/zero (deleted)" if path.startswith("[anon_shmem:") else path, inode)
    return file


def _set_layout(mm: MmStruct, lines: list[MapsLine]) -> None:
    heap = [line for line in lines if line.name == "[heap]"]
    if heap:
        mm.start_brk, mm.brk = heap[0].start, heap[-1].end
    stack = [line for line in lines if line.name == "[stack]"]
    if stack:
        mm.start_stack = stack[-1].end - 16
    top = stack[0].start if stack else DEFAULT_MMAP_BASE
    below = [line.end for line in lines if line.end <= top and line.name != "[heap]"]
    mm.mmap_base = max(below, default=DEFAULT_MMAP_BASE)
