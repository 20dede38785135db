"""The VMA lock that is a reference count: readers count up, the writer keeps them out by one bit.

Models:      include/linux/mmap_lock.h, vma_start_read_locked, vma_refcount_put, vma_start_write,
             vma_mark_attached; mm/mmap_lock.c, __vma_start_exclude_readers, __vma_end_exclude_readers,
             vma_mark_detached, vma_start_read (7.2)
Guards:      vm_refcnt by read-modify-write; vm_lock_seq: mmap_lock (write) with readers excluded
Invariants:  V1 who holds a count keeps the writer from going on, the VMA from being detached and freed
             V2 an unlocked VMA may look write-locked, a write-locked one never looks unlocked (vm_lock_seq
             changes only while readers are excluded; raising mm_lock_seq drops all write locks)
             V3 a count of 0 means detached: only vma_mark_attached() ever raises it
Leaves out:  lockdep maps, tracepoints
Read next:   mm/vma_lock.py for the names all variants share and for lock_vma_under_rcu()

    vm_refcnt           F = the writer's bit, 1 << 30
    0                   detached
    1                   attached; unlocked or write-locked (vm_lock_seq tells)
    2 .. F-1            attached, with readers (some of them perhaps about to back out)
    F                   detaching, no reader left
    F+1                 write-locking, no reader left; or detaching, one temporary reader left
    above F+1           a writer or detacher waits for readers; the count can only fall
"""

from collections.abc import Callable
from errno import EAGAIN
from functools import partial
from typing import TYPE_CHECKING, Final

from kmodel.core import (
    BUG_ON,
    NO_STORE,
    READ_ONCE,
    TASK_KILLABLE,
    TASK_UNINTERRUPTIBLE,
    WARN_ON_ONCE,
    WRITE_ONCE,
    guards,
    raw_get,
    rmw,
    smp_load_acquire,
)
from kmodel.mm.mm_struct import MmStruct, mmdrop, mmgrab
from kmodel.mm.mmap_lock import mm_lock_seq_largest, mmap_assert_locked, mmap_assert_write_locked
from kmodel.rcu import rcu_read_unlock
from kmodel.sync import (
    __refcount_dec_and_test,
    inc_not_zero_limited_acquire,
    rcuwait_wait_event,
    rcuwait_wake_up,
    refcount_dec_and_test,
    refcount_set,
    refcount_set_release,
    refcount_sub_and_test,
)

if TYPE_CHECKING:
    from kmodel.mm.vma import VmAreaStruct

VM_REFCNT_EXCLUDE_READERS_FLAG: Final = 1 << 30
VM_REFCNT_LIMIT: Final = VM_REFCNT_EXCLUDE_READERS_FLAG - 1
VMA_TYPESAFE_BY_RCU: Final = True
"""A freed VMA is another at once; without, readers inside RCU keep it from that (see mm/vma.py)."""

_ACQUIRE = guards.register(
    "no-vma-inc-acquire", "H35: vm_lock_seq and vm_mm are read before the count is taken, and stale"
)
_LIMIT = guards.register("no-vma-refcnt-limit", "H28, H37: readers count into the writer's bit")
_RECHECK = guards.register(
    "no-vma-seq-recheck", "V2: a reader that took its count just after the writer let go of the bit stays"
)
_MM_CHECK = guards.register(
    "no-vma-mm-check", "H32: the VMA was reused by another address space, whose memory the reader gets"
)
_MM_GRAB = guards.register(
    "no-vma-mm-grab", "H33: the foreign mm is freed between the reader's put and its wake-up"
)
_MM_COPY = guards.register(
    "no-vma-mm-copy", "H31: vm_mm is read after the count is given up, when the VMA may be another's"
)
_WRITER_WAIT = guards.register("no-vma-writer-wait", "H27: the writer does not wait for readers inside")
_DETACH_WAIT = guards.register(
    "no-vma-detach-wait", "H26: a VMA is detached and freed while a temporary reader holds a count"
)
_WAKE = guards.register(
    "no-vma-detach-wake", "H30: readers wake the writer at F+1 only; who waits for F sleeps for ever"
)
_KILLED = guards.register(
    "no-vma-killed-cleanup", "H39: a killed writer leaves its bit; readers fail for ever"
)
_RELEASE = guards.register(
    "no-vma-attach-release", "H36: a reader counts itself in and sees the fields of the VMA's last life"
)


