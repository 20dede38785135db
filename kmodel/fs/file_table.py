"""How files come into being and go: allocation from type-safe caches, fput.

Models:      fs/file_table.c alloc_empty_file, init_file, file_init_path, fput, __fput, file_free; fs/open.c
             (7.2)
Guards:      a file's fields before it is published: whoever allocates it
Invariants:  T1 f_ref is set last in init_file, so a reader that gets a reference on a reused file finds no
             field of the old life T2 a file keeps its inode until after __fput, T3 the inode's references ==
             files that name it + other holders
Leaves out:  file limits, security hooks, locks, leases, O_PATH, f_op->release
Read next:   fs/file_get.py

fput() may be called with locks held, and what the last one has to do may sleep: it is left to task work, or
for kernel threads to a worker.
"""

import os
from errno import EINVAL, ENOMEM
from typing import Any

from kmodel.core import (
    Struct,
    atomic,
    current,
    engine,
    guards,
    initcall,
    kernel_struct,
    kfree,
    might_sleep,
    rmw,
    shared_int,
    xchg,
)
from kmodel.core.report import WARN
from kmodel.fs.address_space import AddressSpaceOperations
from kmodel.fs.file import (
    FMODE_BACKING,
    FMODE_NOACCOUNT,
    FMODE_OPENED,
    FMODE_READ,
    O_RDONLY,
    O_RDWR,
    OPEN_FMODE,
    BackingFile,
    File,
)
from kmodel.fs.file_ref import file_ref_init, file_ref_put, file_ref_put_close
from kmodel.fs.inode import (
    DEFAULT_DEV,
    InMemory,
    Inode,
    OnDisk,
    iget_path,
    iput,
    read_contents,
    regular_aops,
)
from kmodel.fs.task_work import exit_task_works, is_in_user_mode, task_work_add, task_work_run
from kmodel.slab import (
    KmemCache,
    kmem_cache_alloc,
    kmem_cache_create,
    kmem_cache_free,
    kmem_cache_zalloc,
    kzalloc,
)

BACKING_TYPESAFE = guards.register(
    "backing-files-typesafe",
    "H13: backing files live in a SLAB_TYPESAFE_BY_RCU cache (before 6.13: kzalloc and kfree); "
    "without it a lockless reader of vma->vm_file meets freed memory",
)
NO_MEMSET = guards.register(
    "file-alloc-without-memset",
    "H74: a file is not zeroed as a whole when it is allocated; zero is a valid f_ref, so a late reader "
    "would get a reference that init_file then overwrites",
)

filp_cachep: KmemCache
bfilp_cachep: KmemCache


@kernel_struct
class _DelayedFput(Struct):
    # a list without a lock (llist): None or (file, rest)
    first: Any = atomic(default=None)


delayed_fput_list: _DelayedFput


@initcall
def files_init() -> None:
    """Boot: two caches, no files."""
    global filp_cachep, bfilp_cachep, delayed_fput_list
    filp_cachep = kmem_cache_create("filp", File, typesafe_by_rcu=True, freeptr_fields=("f_task_work",))
    bfilp_cachep = kmem_cache_create(
        "bfilp", BackingFile, typesafe_by_rcu=True, freeptr_fields=("bf_freeptr",)
    )
    delayed_fput_list = _DelayedFput()


# ------------------------------------------------------------------------------------------------ opening


def init_file(f: File, flags: int) -> None:
    """A fresh start for memory that may have been another file a moment ago, and that readers may still be
    looking at.
    """
    f.f_task_work = None
    f.f_flags = flags
    f.f_mode = OPEN_FMODE(flags)
    f.f_path = ""
    f.f_mapping = None
    f.private_data = None
    f.f_inode = None
    # Last: until here a reader's file_ref_get fails. One that succeeds from now on reloads its pointer and
    # backs out.
    file_ref_init(f, "f_ref", 1)


def alloc_empty_file(flags: int) -> File | int:
    """A file with one reference and no identity, or -ENOMEM."""
    if NO_MEMSET in guards.removed:
        f = kmem_cache_zalloc(filp_cachep)
    else:
        f = kmem_cache_alloc(filp_cachep)
    if f is None:
        return -ENOMEM
    init_file(f, flags)
    return f  # type: ignore[no-any-return]


def alloc_empty_backing_file(flags: int) -> BackingFile | int:
    """alloc_empty_file for a stacking filesystem's inner file."""
    if BACKING_TYPESAFE in guards.removed:
        ff = kzalloc(BackingFile)
    else:
        ff = kmem_cache_alloc(bfilp_cachep)
    if ff is None:
        return -ENOMEM
    init_file(ff, flags)
    ff.user_path = ""
    ff.user_ino = None
    ff.f_mode = shared_int(ff.f_mode | FMODE_BACKING | FMODE_NOACCOUNT)
    return ff


def file_init_path(file: File, path: str, inode: Inode) -> None:
    """The file gets its identity, and with it the caller's reference to the inode."""
    file.f_path = path
    file.f_inode = inode
    file.f_mapping = inode.i_mapping
    file.f_mode = shared_int(file.f_mode | FMODE_OPENED)


