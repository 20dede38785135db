"""The VMA lock of 6.4 to 6.14: a read-write semaphore per VMA, in memory of its own.

Models:      include/linux/mm.h, vma_start_read, vma_end_read, vma_start_write, vma_mark_detached;
             kernel/fork.c, vma_lock_alloc, vm_area_free_rcu_cb (6.12; what the vm_refcnt series began with)
Guards:      vm_lock.lock (write) for vm_lock_seq; the VMA write lock for `detached`
Invariants:  V1 who holds the semaphore for reading keeps the VMA from being write-locked, and so from being
             detached; who is inside RCU keeps it, and its semaphore, from being freed
             V2 as in mm/vma_refcnt.py: false locked is possible, false unlocked is not
Leaves out:  a killable writer came only with vm_refcnt; here it is what it would have been. New VMAs are
             detached until they are attached: the first patches of the vm_refcnt series; before, new VMAs
             counted as attached. lock_vma_under_rcu() looked at `detached` itself, here vma_start_read() does
Read next:   mm/vma_lock_seq.py, the same with one barrier more; mm/vma_refcnt.py, what came after

A writer takes the semaphore only to mark the VMA: it writes mm_lock_seq into vm_lock_seq and lets go. From
then on readers find the two equal and back out, until mmap_write_unlock() raises mm_lock_seq.

Readers never wait, and an address space has one writer at a time, so a semaphore per VMA is more than is
needed: 40 bytes, and a queue that nobody but that writer is ever in.
"""

from collections.abc import Callable
from errno import EAGAIN
from typing import TYPE_CHECKING, Final

from kmodel.core import (
    BUG_ON,
    READ_ONCE,
    WRITE_ONCE,
    Pooled,
    embedded,
    guards,
    initcall,
    kernel_struct,
    raw_get,
    smp_load_acquire,
    smp_wmb,
)
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap_lock import mm_lock_seq_largest, mmap_assert_locked, mmap_assert_write_locked
from kmodel.rcu import call_rcu, rcu_read_lock, rcu_read_unlock
from kmodel.slab import KmemCache, kmem_cache_create, kmem_cache_free, kmem_cache_zalloc
from kmodel.sync import (
    RwSemaphore,
    down_read,
    down_read_trylock,
    down_write,
    down_write_killable,
    rwsem_is_locked,
    up_read,
    up_write,
)

if TYPE_CHECKING:
    from kmodel.mm.vma import VmAreaStruct

VMA_TYPESAFE_BY_RCU: Final = False
"""A freed VMA stays as it is until readers inside RCU are gone."""

_WRITER_WAIT = guards.register(
    "no-v8-writer-wait", "H27: the writer marks the VMA without the semaphore, beside readers inside"
)
_RECHECK = guards.register(
    "no-v8-seq-recheck", "V2: a reader that got the semaphore just after the writer let go of it stays"
)
_DETACHED = guards.register(
    "no-v8-detached-check", "H25: a VMA that left the tree after the reader found it is locked all the same"
)
_RCU_FREE = guards.register(
    "no-v8-rcu-free", "H25: a VMA is freed at once, while a reader that found it has not locked it yet"
)
_END_READ_RCU = guards.register(
    "no-v8-end-read-rcu", "the semaphore is freed while its last reader is still busy waking the writer"
)


@kernel_struct
class VmaLock(Pooled):
    """struct vma_lock: kept out of the VMA because of false sharing seen with adjacent-line prefetch."""

    lock: RwSemaphore = embedded(factory=RwSemaphore)

    __hash__ = object.__hash__


vma_lock_cachep: KmemCache


@initcall
def vma_lock_cache_init() -> None:
    """Create the cache of semaphores."""
    global vma_lock_cachep
    vma_lock_cachep = kmem_cache_create("vma_lock", VmaLock)


def _removed(guard: str) -> bool:
    return guards.any_removed and guard in guards.removed


# ------------------------------------------------------------------------------------------------ lifetime


def vma_lock_init(vma: "VmAreaStruct", reset_refcnt: bool) -> None:
    """A VMA is being made: detached, not write-locked."""
    vma.detached = True
    vma.vm_lock_seq = mm_lock_seq_largest()


def vma_lock_alloc(vma: "VmAreaStruct") -> bool:
    """Give a new VMA its semaphore; False without memory."""
    vma.vm_lock = kmem_cache_zalloc(vma_lock_cachep)
    return vma.vm_lock is not None


def vma_lock_free(vma: "VmAreaStruct") -> None:
    """Free the semaphore, with the VMA. Nobody can be inside the lock now."""
    BUG_ON(rwsem_is_locked(vma.vm_lock.lock), "a VMA is freed with its lock held")
    kmem_cache_free(vma_lock_cachep, vma.vm_lock)


def vma_free_rcu(vma: "VmAreaStruct", free: "Callable[[VmAreaStruct], None]") -> None:
    """Have free(vma) called when the readers inside RCU are gone: they may have found the VMA, and one that
    was inside its lock may still be in up_read().
    """
    if _removed(_RCU_FREE):
        free(vma)
    else:
        call_rcu(vma, free)


# ------------------------------------------------------------------------------------------------ readers


def vma_is_attached(vma: "VmAreaStruct") -> bool:
    """Whether the VMA is in a tree. Under mmap_lock (write), or its read lock."""
    return not vma.detached


