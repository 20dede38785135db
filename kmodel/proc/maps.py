"""/proc/PID/maps: the text, read while the address space changes.

Models:      fs/proc/task_mmu.c, m_start, m_next, show_map_vma, get_vma_name; fs/seq_file.c, seq_pad (7.2)
Guards:      each VMA's read lock while its line is written; mmap_lock only where that fails
Invariants:  T1 each line ends above the one before, and no hole is shown that was never there (H40); what is
             mapped anew over a border during the read may be shown with its whole range, and overlap
Leaves out:  smaps, numa_maps; the reader without locks of 2024 comes as a variant
Read next:   mm/vma_iter.py, lock_next_vma()
"""

import os
from errno import EINTR
from typing import Any, Final

from kmodel.fs import FMODE_BACKING
from kmodel.mm import (
    PAGE_SHIFT,
    VM_EXEC,
    VM_MAYSHARE,
    VM_READ,
    VM_WRITE,
    MmStruct,
    lock_next_vma,
    mmget_not_zero,
    mmput,
    vma_end_read,
    vma_iter_init,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

SEQ_FILE_BUFFER: Final = 4096
NAME_COLUMN: Final = 25 + 8 * 6 - 1


def proc_maps(mm: MmStruct) -> str:
    """What /proc/PID/maps says of the address space; empty when its last user is gone.

    Read like a file, a buffer at a time: between two buffers nothing is held.
    """
    if not mmget_not_zero(mm):
        return ""
    text: list[str] = []
    position = 0
    try:
        while True:
            lines, position = _read(mm, position)
            if not lines:
                return "".join(text)
            text += lines
    finally:
        mmput(mm)


def _read(mm: MmStruct, position: int) -> tuple[list[str], int]:
    """One read(2): lines from `position` on until the buffer is full, and where the next one starts."""
    lines: list[str] = []
    size = 0
    rcu_read_lock()
    try:
        vmi = vma_iter_init(mm, position)
        while size < SEQ_FILE_BUFFER:
            vma = lock_next_vma(mm, vmi, position)
            if isinstance(vma, int):
                raise OSError(EINTR if vma == -EINTR else -vma, os.strerror(-vma))
            if vma is None:
                break
            line = show_map_vma(vma)
            position = vma.vm_end
            vma_end_read(vma)
            lines.append(line)
            size += len(line)
    finally:
        rcu_read_unlock()
    return lines, position


# ------------------------------------------------------------------------------------------------ one line


def show_map_vma(vma: Any) -> str:
    """The line of a VMA that is locked, by its own lock or by mmap_lock."""
    file = vma.vm_file
    flags = vma.vm_flags
    offset, major, minor, ino = 0, 0, 0, 0
    if file is not None:
        inode = file.f_inode
        offset = vma.vm_pgoff << PAGE_SHIFT
        (major, minor), ino = inode.i_dev, inode.i_ino
    r = "r" if flags & VM_READ else "-"
    w = "w" if flags & VM_WRITE else "-"
    x = "x" if flags & VM_EXEC else "-"
    s = "s" if flags & VM_MAYSHARE else "p"
    header = f"{vma.vm_start:08x}-{vma.vm_end:08x} {r}{w}{x}{s} {offset:08x} {major:02x}:{minor:02x} {ino} "
    name = get_vma_name(vma)
    if name is None:
        return header + "\n"
    return f"{header:<{NAME_COLUMN}} {name}\n"


def get_vma_name(vma: Any) -> str | None:
    """What the line ends with, or None."""
    mm = vma.vm_mm
    file = vma.vm_file
    if file is not None:
        if vma.anon_name is not None:
            return f"[anon_shmem:{vma.anon_name}]"
        path: str = file.user_path if file.f_mode & FMODE_BACKING else file.f_path
        return path.replace("\n", "\\012")
    if vma.vm_ops is not None and vma.vm_ops.name is not None:
        name: str | None = vma.vm_ops.name(vma)
        if name is not None:
            return name
    if vma.vm_start < mm.brk and vma.vm_end > mm.start_brk:
        return "[heap]"
    if vma.vm_start <= mm.start_stack <= vma.vm_end:
        return "[stack]"
    if vma.anon_name is not None:
        return f"[anon:{vma.anon_name}]"
    return None