def open_file(
    path: str,
    *,
    size: int | None = None,
    ino: int | None = None,
    writable: bool = True,
    dev: tuple[int, int] = DEFAULT_DEV,
    contents: bytes | None = None,
    on_disk: str | None = None,
    a_ops: AddressSpaceOperations = regular_aops,
) -> File:
    """Open a regular file. The same path leads to the same inode, made on the first open from the other
    arguments.

    Its contents are `contents`, or those of the real file `on_disk` (read when asked for), or zeroes; `size`
    may be left out with either. OSError(ENOMEM) when memory is out.
    """
    inode = _open_inode(path, size, ino, dev, contents, on_disk, a_ops)
    file = alloc_empty_file(O_RDWR if writable else O_RDONLY)
    if isinstance(file, int):
        iput(inode)
        raise OSError(-file, os.strerror(-file), path)
    file_init_path(file, path, inode)
    return file


def backing_file_open(
    user_path: str,
    path: str,
    *,
    size: int | None = None,
    ino: int | None = None,
    writable: bool = True,
    dev: tuple[int, int] = DEFAULT_DEV,
    contents: bytes | None = None,
    on_disk: str | None = None,
    a_ops: AddressSpaceOperations = regular_aops,
    user_ino: tuple[tuple[int, int], int] | None = None,
) -> BackingFile:
    """open_file of the real file at `path` behind the user's `user_path` (overlayfs), which the user knows by
    the device and number `user_ino`; FMODE_BACKING is set.
    """
    inode = _open_inode(path, size, ino, dev, contents, on_disk, a_ops)
    file = alloc_empty_backing_file(O_RDWR if writable else O_RDONLY)
    if isinstance(file, int):
        iput(inode)
        raise OSError(-file, os.strerror(-file), path)
    file.user_path = user_path
    file.user_ino = user_ino
    file_init_path(file, path, inode)
    return file


def _open_inode(
    path: str,
    size: int | None,
    ino: int | None,
    dev: tuple[int, int],
    contents: bytes | None,
    on_disk: str | None,
    a_ops: AddressSpaceOperations,
) -> Inode:
    source: Any = None
    if contents is not None:
        source = InMemory(contents)
        size = len(contents) if size is None else size
    elif on_disk is not None:
        source = OnDisk(on_disk)
        size = os.stat(on_disk).st_size if size is None else size
    if size is None:
        raise TypeError("open_file needs a size, contents or a file on disk")
    inode = iget_path(path, size=size, ino=ino, dev=dev, contents=source, a_ops=a_ops)
    if inode is None:
        raise OSError(ENOMEM, os.strerror(ENOMEM), path)
    return inode


def kernel_read(file: File, offset: int, n: int) -> bytes | int:
    """Up to n bytes at `offset`, or -EINVAL if the file is not open for reading."""
    if WARN(not file.f_mode & FMODE_READ, "kernel_read() of a file not open for reading"):
        return -EINVAL
    inode = file.f_inode
    assert inode is not None
    return read_contents(inode, offset, n)


# ------------------------------------------------------------------------------------------------ closing


def fput(file: File) -> None:
    """Drop a reference; the last one lets the file go, later if need be. May be called in any context."""
    if file_ref_put(file, "f_ref"):
        __fput_deferred(file)


def fput_close(file: File) -> None:
    """fput by a caller who expects to hold the last reference."""
    if file_ref_put_close(file, "f_ref"):
        __fput_deferred(file)


def __fput_sync(file: File) -> None:
    """fput that is over when it returns; may sleep."""
    if file_ref_put(file, "f_ref"):
        __fput(file)


fput_sync = __fput_sync


def filp_close(file: File) -> None:
    """close(2) of the last descriptor: drop the reference and leave the kernel."""
    fput_close(file)
    task_work_run()


def _push(file: File) -> Any:
    return lambda rest: (file, rest)


def __fput_deferred(file: File) -> None:
    if not file.f_mode & (FMODE_BACKING | FMODE_OPENED):
        file_free(file)  # it never got an identity: nothing to do that could sleep
        return
    task = current()
    if not task.is_kthread:
        task_work_add(____fput, file)
        if is_in_user_mode(task):
            task_work_run()
        return
    if rmw(delayed_fput_list, "first", _push(file)) is None:
        engine().run_later(delayed_fput, 0.0, "delayed_fput")


def ____fput(file: File) -> None:
    __fput(file)


def delayed_fput() -> None:
    """The worker's part of fput by kernel threads."""
    node = xchg(delayed_fput_list, "first", None)
    while node is not None:
        file, node = node
        __fput(file)


def flush_delayed_fput() -> None:
    """Let go now of every file whose last reference is gone: this task's, ended tasks', kernel threads'."""
    task_work_run()
    exit_task_works()
    delayed_fput()


def __fput(file: File) -> None:
    """The last reference is gone: put what the file held, then the file."""
    might_sleep()
    if file.f_mode & FMODE_OPENED:
        iput(file.f_inode)
    file_free(file)


def file_free(f: File) -> None:
    """Back to the cache, contents as they are: f_inode keeps naming the inode until the next init_file."""
    if f.f_mode & FMODE_BACKING:
        if BACKING_TYPESAFE in guards.removed:
            kfree(f)
        else:
            kmem_cache_free(bfilp_cachep, f)
    else:
        kmem_cache_free(filp_cachep, f)