def vma_start_read(mm: MmStruct, vma: "VmAreaStruct") -> "VmAreaStruct | int | None":
    """Read-lock a VMA found in mm's tree, inside RCU: the VMA, still inside RCU; or, OUTSIDE RCU, None (busy:
    take mmap_lock) or -EAGAIN (detached: look it up again).
    """
    # Cheap and pessimistic: V2 does not rest on it.
    if READ_ONCE(vma, "vm_lock_seq") == READ_ONCE(mm.mm_lock_seq, "sequence"):
        rcu_read_unlock()
        return None
    lock = vma.vm_lock.lock
    # ACQUIRE: pairs with RELEASE in the up_write() of vma_start_write().
    if not down_read_trylock(lock):
        rcu_read_unlock()
        return None
    # A writer may have marked the VMA before we got the semaphore.
    # ACQUIRE: pairs with RELEASE (or WMB) in vma_end_write_all(): if the mark is over, its changes are here.
    if vma.vm_lock_seq == smp_load_acquire(mm.mm_lock_seq, "sequence") and not _removed(_RECHECK):
        up_read(lock)
        rcu_read_unlock()
        return None
    if vma.detached and not _removed(_DETACHED):
        # It left the tree between the walk and the semaphore; RCU kept it.
        up_read(lock)
        rcu_read_unlock()
        return -EAGAIN
    return vma


def vma_start_read_locked(vma: "VmAreaStruct") -> bool:
    """Trade mmap_lock for the VMA's read lock. It may wait for a moment, and cannot fail."""
    mm = vma.vm_mm
    assert mm is not None
    mmap_assert_locked(mm)
    down_read(vma.vm_lock.lock)
    return True


def vma_end_read(vma: "VmAreaStruct") -> None:
    """Drop the read lock. RCU: the writer that gets the semaphore may free it, and we may have to look at its
    queue once more.
    """
    lock = vma.vm_lock.lock
    if _removed(_END_READ_RCU):
        up_read(lock)
        return
    rcu_read_lock()
    up_read(lock)
    rcu_read_unlock()


# ------------------------------------------------------------------------------------------------ the writer


def __is_vma_write_locked(vma: "VmAreaStruct") -> bool:
    """Whether this hold of mmap_lock (write) has write-locked the VMA. Plain reads: only we write either."""
    mm = vma.vm_mm
    assert mm is not None
    mmap_assert_write_locked(mm)
    return vma.vm_lock_seq == mm.mm_lock_seq.sequence


def mark_write_locked(vma: "VmAreaStruct", *, killable: bool = False, wmb: bool = False) -> int:
    """Wait for the readers inside and mark the VMA: 0, or -EINTR. The kernel has this three times."""
    if __is_vma_write_locked(vma):
        return 0
    mm, lock = vma.vm_mm, vma.vm_lock.lock
    assert mm is not None
    if _removed(_WRITER_WAIT):
        WRITE_ONCE(vma, "vm_lock_seq", mm.mm_lock_seq.sequence)
        return 0
    if killable:
        error = down_write_killable(lock)
        if error:
            return error
    else:
        down_write(lock)
    # Read without the semaphore only as a hint, or by those who speculate.
    WRITE_ONCE(vma, "vm_lock_seq", mm.mm_lock_seq.sequence)
    if wmb:
        smp_wmb()
    # RELEASE: readers that get the semaphore see the mark. What we store later may become visible before it;
    # nobody inside the semaphore looks at that.
    up_write(lock)
    return 0


def vma_start_write(vma: "VmAreaStruct") -> None:
    """Write-lock the VMA until mmap_lock is unlocked or downgraded: no reader is inside or stays."""
    mark_write_locked(vma)


def vma_start_write_killable(vma: "VmAreaStruct") -> int:
    """vma_start_write that a fatal signal ends: 0, or -EINTR and not locked."""
    return mark_write_locked(vma, killable=True)


def vma_mark_attached(vma: "VmAreaStruct") -> None:
    """The VMA goes into the tree. Needs no lock of its own: whoever finds it finds it write-locked."""
    vma.detached = False


def vma_mark_detached(vma: "VmAreaStruct") -> None:
    """The VMA leaves the tree. It is write-locked: no reader is inside, and those that come back out."""
    vma.detached = True


# ------------------------------------------------------------------------------------------------ in words


def vma_state_in_words(vma: "VmAreaStruct") -> str:
    """What the flag, the semaphore and vm_lock_seq say. Not an access."""
    mm = raw_get(vma, "vm_mm")
    marked = mm is not None and raw_get(vma, "vm_lock_seq") == raw_get(mm.mm_lock_seq, "sequence")
    if raw_get(vma, "detached"):
        return "detached"
    count = raw_get(vma.vm_lock.lock, "count")
    readers = count >> 8
    if count & 1:
        return "attached, a writer is marking it"
    if marked:
        return "attached, write-locked" + (f", {readers} readers about to back out" if readers else "")
    if readers:
        return f"attached, {readers} readers" + (", a writer waits for them" if count & 2 else "")
    return "attached, unlocked"


def check_invariants(vma: "VmAreaStruct") -> None:
    """A VMA that is in use has its semaphore. Not an access."""
    BUG_ON(vma.vm_lock is None, f"{vma!r} has no vm_lock")
