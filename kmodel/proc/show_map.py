"""One line of /proc/PID/maps: what is said of a mapping, and in which form.

Models:      fs/proc/task_mmu.c, show_map_vma, show_vma_header_prefix, get_vma_name; fs/d_path.c, d_path;
             arch/x86/entry/vsyscall/vsyscall_64.c, get_gate_vma (7.2)
Guards:      the VMA is read-locked, or a private copy; mm->brk and the like are read with no lock at all
Invariants:  L1 the text says of start, end, permissions, offset and file what the VMA says at one moment
             L2 but the heap may lose its name: brk(2) sets mm->brk before it waits for the readers of the
             VMA that it takes away. (The same can be seen on a running 6.18.)
Leaves out:  mounts and roots (a path is a string), d_dname
Read next:   proc/maps.py

`vma` is anything with a VMA's fields: the variant of 2024 prints from a copy.
"""

import os
from typing import Any, Final

from kmodel.core import READ_ONCE, KernelBug
from kmodel.fs import FMODE_BACKING, File
from kmodel.mm import PAGE_SHIFT, VM_EXEC, VM_MAYSHARE, VM_READ, VM_WRITE, MmStruct
from kmodel.proc.seq_file import SeqFile, mangle_path, seq_pad, seq_setwidth, seq_write

NAME_COLUMN: Final = 25 + 8 * 6 - 1
"""Where names begin, less one: 25 and six digits for each byte of a pointer."""
DELETED: Final = " (deleted)"


def get_gate_vma(mm: MmStruct) -> Any:
    """The mapping that is in no tree and that every process has: the vsyscall page, or None."""
    return mm.gate_vma


def file_user_ino(file: File) -> tuple[tuple[int, int], int]:
    """Device and number of the inode that user space knows the file by (file_user_inode)."""
    if file.f_mode & FMODE_BACKING and file.user_ino is not None:  # type: ignore[attr-defined]
        return file.user_ino  # type: ignore[attr-defined, no-any-return]
    inode = file.f_inode
    if inode is None:
        raise KernelBug(f"the inode of {file!r} is followed, and it has none yet")
    return inode.i_dev, inode.i_ino


def d_path(file: File) -> bytes:
    """The path that user space knows the file by."""
    path: str = file.user_path if file.f_mode & FMODE_BACKING else file.f_path  # type: ignore[attr-defined]
    inode = file.f_inode
    if inode is not None and not READ_ONCE(inode, "i_nlink") and not path.endswith(DELETED):
        path += DELETED
    return os.fsencode(path)


def get_vma_name(vma: Any) -> tuple[File | None, str | None]:
    """What the mapping is called: by the path of a file, or by a name; or (None, None)."""
    file = vma.vm_file
    if file is not None:
        if vma.anon_name is not None:
            return None, f"[anon_shmem:{vma.anon_name}]"
        return file, None
    if vma.vm_ops is not None and vma.vm_ops.name is not None:
        name = vma.vm_ops.name(vma)
        if name is not None:
            return None, name
    mm = vma.vm_mm
    if mm is None:
        return None, "[vdso]"
    if vma_is_initial_heap(vma, mm):
        return None, "[heap]"
    if vma_is_initial_stack(vma, mm):
        return None, "[stack]"
    if vma.anon_name is not None:
        return None, f"[anon:{vma.anon_name}]"
    return None, None


def vma_is_initial_heap(vma: Any, mm: MmStruct) -> bool:
    """Whether it is (part of) the heap that brk() moves the end of, as far as one can tell without
    mmap_lock.
    """
    return bool(vma.vm_start < mm.brk and vma.vm_end > mm.start_brk)


def vma_is_initial_stack(vma: Any, mm: MmStruct) -> bool:
    """Whether it is where the main thread's stack began."""
    return bool(vma.vm_start <= mm.start_stack <= vma.vm_end)


def show_map_vma(m: SeqFile, vma: Any) -> None:
    """Print the line."""
    file = vma.vm_file
    flags = vma.vm_flags
    offset, major, minor, ino = 0, 0, 0, 0
    if file is not None:
        (major, minor), ino = file_user_ino(file)
        offset = vma.vm_pgoff << PAGE_SHIFT
    r = "r" if flags & VM_READ else "-"
    w = "w" if flags & VM_WRITE else "-"
    x = "x" if flags & VM_EXEC else "-"
    s = "s" if flags & VM_MAYSHARE else "p"
    seq_setwidth(m, NAME_COLUMN)
    header = f"{vma.vm_start:08x}-{vma.vm_end:08x} {r}{w}{x}{s} {offset:08x} {major:02x}:{minor:02x} {ino} "
    seq_write(m, header.encode())
    path, name = get_vma_name(vma)
    if path is not None:
        seq_pad(m, b" ")
        seq_write(m, mangle_path(d_path(path), b"\n"))
    elif name is not None:
        seq_pad(m, b" ")
        seq_write(m, os.fsencode(name))
    seq_write(m, b"\n")
