"""PROCMAP_QUERY: ask for one mapping instead of reading the text of all.

Models:      fs/proc/task_mmu.c, do_procmap_query, query_matching_vma, query_vma_find_by_addr,
             procfs_procmap_ioctl; include/uapi/linux/fs.h, struct procmap_query (7.2)
Guards:      the VMA's read lock while its fields are copied, and its file held before that lock is dropped;
             mmap_lock only where the VMA has too many readers
Invariants:  P1 what is answered is one VMA's, at one moment, and satisfies what was asked for
             P2 nothing is held while the user's memory is written
Leaves out:  huge pages; the user's memory is a dict of buffers by address
Read next:   proc/buildid.py

User space hands in a struct of a size of its own, so that older and newer programs and kernels get along:
what
it lacks is zero, and what it has too much must be.
"""

import os
import struct
from errno import E2BIG, EAGAIN, EFAULT, EINVAL, ENAMETOOLONG, ENOENT, ENOTTY, ESRCH
from typing import Any, Final

import attrs

from kmodel.core import current, guards
from kmodel.fs import File, fput, get_file, task_work_run
from kmodel.mm import (
    PAGE_SHIFT,
    PAGE_SIZE,
    VM_EXEC,
    VM_MAYSHARE,
    VM_READ,
    VM_WRITE,
    MmStruct,
    find_vma,
    lock_next_vma,
    mmap_read_lock,
    mmap_read_unlock,
    mmget_not_zero,
    mmput,
    vma_end_read,
    vma_iter_init,
)
from kmodel.proc.buildid import build_id_parse_file
from kmodel.proc.show_map import d_path, file_user_ino, get_vma_name
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

PROCMAP_QUERY: Final = 0xC0686611
"""_IOWR('f', 17, struct procmap_query)."""

PROCMAP_QUERY_VMA_READABLE: Final = 0x01
PROCMAP_QUERY_VMA_WRITABLE: Final = 0x02
PROCMAP_QUERY_VMA_EXECUTABLE: Final = 0x04
PROCMAP_QUERY_VMA_SHARED: Final = 0x08
PROCMAP_QUERY_COVERING_OR_NEXT_VMA: Final = 0x10
PROCMAP_QUERY_FILE_BACKED_VMA: Final = 0x20
PROCMAP_QUERY_VALID_FLAGS_MASK: Final = 0x3F

PATH_MAX: Final = 4096

_LAYOUT: Final = struct.Struct("<9Q4I2Q")
_UP_TO_QUERY_ADDR: Final = 24
_PERMISSIONS: Final = (
    (PROCMAP_QUERY_VMA_READABLE, VM_READ),
    (PROCMAP_QUERY_VMA_WRITABLE, VM_WRITE),
    (PROCMAP_QUERY_VMA_EXECUTABLE, VM_EXEC),
    (PROCMAP_QUERY_VMA_SHARED, VM_MAYSHARE),
)

_LOCK = guards.register(
    "procmap-query-vma-lock",
    "P1: the VMA is not locked while it is copied; the answer is of several moments, or another VMA's",
)

UserMemory = dict[int, bytearray]
"""The caller's buffers, by address."""


@attrs.define
class ProcmapQuery:
    """struct procmap_query; fields in the order of the layout."""

    size: int = _LAYOUT.size
    query_flags: int = 0
    query_addr: int = 0
    vma_start: int = 0
    vma_end: int = 0
    vma_flags: int = 0
    vma_page_size: int = 0
    vma_offset: int = 0
    inode: int = 0
    dev_major: int = 0
    dev_minor: int = 0
    vma_name_size: int = 0
    build_id_size: int = 0
    vma_name_addr: int = 0
    build_id_addr: int = 0

    def pack(self) -> bytes:
        """The struct as it lies in memory."""
        return _LAYOUT.pack(*attrs.astuple(self))

    @classmethod
    def unpack(cls, memory: bytes) -> "ProcmapQuery":
        """A struct from memory; what is not there is zero."""
        return cls(*_LAYOUT.unpack(memory[: _LAYOUT.size].ljust(_LAYOUT.size, b"\0")))