def _removed(guard: str) -> bool:
    return guards.any_removed and guard in guards.removed


# ------------------------------------------------------------------------------------------------ readers


def vma_lock_init(vma: "VmAreaStruct", reset_refcnt: bool) -> None:
    """A VMA is being made: detached, not write-locked."""
    if reset_refcnt:
        refcount_set(vma, "vm_refcnt", 0)
    vma.vm_lock_seq = mm_lock_seq_largest()


def vma_lock_alloc(vma: "VmAreaStruct") -> bool:
    """The count is in the VMA: there is nothing to allocate."""
    return True


def vma_lock_free(vma: "VmAreaStruct") -> None:
    """Nor to free."""


def vma_free_rcu(vma: "VmAreaStruct", free: "Callable[[VmAreaStruct], None]") -> None:
    """Nobody waits for readers: see VMA_TYPESAFE_BY_RCU."""
    free(vma)


def vma_is_attached(vma: "VmAreaStruct") -> bool:
    """Whether the count says so."""
    return bool(READ_ONCE(vma, "vm_refcnt"))


def vma_start_read(mm: MmStruct, vma: "VmAreaStruct") -> "VmAreaStruct | int | None":
    """Take a count on a VMA found in mm's tree, inside RCU: the VMA, still inside RCU; or, OUTSIDE RCU, None
    (busy: take mmap_lock) or -EAGAIN (detached: look it up again).
    """
    # Cheap and pessimistic: V2 does not rest on it.
    if READ_ONCE(vma, "vm_lock_seq") == READ_ONCE(mm.mm_lock_seq, "sequence"):
        rcu_read_unlock()
        return None
    # ACQUIRE: pairs with RELEASE in vma_mark_attached(), so that vm_mm, vm_lock_seq and the bounds below are
    # of the life the count belongs to; and with the writer's RELEASE in __vma_end_exclude_readers().
    taken, old = _inc_refcnt(vma)
    if not taken:
        rcu_read_unlock()
        return -EAGAIN if old == 0 else None
    if vma.vm_mm is not mm and not _removed(_MM_CHECK):
        _put_foreign(vma)
        return None
    # ACQUIRE: pairs with WMB in vma_end_write_all(): if the last write lock is gone, its changes are here.
    if vma.vm_lock_seq == smp_load_acquire(mm.mm_lock_seq, "sequence") and not _removed(_RECHECK):
        vma_refcount_put(vma)
        rcu_read_unlock()
        return None
    return vma


def _inc_refcnt(vma: "VmAreaStruct") -> tuple[bool, int]:
    if not guards.any_removed:
        return inc_not_zero_limited_acquire(vma, "vm_refcnt", VM_REFCNT_LIMIT)
    if _ACQUIRE in guards.removed:
        old = rmw(
            vma,
            "vm_refcnt",
            lambda seen: NO_STORE if seen == 0 or seen >= VM_REFCNT_LIMIT else seen + 1,
            "relaxed",
        )
        return 0 < old < VM_REFCNT_LIMIT, old
    limit = (1 << 31) - 1 if _LIMIT in guards.removed else VM_REFCNT_LIMIT
    return inc_not_zero_limited_acquire(vma, "vm_refcnt", limit)


