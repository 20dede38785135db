"""Inodes and the table that finds them by path.

Models:      include/linux/fs.h struct inode; fs/inode.c iget, ihold, iput, evict, prune_icache_sb (7.2)
Guards:      the table: inode_hash_lock; i_count: atomic, from 0 upwards under inode_hash_lock only; i_size:
             WRITE_ONCE; the rest is constant from iget to the end
Invariants:  N1 one inode per path, N2 an inode in the table with i_count 0 is on the LRU list, N3 it is freed
             a grace period after it left the table
Leaves out:  dentries (a path leads straight to its inode), superblocks, I_* states beyond freeing, write
             access counts
Read next:   fs/file.py

The uprobes tree compares inode addresses as numbers and never follows them, so an inode's memory must not
become another inode while a uprobe names it: each uprobe holds a reference (igrab).
"""

import zlib
from collections.abc import Callable
from typing import Final

import attrs

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    KernelBug,
    Pooled,
    Struct,
    atomic,
    atomic_add_unless,
    atomic_dec_and_test,
    atomic_inc,
    atomic_inc_return,
    atomic_read,
    atomic_set,
    embedded,
    initcall,
    kernel_struct,
    shared_int,
    untraced,
)
from kmodel.core.report import WARN
from kmodel.fs.address_space import PAGE_SHIFT, PAGE_SIZE, AddressSpace, AddressSpaceOperations
from kmodel.fs.filemap import filemap_overlay, truncate_inode_pages_final
from kmodel.rcu import call_rcu
from kmodel.slab import KmemCache, kmem_cache_create, kmem_cache_free, kmem_cache_zalloc
from kmodel.sync import SpinLock, spin_lock, spin_unlock

S_IFREG: Final = 0o100000
DEFAULT_DEV: Final = (8, 1)

Contents = Callable[[int, int], bytes]
"""A file's bytes: contents(offset, n) gives up to n of them."""


@attrs.frozen
class OnDisk:
    """Contents that are read from a real file when they are asked for."""

    path: str

    def __call__(self, offset: int, n: int) -> bytes:
        with open(self.path, "rb") as real:
            real.seek(offset)
            return real.read(n)


@attrs.frozen
class InMemory:
    """Contents given as bytes."""

    data: bytes

    def __call__(self, offset: int, n: int) -> bytes:
        return self.data[offset : offset + n]


@kernel_struct
class Inode(Pooled):
    """A file on a filesystem (struct inode)."""

    i_count: int = atomic(default=0)
    i_size: int = 0
    i_nlink: int = 1

    # constant while the inode is in use
    i_ino: int = untraced(default=0)
    i_dev: tuple[int, int] = untraced(default=DEFAULT_DEV)
    i_mode: int = untraced(default=0)
    path: str = untraced(default="")
    contents: Contents | None = untraced(default=None)  # None: all zeroes

    i_mapping: AddressSpace = embedded(factory=AddressSpace)

    def __repr__(self) -> str:
        return f"<inode {self.i_ino} {self.path}>"


@kernel_struct
class _InodeTable(Struct):
    inode_hash_lock: SpinLock = embedded(factory=SpinLock)
    by_path: dict[str, Inode] = untraced(factory=dict)
    by_number: dict[tuple[tuple[int, int], int], Inode] = untraced(factory=dict)
    lru: dict[Inode, None] = untraced(factory=dict)
    lru_max: int = untraced(default=512)


table: _InodeTable
inode_cachep: KmemCache


@initcall
def inode_init() -> None:
    """Boot: no inode is known."""
    global table, inode_cachep
    table = _InodeTable()
    inode_cachep = kmem_cache_create("inode_cache", Inode)


# ------------------------------------------------------------------------------------------------ contents


def read_contents(inode: Inode, offset: int, n: int) -> bytes:
    """Bytes offset..offset+n of the file, fewer at its end."""
    n = max(0, min(n, i_size_read(inode) - offset))
    data = b"" if inode.contents is None else inode.contents(offset, n)
    return filemap_overlay(inode.i_mapping, offset, data + bytes(n - len(data)))


def _read_folio(mapping: AddressSpace, index: int) -> bytes:
    return read_contents(mapping.host, index << PAGE_SHIFT, PAGE_SIZE)


regular_aops: Final = AddressSpaceOperations("regular_aops", read_folio=_read_folio)
shmem_aops: Final = AddressSpaceOperations("shmem_aops", read_folio=_read_folio, shmem=True)


def i_size_read(inode: Inode) -> int:
    """The file's size in bytes."""
    return int(READ_ONCE(inode, "i_size"))


def i_size_write(inode: Inode, size: int) -> None:
    """Set the file's size."""
    WRITE_ONCE(inode, "i_size", shared_int(size))


# ------------------------------------------------------------------------------------------------ lifetime