@attrs.define(eq=False)
class _Locking:
    """struct proc_maps_locking_ctx: of one call, so that calls do not meet in it."""

    mm: MmStruct
    locked_vma: Any = None
    mmap_locked: bool = False


def procmap_ioctl(mm: MmStruct | None, cmd: int, uarg: bytearray, user: UserMemory) -> int:
    """ioctl(2) on /proc/PID/maps with the struct at `uarg`: 0 or a negative errno."""
    if cmd != PROCMAP_QUERY:
        return -ENOTTY
    result = do_procmap_query(mm, uarg, user)
    if not current().held_locks:
        task_work_run()
    return result


def do_procmap_query(mm: MmStruct | None, uarg: bytearray, user: UserMemory) -> int:
    """Answer the query in place: 0 or a negative errno."""
    if len(uarg) < 8:
        return -EFAULT
    usize = int.from_bytes(uarg[:8], "little")
    if usize > PAGE_SIZE:
        return -E2BIG
    if usize < _UP_TO_QUERY_ADDR:
        return -EINVAL
    if usize > len(uarg):
        return -EFAULT
    if any(uarg[_LAYOUT.size : usize]):
        return -E2BIG  # fields of a later kernel that we would ignore
    karg = ProcmapQuery.unpack(bytes(uarg[:usize]))
    if karg.query_flags & ~PROCMAP_QUERY_VALID_FLAGS_MASK:
        return -EINVAL
    if bool(karg.vma_name_size) != bool(karg.vma_name_addr):
        return -EINVAL
    if bool(karg.build_id_size) != bool(karg.build_id_addr):
        return -EINVAL
    if mm is None or not mmget_not_zero(mm):  # a kernel thread, or a process that has ended
        return -ESRCH

    lock_ctx = _Locking(mm)
    name: bytes | int = b""
    vm_file: File | None = None
    vma = query_matching_vma(lock_ctx, karg.query_addr, karg.query_flags)
    if isinstance(vma, int):
        name = vma
    else:
        _copy_fields(karg, vma)
        if karg.vma_name_size:
            name = _vma_name(karg, vma)
        if karg.build_id_size and vma.vm_file is not None and not isinstance(name, int):
            vm_file = get_file(vma.vm_file)  # its contents are read with no lock held
    _query_vma_teardown(lock_ctx)
    mmput(mm)
    if isinstance(name, int):
        return name
    build_id = _build_id(karg, vm_file)
    if isinstance(build_id, int):
        return build_id
    for addr, data in ((karg.vma_name_addr, name), (karg.build_id_addr, build_id)):
        if data and not _copy_to_user(user, addr, data):
            return -EFAULT
    answer = karg.pack()[:usize]
    uarg[: len(answer)] = answer
    return 0


def _copy_fields(karg: ProcmapQuery, vma: Any) -> None:
    karg.vma_start = vma.vm_start
    karg.vma_end = vma.vm_end
    vm_flags = vma.vm_flags
    karg.vma_flags = sum(bit for bit, flag in _PERMISSIONS if vm_flags & flag)
    karg.vma_page_size = PAGE_SIZE
    karg.vma_offset = karg.dev_major = karg.dev_minor = karg.inode = 0
    file = vma.vm_file
    if file is not None:
        karg.vma_offset = vma.vm_pgoff << PAGE_SHIFT
        (karg.dev_major, karg.dev_minor), karg.inode = file_user_ino(file)


def _vma_name(karg: ProcmapQuery, vma: Any) -> bytes | int:
    """The name and a NUL, none at all, or -ENAMETOOLONG. Nothing is escaped."""
    path, text = get_vma_name(vma)
    if path is not None:
        name = d_path(path) + b"\0"
    elif text is not None:
        name = os.fsencode(text) + b"\0"
    else:
        name = b""
    if len(name) > min(PATH_MAX, karg.vma_name_size):
        return -ENAMETOOLONG
    karg.vma_name_size = len(name)
    return name


