"""Finding VMAs: by address, and one after the other.

Models:      include/linux/mm.h, vma_lookup, find_vma, for_each_vma, vma_iterator; mm/vma.h, vma_iter_*;
             mm/mmap_lock.c, lock_next_vma (7.2)
Guards:      RCU or mmap_lock to look; mmap_lock (write) to store. What keeps a found VMA alive is the
             caller's: mmap_lock, a count on it, or (memory only) RCU
Invariants:  F1 vma_lookup() of an address inside a mapping that does not change finds it
Leaves out:  docs/limits.md
Read next:   mm/mmap.py

The tree is keyed by addresses, inclusive: a VMA is stored at [vm_start, vm_end - 1].
"""

from collections.abc import Iterator
from errno import EAGAIN
from typing import TYPE_CHECKING, Any

from kmodel.core import guards
from kmodel.mm import vma_lock
from kmodel.mm.maple_node import ULONG_MAX
from kmodel.mm.maple_store import mas_destroy, mas_preallocate, mas_store_gfp, mas_store_prealloc
from kmodel.mm.maple_walk import (
    MaState,
    mas_find,
    mas_next,
    mas_prev,
    mas_set,
    mas_set_range,
    mas_walk,
    mtree_lookup_walk,
)
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap_lock import (
    mmap_assert_locked,
    mmap_lock_speculate_retry,
    mmap_lock_speculate_try_begin,
    mmap_read_lock_killable,
    mmap_read_unlock,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

if TYPE_CHECKING:
    from kmodel.core import TaskStruct
    from kmodel.mm.vma import VmAreaStruct

type VmaIterator = MaState
"""struct vma_iterator wraps a ma_state; here it is one."""

_GAP = guards.register(
    "no-gap-recheck", "H40: a reader of maps reports a hole that never was, because a neighbour moved"
)
_BEHIND = guards.register(
    "no-next-vma-behind-check",
    "H40: a VMA that was cut off or reused is reported out of order",
)
_RESET = guards.register(
    "no-next-vma-iter-reset", "H40: a VMA was replaced while it was looked at; what took its place is missed"
)
_FALLBACK = guards.register(
    "no-next-vma-fallback", "H40: a VMA that cannot be locked at once is passed over, and a hole is reported"
)


def vma_lookup(mm: MmStruct, addr: int, task: "TaskStruct | None" = None) -> Any:
    """The VMA that maps `addr`, or None. mtree_load: takes its own RCU section (`task` saves a look-up).

    Without mmap_lock the answer is a hint: the VMA may be another's by the time it is looked at.
    """
    if task is not None and task.rcu_read_lock_nesting:
        return mtree_lookup_walk(mm.mm_mt, addr)  # the nested section would only count
    rcu_read_lock(task)
    vma = mtree_lookup_walk(mm.mm_mt, addr)
    rcu_read_unlock(task)
    return vma


def find_vma(mm: MmStruct, addr: int) -> Any:
    """The first VMA that ends above `addr` (it need not contain it), or None. mmap_lock held."""
    return find_vma_intersection(mm, addr, ULONG_MAX)


def find_vma_intersection(mm: MmStruct, start: int, end: int) -> Any:
    """The first VMA that overlaps [start, end), or None. mmap_lock held."""
    mmap_assert_locked(mm)
    return mas_find(MaState(mm.mm_mt, start, start), end - 1 if end < ULONG_MAX else ULONG_MAX)


def find_vma_prev(mm: MmStruct, addr: int) -> tuple[Any, Any]:
    """(find_vma(mm, addr), the VMA before that place). mmap_lock held."""
    mmap_assert_locked(mm)
    vmi = MaState(mm.mm_mt, addr, addr)
    vma = mas_walk(vmi)
    prev = vma_prev(vmi)
    if vma is None:
        vma = mas_find(MaState(mm.mm_mt, addr, addr))
    return vma, prev


# ------------------------------------------------------------------------------------------------ iterators


def vma_iter_init(mm: MmStruct, addr: int = 0) -> VmaIterator:
    """An iterator that begins at `addr`."""
    return MaState(mm.mm_mt, addr, addr)


def vma_find(vmi: VmaIterator, limit: int) -> Any:
    """At first the VMA at or behind the iterator's address, later the next one, that begins below `limit`."""
    return mas_find(vmi, limit - 1)


def vma_next(vmi: VmaIterator) -> Any:
    """At first the VMA at or behind the iterator's address, later the next one."""
    return mas_find(vmi, ULONG_MAX)


def vma_prev(vmi: VmaIterator) -> Any:
    """The VMA before the iterator's place."""
    return mas_prev(vmi, 0)


def vma_iter_next_range(vmi: VmaIterator) -> Any:
    """The VMA after the iterator's place."""
    return mas_next(vmi, ULONG_MAX)


def vma_iter_set(vmi: VmaIterator, addr: int) -> None:
    """Begin anew at `addr` (needed whenever RCU was left)."""
    mas_set(vmi, addr)


def for_each_vma(mm: MmStruct, addr: int = 0, limit: int = ULONG_MAX) -> Iterator[Any]:
    """Every VMA that ends above `addr` and begins below `limit`, in order. mmap_lock held throughout."""
    mmap_assert_locked(mm)
    vmi = vma_iter_init(mm, addr)
    while (vma := mas_find(vmi, limit - 1)) is not None:
        yield vma


# ------------------------------------------------------------------------------------------------ stores


def vma_iter_prealloc(vmi: VmaIterator, start: int, end: int, vma: "VmAreaStruct | None") -> int:
    """Get ready to store `vma` (or to clear) at [start, end): 0 or -ENOMEM."""
    mas_set_range(vmi, start, end - 1)
    return mas_preallocate(vmi, vma)


def vma_iter_free(vmi: VmaIterator) -> None:
    """Give up what vma_iter_prealloc() got ready."""
    mas_destroy(vmi)


def vma_iter_store_overwrite(vmi: VmaIterator, vma: "VmAreaStruct") -> None:
    """Make the prepared store of a VMA that is in the tree already (it grows or its neighbour goes)."""
    vma_lock.vma_assert_attached(vma)
    mas_store_prealloc(vmi, vma)


def vma_iter_store_new(vmi: VmaIterator, vma: "VmAreaStruct") -> None:
    """Attach a new VMA, then make the prepared store. Its write lock keeps readers out either way."""
    vma_lock.vma_mark_attached(vma)
    mas_store_prealloc(vmi, vma)


def vma_iter_store_gfp(vmi: VmaIterator, vma: "VmAreaStruct") -> int:
    """Store a new VMA over its range, then attach it: 0 or -ENOMEM."""
    mas_set_range(vmi, vma.vm_start, vma.vm_end - 1)
    error = mas_store_gfp(vmi, vma)
    if not error:
        vma_lock.vma_mark_attached(vma)
    return error


def vma_iter_clear(vmi: VmaIterator) -> None:
    """Make the prepared store of nothing."""
    mas_store_prealloc(vmi, None)


def vma_iter_clear_gfp(vmi: VmaIterator, start: int, end: int) -> int:
    """Clear [start, end): 0 or -ENOMEM."""
    mas_set_range(vmi, start, end - 1)
    return mas_store_gfp(vmi, None)


# -------------------------------------------------------------------------------- readers of maps


def lock_next_vma(mm: MmStruct, vmi: VmaIterator, from_addr: int) -> Any:
    """The first VMA that ends above from_addr, read-locked; None; -EINTR; -EAGAIN (it has too many readers).
    Enter and leave inside RCU; it may be left in between.

    Going from VMA to VMA under their own locks, a reader of /proc/PID/maps must not report a hole that never
    was: between finding a VMA and locking it, the VMA may have given what is before it to another (H40).
    """
    while True:
        # For a hole that may have to be verified below.
        mmap_unlocked, mm_wr_seq = mmap_lock_speculate_try_begin(mm)
        vma = vma_next(vmi)
        if vma is None:
            return None
        locked = vma_lock.vma_start_read(mm, vma)
        if locked is None and _removed(_FALLBACK):
            rcu_read_lock()
            continue
        if locked is None:
            return _fall_back(mm, vmi, from_addr)
        if not isinstance(locked, int):
            break
        # Detached between the walk and the count: what took its place may begin before its end.
        rcu_read_lock()
        if not _removed(_RESET):
            vma_iter_set(vmi, from_addr)
    # Reused for a mapping further down, or cut off at the end?
    if vma.vm_end <= from_addr and not _removed(_BEHIND):
        return _unlock_and_fall_back(mm, vmi, vma, from_addr)
    # A hole before it? Only if nothing changed since the sample, or if looking again leads to the same VMA,
    # which cannot shrink now.
    if vma.vm_start > from_addr and not _removed(_GAP):
        if not mmap_unlocked or mmap_lock_speculate_retry(mm, mm_wr_seq):
            vma_iter_set(vmi, from_addr)
            if vma_next(vmi) is not vma:
                return _unlock_and_fall_back(mm, vmi, vma, from_addr)
    return vma


def _removed(guard: str) -> bool:
    return guards.any_removed and guard in guards.removed


def _unlock_and_fall_back(mm: MmStruct, vmi: VmaIterator, vma: "VmAreaStruct", from_addr: int) -> Any:
    rcu_read_unlock()
    vma_lock.vma_end_read(vma)
    return _fall_back(mm, vmi, from_addr)


def _fall_back(mm: MmStruct, vmi: VmaIterator, from_addr: int) -> Any:
    """Enter outside RCU, leave inside."""
    vma = _lock_next_vma_under_mmap_lock(mm, vmi, from_addr)
    rcu_read_lock()
    # The nodes it knows may be gone.
    vma_iter_set(vmi, from_addr if vma is None or isinstance(vma, int) else vma.vm_end)
    return vma


def _lock_next_vma_under_mmap_lock(mm: MmStruct, vmi: VmaIterator, from_addr: int) -> Any:
    """The sure way: find it under mmap_lock, trade that for its read lock. None, -EINTR, -EAGAIN."""
    error = mmap_read_lock_killable(mm)
    if error:
        return error
    vma_iter_set(vmi, from_addr)
    vma = vma_next(vmi)
    if vma is not None and not vma_lock.vma_start_read_locked(vma):
        vma = -EAGAIN
    mmap_read_unlock(mm)
    return vma
