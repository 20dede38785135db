"""address_space: the pages of a file, and every VMA that maps them.

Models:      include/linux/fs.h struct address_space, i_mmap_lock_write and friends; mm/interval_tree.c (7.2)
Guards:      i_mmap and the keys of the VMAs in it: i_mmap_rwsem; a_ops and host: constant
Invariants:  M1 a VMA in i_mmap has the page range it had when it was inserted (writers take it out to change
             it)
Leaves out:  i_mmap is a sorted list, not an augmented tree
Read next:   fs/filemap.py, the page cache; fs/inode.py; uprobes/register.py walks i_mmap

Only lock holders may touch i_mmap: it is an ordinary Python container.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
from sortedcontainers import SortedKeyList

from kmodel.core import (
    NO_STORE,
    KernelBug,
    Pooled,
    atomic,
    atomic_dec,
    atomic_read,
    embedded,
    kernel_struct,
    rmw,
    untraced,
)
from kmodel.sync import (
    RwSemaphore,
    SpinLock,
    down_read,
    down_write,
    down_write_trylock,
    rwsem_assert_held,
    rwsem_assert_held_write,
    up_read,
    up_write,
)

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
EPERM: Final = 1


@attrs.frozen(eq=False)
class AddressSpaceOperations:
    """What a filesystem can do with a mapping; uprobes refuse (-EIO) one that can neither read a folio nor is
    shmem.
    """

    name: str
    read_folio: Callable[[Any, int], bytes] | None = None
    shmem: bool = False


empty_aops: Final = AddressSpaceOperations("empty_aops")
"""No pages can be read through it (character devices, some pseudo filesystems)."""


def _first_page(vma: Any) -> int:
    return int(vma.vm_pgoff)


def _i_mmap() -> Any:
    return SortedKeyList(key=_first_page)


@kernel_struct
class AddressSpace(Pooled):
    """The pages of one inode (struct address_space)."""

    host: Any = untraced(default=None)
    a_ops: AddressSpaceOperations = untraced(default=empty_aops)

    i_mmap_rwsem: RwSemaphore = embedded(factory=RwSemaphore)
    # write: i_mmap_rwsem for writing; read: either way
    i_mmap: Any = untraced(factory=_i_mmap)
    i_mmap_longest: int = untraced(default=0)  # pages of the longest VMA that was ever in i_mmap

    # writable shared mappings; negative while sealed against them
    i_mmap_writable: int = atomic(default=0)
    # the page cache: pages by index. write and read: i_pages_lock
    i_pages_lock: SpinLock = embedded(factory=SpinLock)
    i_pages: dict[int, Any] = untraced(factory=dict, init=False)

    def check_invariants(self) -> None:
        """M1; call with i_mmap_rwsem held, or when nothing runs."""
        for vma in self.i_mmap:
            assert vma in self.i_mmap, f"M1: {vma!r} changed its vm_pgoff while in i_mmap"


# ------------------------------------------------------------------------------------------------ i_mmap


def i_mmap_lock_write(mapping: AddressSpace) -> None:
    """Lock i_mmap for changing."""
    down_write(mapping.i_mmap_rwsem)


def i_mmap_trylock_write(mapping: AddressSpace) -> bool:
    """Lock i_mmap for changing if that needs no waiting."""
    return down_write_trylock(mapping.i_mmap_rwsem)


def i_mmap_unlock_write(mapping: AddressSpace) -> None:
    """End of i_mmap_lock_write."""
    up_write(mapping.i_mmap_rwsem)


def i_mmap_lock_read(mapping: AddressSpace) -> None:
    """Lock i_mmap for walking."""
    down_read(mapping.i_mmap_rwsem)


def i_mmap_unlock_read(mapping: AddressSpace) -> None:
    """End of i_mmap_lock_read."""
    up_read(mapping.i_mmap_rwsem)


def i_mmap_assert_locked(mapping: AddressSpace) -> None:
    """LockingBug unless i_mmap is locked."""
    rwsem_assert_held(mapping.i_mmap_rwsem)


def i_mmap_assert_write_locked(mapping: AddressSpace) -> None:
    """LockingBug unless i_mmap is locked for changing."""
    rwsem_assert_held_write(mapping.i_mmap_rwsem)


def vma_interval_tree_insert(vma: Any, mapping: AddressSpace) -> None:
    """Enter the VMA, with the page range it has now. i_mmap_rwsem held for writing."""
    rwsem_assert_held_write(mapping.i_mmap_rwsem)
    pages = (vma.vm_end - vma.vm_start) >> PAGE_SHIFT
    mapping.i_mmap_longest = max(mapping.i_mmap_longest, pages)
    mapping.i_mmap.add(vma)


def vma_interval_tree_remove(vma: Any, mapping: AddressSpace) -> None:
    """Take the VMA out, before its page range changes. i_mmap_rwsem held for writing."""
    rwsem_assert_held_write(mapping.i_mmap_rwsem)
    try:
        mapping.i_mmap.remove(vma)
    except ValueError:
        raise KernelBug(f"M1: {vma!r} is not in i_mmap where its vm_pgoff says") from None


def vma_interval_tree_foreach(mapping: AddressSpace, first: int, last: int) -> Iterator[Any]:
    """Every VMA that maps a page of first..last (inclusive), by first page. i_mmap_rwsem held throughout."""
    rwsem_assert_held(mapping.i_mmap_rwsem)
    for vma in mapping.i_mmap.irange_key(first - mapping.i_mmap_longest + 1, last):
        if vma.vm_pgoff + ((vma.vm_end - vma.vm_start) >> PAGE_SHIFT) > first:
            yield vma


def mapping_mapped(mapping: AddressSpace) -> bool:
    """Whether any VMA maps the file (a hint unless i_mmap is locked)."""
    return len(mapping.i_mmap) > 0


# ------------------------------------------------------------------------------------------ writable mappings


def _inc_unless_negative(old: int) -> Any:
    return NO_STORE if old < 0 else old + 1


def _dec_unless_positive(old: int) -> Any:
    return NO_STORE if old > 0 else old - 1


def mapping_map_writable(mapping: AddressSpace) -> int:
    """Count a writable shared mapping: 0, or -EPERM while they are denied."""
    return 0 if rmw(mapping, "i_mmap_writable", _inc_unless_negative) >= 0 else -EPERM


def mapping_unmap_writable(mapping: AddressSpace) -> None:
    """A writable shared mapping went away."""
    atomic_dec(mapping, "i_mmap_writable")


def mapping_writably_mapped(mapping: AddressSpace) -> bool:
    """Whether writable shared mappings exist."""
    return bool(atomic_read(mapping, "i_mmap_writable") > 0)


# ------------------------------------------------------------------------------------------------ pages


def shmem_mapping(mapping: AddressSpace) -> bool:
    """Whether the pages are tmpfs's."""
    return mapping.a_ops.shmem


def read_mapping_page(mapping: AddressSpace, index: int) -> bytes:
    """The contents of a page, zero-filled past the end of the file. The mapping must have read_folio or be
    shmem.
    """
    read_folio = mapping.a_ops.read_folio
    if read_folio is None:
        raise KernelBug(f"{mapping!r} has no read_folio")
    page = read_folio(mapping, index)
    return page + bytes(PAGE_SIZE - len(page))