def _build_id(karg: ProcmapQuery, vm_file: File | None) -> bytes | int:
    """The file's build ID, none, or -ENAMETOOLONG; puts the file."""
    if not karg.build_id_size:
        return b""
    found: bytes | int = b""
    if vm_file is not None:
        found = build_id_parse_file(vm_file)
        fput(vm_file)
    if isinstance(found, int) or not found:
        karg.build_id_size = 0
        return b""
    if karg.build_id_size < len(found):
        return -ENAMETOOLONG
    karg.build_id_size = len(found)
    return found


def _copy_to_user(user: UserMemory, addr: int, data: bytes) -> bool:
    buffer = user.get(addr)
    if buffer is None or len(buffer) < len(data):
        return False
    buffer[: len(data)] = data
    return True


# ------------------------------------------------------------------------------------------------ the search


def query_matching_vma(lock_ctx: _Locking, addr: int, flags: int) -> Any:
    """The VMA that covers addr, or if asked for the next one, with what else was asked for; locked. Else a
    negative errno, -ENOENT if there is none.
    """
    perms = sum(flag for bit, flag in _PERMISSIONS if flags & bit)
    while True:
        vma = query_vma_find_by_addr(lock_ctx, addr)
        if isinstance(vma, int):
            return vma
        if vma is None:
            return -ENOENT
        suits = vma.vm_flags & perms == perms
        if flags & PROCMAP_QUERY_FILE_BACKED_VMA and vma.vm_file is None:
            suits = False
        if suits and (flags & PROCMAP_QUERY_COVERING_OR_NEXT_VMA or vma.vm_start <= addr):
            return vma
        if not flags & PROCMAP_QUERY_COVERING_OR_NEXT_VMA:
            return -ENOENT
        addr = vma.vm_end


def query_vma_find_by_addr(lock_ctx: _Locking, addr: int) -> Any:
    """The first VMA that ends above addr, locked in the place of the one before; None; a negative errno."""
    mm = lock_ctx.mm
    if lock_ctx.mmap_locked:
        return find_vma(mm, addr)
    _unlock_vma(lock_ctx)
    rcu_read_lock()
    vma = lock_next_vma(mm, vma_iter_init(mm, addr), addr)
    rcu_read_unlock()
    if vma == -EAGAIN:
        mmap_read_lock(mm)
        lock_ctx.mmap_locked = True
        return find_vma(mm, addr)
    if vma is not None and not isinstance(vma, int):
        lock_ctx.locked_vma = vma
        if _LOCK in guards.removed:
            _unlock_vma(lock_ctx)
    return vma


def _unlock_vma(lock_ctx: _Locking) -> None:
    vma, lock_ctx.locked_vma = lock_ctx.locked_vma, None
    if vma is not None:
        vma_end_read(vma)


def _query_vma_teardown(lock_ctx: _Locking) -> None:
    if lock_ctx.mmap_locked:
        mmap_read_unlock(lock_ctx.mm)
    else:
        _unlock_vma(lock_ctx)


# ------------------------------------------------------------------------------------------------ for Python


def procmap_query(
    mm: MmStruct, addr: int, flags: int = 0, *, name_size: int = PATH_MAX, build_id_size: int = 0
) -> tuple[ProcmapQuery, bytes, bytes]:
    """A query as a program makes it: (the answer, the name without its NUL, the build ID). OSError else."""
    name, build_id = bytearray(name_size), bytearray(build_id_size)
    query = ProcmapQuery(query_flags=flags, query_addr=addr)
    query.vma_name_size, query.vma_name_addr = name_size, 0x1000 if name_size else 0
    query.build_id_size, query.build_id_addr = build_id_size, 0x10000 if build_id_size else 0
    uarg = bytearray(query.pack())
    error = procmap_ioctl(mm, PROCMAP_QUERY, uarg, {0x1000: name, 0x10000: build_id})
    if error:
        raise OSError(-error, os.strerror(-error))
    answer = ProcmapQuery.unpack(bytes(uarg))
    return answer, bytes(name[: max(answer.vma_name_size - 1, 0)]), bytes(build_id[: answer.build_id_size])