def _put_foreign(vma: "VmAreaStruct") -> None:
    # Our count keeps the VMA attached, and so its mm; once it is given up the mm may go, but putting the
    # count may have to wake that mm's writer. So the mm is pinned, and that cannot end inside RCU.
    other_mm = vma.vm_mm
    assert other_mm is not None, "mmgrab(NULL): the VMA that a reader holds has no mm"
    rcu_read_unlock()
    if _removed(_MM_GRAB):
        vma_refcount_put(vma)
        return
    mmgrab(other_mm)
    vma_refcount_put(vma)
    mmdrop(other_mm)


def vma_start_read_locked(vma: "VmAreaStruct") -> bool:
    """Trade mmap_lock for a count. No writer can be about, so only the limit (or a detached VMA) refuses."""
    mm = vma.vm_mm
    assert mm is not None
    mmap_assert_locked(mm)
    return _inc_refcnt(vma)[0]


def _is_vma_writer_only(refcnt: int) -> bool:
    """Whether the count says: a writer waits, and no reader is in its way (F+1) or a detacher's (F)."""
    if _removed(_WAKE):
        return refcnt == VM_REFCNT_EXCLUDE_READERS_FLAG + 1
    return bool(refcnt & VM_REFCNT_EXCLUDE_READERS_FLAG) and refcnt <= VM_REFCNT_EXCLUDE_READERS_FLAG + 1


def vma_refcount_put(vma: "VmAreaStruct") -> None:
    """Give up a count, and wake the writer if it was the one waited for.

    RELEASE: what the reader did is over before the writer goes on. Afterwards the VMA may be anything: its mm
    is read before (H31). A count that falls to 0 finished a detach; nobody waits for that.
    """
    mm = vma.vm_mm
    last, old = __refcount_dec_and_test(vma, "vm_refcnt")
    if last:
        return
    if _removed(_MM_COPY):
        mm = vma.vm_mm
    # At worst somebody else's put was faster and this wake-up is one too many: the waiter looks again.
    if _is_vma_writer_only(old - 1):
        assert mm is not None
        rcuwait_wake_up(mm.vma_writer_wait)


vma_end_read = vma_refcount_put


# ------------------------------------------------------------------------------------------------ the writer


def __is_vma_write_locked(vma: "VmAreaStruct") -> bool:
    """Whether this hold of mmap_lock (write) has write-locked the VMA. Plain reads: only we write either."""
    mm = vma.vm_mm
    assert mm is not None
    mmap_assert_write_locked(mm)
    return vma.vm_lock_seq == mm.mm_lock_seq.sequence


def _refcnt_is(vma: "VmAreaStruct", target: int) -> bool:
    # A relaxed load in the kernel, and the control dependency after it: stores of the writer stay behind.
    # The race oracle knows no control dependencies, hence an acquire.
    return bool(smp_load_acquire(vma, "vm_refcnt") == target)


def _add_flag(old: int) -> int:
    return NO_STORE if old == 0 else old + VM_REFCNT_EXCLUDE_READERS_FLAG


def __vma_start_exclude_readers(vma: "VmAreaStruct", state: int, detaching: bool = False) -> tuple[int, bool]:
    """Keep new readers out and wait for those inside: (0, True); (0, False): detached, there are none;
    (-EINTR, False): killed.
    """
    mm = vma.vm_mm
    assert mm is not None
    mmap_assert_write_locked(mm)
    # A detacher has given up the VMA's own count before.
    target = VM_REFCNT_EXCLUDE_READERS_FLAG + (0 if detaching else 1)
    if rmw(vma, "vm_refcnt", _add_flag, "relaxed") == 0:
        return 0, False
    error = rcuwait_wait_event(mm.vma_writer_wait, partial(_refcnt_is, vma, target), state)
    if error:
        if not _removed(_KILLED):
            WARN_ON_ONCE(__vma_end_exclude_readers(vma), "a killed writer's VMA was detached meanwhile")
        return error, False
    return 0, True


def __vma_end_exclude_readers(vma: "VmAreaStruct") -> bool:
    """Let readers in again; whether the VMA is detached. RELEASE: they see vm_lock_seq as it is now."""
    return refcount_sub_and_test(vma, "vm_refcnt", VM_REFCNT_EXCLUDE_READERS_FLAG)


