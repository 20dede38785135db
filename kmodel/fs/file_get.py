"""Taking references to files: with one in hand, or from a pointer that may go stale.

Models:      include/linux/fs.h get_file; fs/file.c __get_file_rcu, get_file_rcu, get_file_active (7.2)
Guards:      rcu_read_lock: the memory behind the pointer stays a file; the reload: it is still the file that
             was meant
Invariants:  G1 a file returned was what the pointer pointed to at an instant after its reference was taken
Leaves out:  descriptor tables
Read next:   mm/, whose VMAs hold files
"""

from errno import EAGAIN
from typing import Any

from kmodel.core import cpu_relax, guards, rcu_dereference
from kmodel.fs.file import File
from kmodel.fs.file_ref import file_ref_get, file_ref_inc
from kmodel.fs.file_table import fput
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

RELOAD = guards.register(
    "file-reload-check",
    "H74: after taking a reference, load the pointer again and compare; without it the reference may be to a "
    "file that was closed and reused for something else",
)


def get_file(f: File) -> File:
    """Another reference to a file that the caller holds one of."""
    file_ref_inc(f, "f_ref")
    return f


def __get_file_rcu(obj: Any, field: str) -> File | int | None:
    """One attempt: the file, None for NULL, or -EAGAIN. In an RCU reader."""
    file = rcu_dereference(obj, field)
    if file is None:
        return None
    if not file_ref_get(file, "f_ref"):
        return -EAGAIN
    # The full barrier of file_ref_get pairs with the release that published the pointer: if it still leads to
    # the file, then the file we hold was published there, in this life. Go on with the pointer of the second
    # load: what it leads to was written before that publication, which the first load cannot promise.
    reloaded = rcu_dereference(obj, field)
    if reloaded is file:
        return reloaded  # type: ignore[no-any-return]
    if RELOAD in guards.removed:
        return file  # type: ignore[no-any-return]
    fput(file)
    return -EAGAIN


def get_file_rcu(obj: Any, field: str) -> File | None:
    """A reference to the file that obj.field points to, or None if it is NULL. The caller is in an RCU
    reader.
    """
    while True:
        file = __get_file_rcu(obj, field)
        if not isinstance(file, int):
            return file
        cpu_relax()


def get_file_active(obj: Any, field: str) -> File | None:
    """A reference to the file that obj.field points to, unless it is NULL or just going away."""
    rcu_read_lock()
    file = __get_file_rcu(obj, field)
    rcu_read_unlock()
    return None if isinstance(file, int) else file
