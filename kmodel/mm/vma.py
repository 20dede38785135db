"""vm_area_struct: one mapping, and its type-safe memory.

Models:      include/linux/mm_types.h, struct vm_area_struct; mm/vma_init.c, vm_area_alloc / _dup / _free;
             include/linux/mm.h, vm_flags_set and friends (7.2)
Guards:      see the groups of fields
Invariants:  V1 a VMA is freed detached (vm_refcnt 0), and its memory is another VMA's at once: a reader in
             RCU may meet any other VMA, of any mm, half initialised, where it expected this one
             V2 vm_refcnt is set last, by a release, when the VMA is attached
Leaves out:  vm_page_prot, NUMA state, swap readahead, the layout in cache lines
Read next:   mm/vma_lock.py

`vm_start`, `vm_end` and `vm_pgoff` need mmap_lock (write), the VMA write lock and, for file mappings, the
i_mmap lock; `vm_flags` the first two; `vm_mm`, `vm_file` and `vm_ops` are written once, at the first mapping.
"""

from collections.abc import Callable
from typing import Any, Final

import attrs

from kmodel.core import Pooled, atomic, initcall, kernel_struct, shared_int, untraced
from kmodel.mm import vma_lock
from kmodel.mm.flags import (
    PAGE_SHIFT,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_SHARED,
)
from kmodel.mm.mm_struct import MmStruct
from kmodel.slab import KmemCache, kmem_cache_alloc, kmem_cache_create, kmem_cache_free, kmem_cache_zalloc

UINT_MAX: Final = 0xFFFF_FFFF


@attrs.frozen(eq=False)
class VmOperations:
    """struct vm_operations_struct: what the owner of a mapping hooks in."""

    close: Callable[["VmAreaStruct"], None] | None = None
    name: Callable[["VmAreaStruct"], str | None] | None = None


@kernel_struct
class VmAreaStruct(Pooled):
    """One mapping (struct vm_area_struct): [vm_start, vm_end) of one address space."""

    # The first word is the free pointer's while the VMA is free.
    vm_start: int = 0
    vm_end: int = 0
    # Readers in RCU compare it: the memory may be a VMA of another address space by now (H32).
    vm_mm: MmStruct | None = None
    vm_flags: int = 0
    # equals mm.mm_lock_seq while write-locked. write: mmap_lock (write), readers excluded;
    # read: either, or READ_ONCE for a pessimistic look
    vm_lock_seq: int = UINT_MAX
    vm_ops: VmOperations | None = None
    # page offset in vm_file; for anonymous mappings the page number of vm_start when it was mapped
    vm_pgoff: int = 0
    # None: anonymous
    vm_file: Any = None
    vm_private_data: Any = None
    # None to set: mmap_lock (read) and page_table_lock; set to None: mmap_lock, VMA and anon_vma (write)
    anon_vma: Any = None
    anon_vma_chain: tuple[Any, ...] = ()
    anon_name: str | None = None
    vm_policy: Any = None
    vm_userfaultfd_ctx: Any = None

    # 0 detached, 1 attached, more: readers; see vma_lock.py for the rest
    vm_refcnt: int = atomic(default=0)

    # Until 6.14, instead (mm/vma_lock_v8.py): a VmaLock for the VMA's life; and whether the VMA is in
    # no tree,
    # written under mmap_lock (write) and, to detach, the VMA write lock
    vm_lock: Any = untraced(default=None)
    detached: bool = False

    __hash__ = object.__hash__


vm_area_cachep: KmemCache


@initcall
def vma_state_init() -> None:
    """Create the cache, SLAB_TYPESAFE_BY_RCU (if the VMA lock can bear that), with the free pointer over
    vm_start.
    """
    global vm_area_cachep
    vm_area_cachep = kmem_cache_create(
        "vm_area_struct",
        VmAreaStruct,
        typesafe_by_rcu=vma_lock.implementation.VMA_TYPESAFE_BY_RCU,
        freeptr_fields=("vm_start",),
    )


# ------------------------------------------------------------------------------------------------ lifetime


def vma_init(vma: VmAreaStruct, mm: MmStruct) -> None:
    """Give a zeroed VMA its mm; detached."""
    vma.vm_mm = mm
    vma_lock.vma_lock_init(vma, False)


