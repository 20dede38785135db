"""struct file: an open file.

Models:      include/linux/fs.h struct file, FMODE_*; fs/file_table.c struct backing_file (7.2)
Guards:      f_ref: atomic; the rest is written by the opener before the file is known to others, and constant
             until the next life
Invariants:  see fs/file_table.py
Leaves out:  f_op, f_pos and its lock, f_cred, f_owner, f_ep, error cursors
Read next:   fs/file_ref.py, then fs/file_table.py

Both caches of files are SLAB_TYPESAFE_BY_RCU: behind a pointer to a file that somebody else closed there is
always a file, but maybe another one. What a reader that holds no reference may do with it: read f_inode and
use it as a number.
"""

from typing import Any, Final

from kmodel.core import Pooled, atomic, kernel_struct, ptr, untraced
from kmodel.fs.address_space import AddressSpace
from kmodel.fs.inode import Inode

O_RDONLY: Final = 0
O_WRONLY: Final = 1
O_RDWR: Final = 2
O_ACCMODE: Final = 3

FMODE_READ: Final = 1 << 0
FMODE_WRITE: Final = 1 << 1
FMODE_EXEC: Final = 1 << 5
FMODE_OPENED: Final = 1 << 19
FMODE_BACKING: Final = 1 << 25
FMODE_NOACCOUNT: Final = 1 << 29


def OPEN_FMODE(flags: int) -> int:
    """The FMODE_READ and FMODE_WRITE bits of O_* flags."""
    return (flags + 1) & O_ACCMODE


@kernel_struct
class File(Pooled):
    """An open file (struct file)."""

    # references minus one, see file_ref.py
    f_ref: int = atomic(default=0)

    f_mode: int = 0
    f_flags: int = 0
    f_mapping: AddressSpace | None = None
    # NULL between init_file and file_init_path, an old inode while the file is free: a key to compare, not to
    # follow
    f_inode: Inode | None = None
    private_data: Any = None
    # shares memory with the free pointer
    f_task_work: Any = None

    f_path: str = untraced(default="")

    def __repr__(self) -> str:
        return f"<file {self.f_path} {ptr(self):#x}>"


@kernel_struct
class BackingFile(File):
    """A file that a stacking filesystem opened on another's behalf (struct backing_file, file at offset
    zero).
    """

    user_path: str = untraced(default="")
    # device and number of the inode that the user opened; None: as the file's own
    user_ino: tuple[tuple[int, int], int] | None = untraced(default=None)
    # shares memory with the free pointer
    bf_freeptr: Any = None


def file_inode(file: File) -> Inode | None:
    """The inode of a file that the caller holds a reference of."""
    return file.f_inode
