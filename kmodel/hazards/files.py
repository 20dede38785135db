"""A file pointer that is followed while the file behind it is closed and another one is opened in its memory.

Models:      fs/file.c, get_file_rcu; fs/file_table.c, init_file (7.2)
Guards:      RCU keeps the memory a struct file; the reference count and the second load say which file it is
Invariants:  G1 a file that get_file_rcu() returned is the one that the pointer leads to
Leaves out:  descriptor tables: one pointer stands for them
Read next:   fs/file_get.py
"""

from typing import Any

from kmodel.core import Struct, boot, kernel_struct, ptr, rcu_assign_pointer, rcu_dereference
from kmodel.fs import File, backing_file_open, file_ref_read, filp_close, fput, get_file_rcu, open_file
from kmodel.hazards.catalogue import Scenario, register
from kmodel.rcu import rcu_read_lock, rcu_read_unlock


@kernel_struct
class Table(Struct):
    """A place where a file may be found."""

    fd: File | None = None


class State:
    """A file that the table leads to, which holds its only reference; a second name for the next one."""

    def __init__(self) -> None:
        boot()
        open_file("/other", size=1)  # so that its inode exists
        self.opened: Any = None
        self.table = Table(fd=open_file("/this", size=1))


def close_and_open(state: State) -> None:
    """Take the file out, close it; the next file that is opened, and put nowhere, is in its memory."""
    file: Any = state.table.fd
    rcu_assign_pointer(state.table, "fd", None)
    filp_close(file)
    state.opened = open_file("/other", size=1)


def reader(state: State) -> None:
    """A reference to the file that the table leads to."""
    rcu_read_lock()
    file = get_file_rcu(state.table, "fd")
    rcu_read_unlock()
    if file is not None:
        assert file.f_path == "/this", f"the table leads to /this, and the reader holds {file.f_path!r}"
        fput(file)


def kept(state: State) -> None:
    """The file that was opened last has the one reference of whoever opened it."""
    refs = file_ref_read(state.opened, "f_ref")
    assert refs == 1, f"the file is open once, and has {refs} references"


register(
    Scenario(
        name="file-reload",
        hazards="H74",
        summary="A reader takes a reference to a file that is another one by then.",
        setup=State,
        threads=(reader, close_and_open),
        without="file-reload-check",
        breaks="assertion",
        memory="sc",
        options={"races": False},
    )
)
register(
    Scenario(
        name="file-alloc-memset",
        hazards="H74",
        summary="A file is zeroed when it is allocated, and readers can raise a reference count of zero.",
        setup=State,
        threads=(reader, close_and_open),
        final=kept,
        without="file-alloc-without-memset",
        breaks="assertion",
        memory="sc",
        options={"races": False},
    )
)


# ------------------------------------------------------------------------------- H13: overlayfs


class Backing:
    """A file of an overlay, which a mapping leads to; the mapping is about to go, with the last reference."""

    def __init__(self) -> None:
        boot()
        self.table = Table(fd=backing_file_open("/merged/prog", "/upper/prog", size=1))


def speculate(state: Backing) -> None:
    """What the lookup does with a vm_file: it reads the inode, of whatever file that is."""
    rcu_read_lock()
    file = rcu_dereference(state.table, "fd")
    if file is not None:
        ptr(file.f_inode)
    rcu_read_unlock()


def unmap(state: Backing) -> None:
    """The mapping goes."""
    file: Any = state.table.fd
    rcu_assign_pointer(state.table, "fd", None)
    fput(file)


register(
    Scenario(
        name="file-backing",
        hazards="H13",
        summary="The real file behind an overlay is freed at once while a lookup reads its inode.",
        setup=Backing,
        threads=(speculate, unmap),
        without="backing-files-typesafe",
        breaks="use-after-free",
        memory="sc",
    )
)