def vm_area_alloc(mm: MmStruct) -> VmAreaStruct | None:
    """A detached VMA of this mm with nothing else set, or None without memory."""
    vma: VmAreaStruct | None = kmem_cache_zalloc(vm_area_cachep)
    if vma is not None:
        vma_init(vma, mm)
        if not vma_lock.vma_lock_alloc(vma):
            kmem_cache_free(vm_area_cachep, vma)
            return None
    return vma


def vm_area_dup(orig: VmAreaStruct) -> VmAreaStruct | None:
    """A detached copy, or None without memory. It holds no file reference and is not in i_mmap.

    Stored field by field into memory that may have been another VMA a moment ago, whose readers may look on.
    """
    new: VmAreaStruct | None = kmem_cache_alloc(vm_area_cachep)
    if new is None:
        return None
    if not vma_lock.vma_lock_alloc(new):
        kmem_cache_free(vm_area_cachep, new)
        return None
    new.vm_mm = orig.vm_mm
    new.vm_ops = orig.vm_ops
    new.vm_start = orig.vm_start
    new.vm_end = orig.vm_end
    new.anon_vma = orig.anon_vma
    new.vm_pgoff = orig.vm_pgoff
    new.vm_file = orig.vm_file
    new.vm_private_data = orig.vm_private_data
    new.vm_flags = orig.vm_flags
    new.vm_policy = orig.vm_policy
    new.vm_userfaultfd_ctx = orig.vm_userfaultfd_ctx
    vma_lock.vma_lock_init(new, True)
    new.anon_vma_chain = ()
    new.anon_name = orig.anon_name
    return new


def vm_area_free(vma: VmAreaStruct) -> None:
    """Free a detached VMA. No grace period: the memory may be another VMA at once (V1); until 6.14 there was
    one.
    """
    vma_lock.vma_assert_detached(vma)
    vma_lock.vma_free_rcu(vma, __vm_area_free)


def __vm_area_free(vma: VmAreaStruct) -> None:
    vma_lock.vma_lock_free(vma)
    kmem_cache_free(vm_area_cachep, vma)


# ------------------------------------------------------------------------------------------------ fields


def vma_pages(vma: VmAreaStruct) -> int:
    """Its length in pages."""
    return (vma.vm_end - vma.vm_start) >> PAGE_SHIFT


def vma_set_range(vma: VmAreaStruct, start: int, end: int, pgoff: int) -> None:
    """Set where the VMA lies. It is write-locked and out of i_mmap, or not attached."""
    vma.vm_start = shared_int(start)
    vma.vm_end = shared_int(end)
    vma.vm_pgoff = shared_int(pgoff)


def vm_flags_init(vma: VmAreaStruct, flags: int) -> None:
    """Set the flags of a VMA that nobody can see."""
    vma.vm_flags = shared_int(flags)


def vm_flags_reset(vma: VmAreaStruct, flags: int) -> None:
    """Replace the flags of a VMA that is write-locked already."""
    vma_lock.vma_assert_write_locked(vma)
    vma.vm_flags = shared_int(flags)


def vm_flags_mod(vma: VmAreaStruct, to_set: int, to_clear: int) -> None:
    """Write-lock the VMA and change flags."""
    vma_lock.vma_start_write(vma)
    vma.vm_flags = shared_int((vma.vm_flags | to_set) & ~to_clear)


def vm_flags_set(vma: VmAreaStruct, flags: int) -> None:
    """Write-lock the VMA and set flags."""
    vm_flags_mod(vma, flags, 0)


def vm_flags_clear(vma: VmAreaStruct, flags: int) -> None:
    """Write-lock the VMA and clear flags."""
    vm_flags_mod(vma, 0, flags)


def is_shared_maywrite(vm_flags: int) -> bool:
    """Whether a mapping with these flags may write to its file."""
    return vm_flags & (VM_SHARED | VM_MAYWRITE) == VM_SHARED | VM_MAYWRITE


def vma_is_anonymous(vma: VmAreaStruct) -> bool:
    """Whether its pages belong to nobody else (shared anonymous memory has a file)."""
    return vma.vm_ops is None and vma.vm_file is None


def vma_is_shared(vma: VmAreaStruct) -> bool:
    """What /proc shows as 's'."""
    return bool(vma.vm_flags & VM_MAYSHARE)