def _start_write(vma: "VmAreaStruct", state: int) -> int:
    if __is_vma_write_locked(vma):
        return 0
    mm = vma.vm_mm
    assert mm is not None
    if _removed(_WRITER_WAIT):
        WRITE_ONCE(vma, "vm_lock_seq", mm.mm_lock_seq.sequence)
        return 0
    error, exclusive = __vma_start_exclude_readers(vma, state)
    if error:
        return error
    # Written while nobody else can be inside; read with a count held, or as a hint.
    WRITE_ONCE(vma, "vm_lock_seq", mm.mm_lock_seq.sequence)
    if exclusive:
        # Readers that come now back out at the vm_lock_seq check. They raise the count for a moment, which is
        # why a detach waits (H26).
        WARN_ON_ONCE(__vma_end_exclude_readers(vma), "a write-locked VMA was detached by a reader")
    return 0


def vma_start_write(vma: "VmAreaStruct") -> None:
    """Write-lock the VMA until mmap_lock is unlocked or downgraded: no reader is inside or comes in."""
    _start_write(vma, TASK_UNINTERRUPTIBLE)


def vma_start_write_killable(vma: "VmAreaStruct") -> int:
    """vma_start_write that a fatal signal ends: 0, or -EINTR and not locked."""
    return _start_write(vma, TASK_KILLABLE)


def vma_mark_attached(vma: "VmAreaStruct") -> None:
    """The VMA goes into the tree: readers may count themselves in, and fail, until the write lock ends.

    RELEASE: pairs with ACQUIRE in vma_start_read(). The memory may have been another VMA a moment ago; this
    comes after every field is set.
    """
    if _removed(_RELEASE):
        WRITE_ONCE(vma, "vm_refcnt", 1)
    else:
        refcount_set_release(vma, "vm_refcnt", 1)


def vma_mark_detached(vma: "VmAreaStruct") -> None:
    """The VMA leaves the tree (or has left it). On return no reader holds a count or will get one."""
    if refcount_dec_and_test(vma, "vm_refcnt"):
        return
    if _removed(_DETACH_WAIT):
        return
    # Temporary readers: they will see the write lock and back out; wait for them (H26).
    _error, exclusive = __vma_start_exclude_readers(vma, TASK_UNINTERRUPTIBLE, detaching=True)
    if exclusive:
        WARN_ON_ONCE(not __vma_end_exclude_readers(vma), "a detached VMA still has readers")


# ------------------------------------------------------------------------------------------------ in words


def vma_state_in_words(vma: "VmAreaStruct") -> str:
    """What vm_refcnt and vm_lock_seq say: the row of the table. Not an access."""
    count = raw_get(vma, "vm_refcnt")
    flag = VM_REFCNT_EXCLUDE_READERS_FLAG
    mm = raw_get(vma, "vm_mm")
    locked = mm is not None and raw_get(vma, "vm_lock_seq") == raw_get(mm.mm_lock_seq, "sequence")
    if count == 0:
        return "detached"
    if count == 1:
        return "attached, " + ("write-locked" if locked else "unlocked")
    if 1 < count < flag:
        if locked:
            return f"attached, write-locked, {count - 1} readers about to back out"
        return f"attached, {count - 1} readers"
    if count == flag:
        return "detaching, no reader left"
    if count == flag + 1:
        return "being write-locked, no reader left (or detaching, one temporary reader left)"
    if count > flag:
        return f"a writer waits for {count - flag - 1} readers (or a detacher for {count - flag})"
    return f"impossible: vm_refcnt {count}"


def check_invariants(vma: "VmAreaStruct") -> None:
    """V3: the value of vm_refcnt is one of the table's. Not an access."""
    count = raw_get(vma, "vm_refcnt")
    BUG_ON(not 0 <= count < 2 * VM_REFCNT_EXCLUDE_READERS_FLAG, f"V3: vm_refcnt {count} of {vma!r}")