def iget_path(
    path: str,
    *,
    size: int,
    ino: int | None = None,
    dev: tuple[int, int] = DEFAULT_DEV,
    mode: int = S_IFREG | 0o755,
    contents: Contents | None = None,
    a_ops: AddressSpaceOperations = regular_aops,
) -> Inode | None:
    """The inode at `path` with a reference for the caller, made if the table has none; None when memory is
    out.

    Only a new inode takes the other arguments. Its number, unless given, follows from the path.
    """
    found = _find(path)
    if found is not None:
        return found
    inode = kmem_cache_zalloc(inode_cachep)
    if inode is None:
        return None
    atomic_set(inode, "i_count", 1)
    inode.i_size = shared_int(size)
    inode.i_nlink = 1
    inode.i_dev = dev
    inode.i_mode = mode
    inode.path = path
    inode.contents = contents
    inode.i_mapping.host = inode
    inode.i_mapping.a_ops = a_ops
    spin_lock(table.inode_hash_lock)
    raced = table.by_path.get(path)
    if raced is None:
        inode.i_ino = shared_int(_free_number(path, dev) if ino is None else ino)
        table.by_path[path] = inode
        table.by_number[dev, inode.i_ino] = inode
    else:  # somebody opened the same path meanwhile
        _iget(raced)
    spin_unlock(table.inode_hash_lock)
    if raced is not None:
        kmem_cache_free(inode_cachep, inode)
        return raced
    return inode  # type: ignore[no-any-return]


def _find(path: str) -> Inode | None:
    spin_lock(table.inode_hash_lock)
    inode = table.by_path.get(path)
    if inode is not None:
        _iget(inode)
    spin_unlock(table.inode_hash_lock)
    return inode


def _iget(inode: Inode) -> None:
    # inode_hash_lock held: nobody can be freeing an inode that is in the table
    table.lru.pop(inode, None)
    atomic_inc(inode, "i_count")


def _free_number(path: str, dev: tuple[int, int]) -> int:
    ino = zlib.crc32(path.encode(errors="surrogateescape")) or 1
    while (dev, ino) in table.by_number:
        ino += 1
    return ino


def ihold(inode: Inode) -> None:
    """Another reference to an inode that the caller holds one of."""
    WARN(atomic_inc_return(inode, "i_count") < 2, "ihold() of an inode without references")


def igrab(inode: Inode) -> Inode | None:
    """Another reference, or None if the inode is on its way out; the caller makes sure that it is still an
    inode.
    """
    spin_lock(table.inode_hash_lock)
    alive = atomic_read(inode, "i_count") > 0 or inode in table.lru
    if alive:
        _iget(inode)
    spin_unlock(table.inode_hash_lock)
    return inode if alive else None


def iput(inode: Inode | None) -> None:
    """Drop a reference. An inode without any stays in the table, for the next open, unless it
    was unlinked.
    """
    if inode is None:
        return
    if atomic_add_unless(inode, "i_count", -1, 1):
        return
    # The last reference: from here on only under the lock, so that no open can find the inode while we judge.
    victims: list[Inode] = []
    spin_lock(table.inode_hash_lock)
    if atomic_dec_and_test(inode, "i_count"):
        if inode.i_nlink and table.by_path.get(inode.path) is inode:
            table.lru[inode] = None
            while len(table.lru) > table.lru_max:
                victims.append(_unhash(next(iter(table.lru))))
        else:
            victims.append(_unhash(inode))
    spin_unlock(table.inode_hash_lock)
    for victim in victims:
        evict(victim)


def _unhash(inode: Inode) -> Inode:
    table.lru.pop(inode, None)
    if table.by_path.get(inode.path) is inode:
        del table.by_path[inode.path]
    table.by_number.pop((inode.i_dev, inode.i_ino), None)
    return inode


def evict(inode: Inode) -> None:
    """The inode left the table without references: its memory is free after a grace period."""
    if inode.i_mapping.i_mmap:
        raise KernelBug(f"{inode!r} is evicted while VMAs map it: {list(inode.i_mapping.i_mmap)!r}")
    truncate_inode_pages_final(inode.i_mapping)
    call_rcu(inode, _i_callback)


def _i_callback(inode: Inode) -> None:
    kmem_cache_free(inode_cachep, inode)


def unlink(path: str) -> bool:
    """The path is gone; the inode goes with its last reference. False if there was none."""
    victim = None
    spin_lock(table.inode_hash_lock)
    inode = table.by_path.pop(path, None)
    if inode is not None:
        inode.i_nlink = 0
        if inode in table.lru:
            victim = _unhash(inode)
    spin_unlock(table.inode_hash_lock)
    if victim is not None:
        evict(victim)
    return inode is not None


def prune_icache() -> int:
    """Drop every inode nobody uses (memory pressure, or the end of a test); how many."""
    spin_lock(table.inode_hash_lock)
    victims = [_unhash(inode) for inode in list(table.lru)]
    spin_unlock(table.inode_hash_lock)
    for inode in victims:
        evict(inode)
    return len(victims)


def check_invariants() -> None:
    """N1 and N2; when nothing runs, or with inode_hash_lock held."""
    for path, inode in table.by_path.items():
        assert inode.path == path, f"N1: {path} leads to {inode!r}"
        unused = inode.i_count == 0
        assert unused == (inode in table.lru), f"N2: {inode!r} has {inode.i_count} references"
    for inode in table.lru:
        assert table.by_path.get(inode.path) is inode, f"N2: {inode!r} is unused, but not in the table"
