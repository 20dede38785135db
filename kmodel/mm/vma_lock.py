"""The per-VMA lock by its kernel names, whichever variant is behind them; lock_vma_under_rcu().

Models:      include/linux/mmap_lock.h, vma_start_read and friends; mm/mmap_lock.c, lock_vma_under_rcu (7.2)
Guards:      see the variant: mm/vma_refcnt.py (6.15 on), mm/vma_lock_v8.py (6.4 to 6.14) or
             mm/vma_lock_seq.py (proposed in 2024)
Invariants:  L1 every failure to read-lock is answered by taking mmap_lock: none is an error
             L2 a reader never waits for mmap_lock while it holds a VMA lock (H38)
Leaves out:  nothing of its own
Read next:   mm/vma_refcnt.py

`implementation` is the variant: a module with these functions. vma_lock_variant() changes it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kmodel.core import (
    WARN_ON_ONCE,
    PerCpu,
    Pooled,
    alloc_percpu,
    atomic,
    for_each_possible_cpu,
    guards,
    initcall,
    kernel_struct,
    raw_get,
    this_cpu_inc,
)
from kmodel.mm import vma_refcnt
from kmodel.mm.maple_walk import MaState, mas_set, mas_walk
from kmodel.mm.mm_struct import MmStruct
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

if TYPE_CHECKING:
    from kmodel.mm.vma import VmAreaStruct

implementation: Any = vma_refcnt


@contextmanager
def vma_lock_variant(module: ModuleType) -> Iterator[None]:
    """Run the block with another VMA lock. The block boots first: VMAs' memory depends on the lock."""
    global implementation
    before, implementation = implementation, module
    try:
        yield
    finally:
        implementation = before


_ADDRESS = guards.register(
    "no-vma-address-check", "H34: the VMA shrank, moved or was reused before it was locked; a fault is wrong"
)


@kernel_struct
class VmaLockEvents(Pooled):
    """This CPU's part of the VMA_LOCK_* counters of /proc/vmstat."""

    vma_lock_success: int = atomic(default=0)
    vma_lock_abort: int = atomic(default=0)
    vma_lock_retry: int = atomic(default=0)
    vma_lock_miss: int = atomic(default=0)


vm_event_states: PerCpu


@initcall
def vm_event_init() -> None:
    """All counters start at zero."""
    global vm_event_states
    vm_event_states = alloc_percpu(VmaLockEvents)


def count_vm_vma_lock_event(item: str) -> None:
    """Count one event."""
    this_cpu_inc(vm_event_states, item)


def vma_lock_statistics() -> dict[str, int]:
    """The counters, summed over CPUs."""
    names = ("vma_lock_success", "vma_lock_abort", "vma_lock_retry", "vma_lock_miss")
    cpus = list(for_each_possible_cpu(vm_event_states))
    return {name: sum(raw_get(cpu, name) for cpu in cpus) for name in names}


# ------------------------------------------------------------------------------------------------ the lock


def vma_lock_init(vma: "VmAreaStruct", reset_refcnt: bool) -> None:
    """A VMA is being made: detached, not write-locked."""
    implementation.vma_lock_init(vma, reset_refcnt)


def vma_lock_alloc(vma: "VmAreaStruct") -> bool:
    """Get what the lock needs beside the VMA; False without memory."""
    return bool(implementation.vma_lock_alloc(vma))


def vma_lock_free(vma: "VmAreaStruct") -> None:
    """Give it back. Nobody can know the VMA any more."""
    implementation.vma_lock_free(vma)


def vma_free_rcu(vma: "VmAreaStruct", free: "Callable[[VmAreaStruct], None]") -> None:
    """Have free(vma) called when the lock allows it: at once, or after a grace period."""
    implementation.vma_free_rcu(vma, free)


def vma_start_read(mm: MmStruct, vma: "VmAreaStruct") -> "VmAreaStruct | int | None":
    """Read-lock a VMA found in mm's tree, inside RCU: the VMA, still inside RCU; else, with RCU LEFT, None
    (busy) or -EAGAIN (detached: look it up again).
    """
    return implementation.vma_start_read(mm, vma)  # type: ignore[no-any-return]


def vma_start_read_locked(vma: "VmAreaStruct") -> bool:
    """Trade mmap_lock, which is held, for the VMA's read lock; whether it was to be had."""
    return implementation.vma_start_read_locked(vma)  # type: ignore[no-any-return]


def vma_end_read(vma: "VmAreaStruct") -> None:
    """Drop the read lock. The VMA may be anything afterwards."""
    implementation.vma_end_read(vma)


def vma_start_write(vma: "VmAreaStruct") -> None:
    """Write-lock the VMA for the rest of this hold of mmap_lock; waits for its readers."""
    implementation.vma_start_write(vma)


def vma_start_write_killable(vma: "VmAreaStruct") -> int:
    """vma_start_write that a fatal signal ends: 0 or -EINTR."""
    return implementation.vma_start_write_killable(vma)  # type: ignore[no-any-return]


def vma_is_attached(vma: "VmAreaStruct") -> bool:
    """Whether the VMA is in a tree, as its count (or flag) says."""
    return bool(implementation.vma_is_attached(vma))


def vma_mark_attached(vma: "VmAreaStruct") -> bool:
    """The VMA goes into the tree; False (and a warning) if it was not write-locked or attached already."""
    ok = vma_assert_write_locked(vma) & vma_assert_detached(vma)
    if ok:
        implementation.vma_mark_attached(vma)
    return ok


def vma_mark_detached(vma: "VmAreaStruct") -> bool:
    """The VMA leaves the tree; False (and a warning) if it was not write-locked or not attached. Waits for
    temporary readers.
    """
    ok = vma_assert_write_locked(vma) & vma_assert_attached(vma)
    if ok:
        implementation.vma_mark_detached(vma)
    return ok


def vma_assert_write_locked(vma: "VmAreaStruct") -> bool:
    """Warn unless the VMA is write-locked by this hold of mmap_lock; whether it is."""
    return not WARN_ON_ONCE(not implementation.__is_vma_write_locked(vma), f"{vma!r} is not write-locked")


def vma_assert_attached(vma: "VmAreaStruct") -> bool:
    """Warn unless the VMA is attached; whether it is."""
    return not WARN_ON_ONCE(not vma_is_attached(vma), "a VMA is not attached")


def vma_assert_detached(vma: "VmAreaStruct") -> bool:
    """Warn unless the VMA is detached; whether it is."""
    return not WARN_ON_ONCE(vma_is_attached(vma), "a VMA is not detached")


# ------------------------------------------------------------------------------------------------ lookup


def lock_vma_under_rcu(mm: MmStruct, address: int) -> "VmAreaStruct | None":
    """The VMA at `address`, read-locked; None: take mmap_lock and look again, whatever the reason was."""
    rcu_read_lock()
    mas = MaState(mm.mm_mt, address, address)
    while True:
        found = mas_walk(mas)
        if found is None:
            rcu_read_unlock()
            break
        vma = vma_start_read(mm, found)
        if isinstance(vma, int):
            # Detached between the walk and the count: another VMA may have taken its place.
            count_vm_vma_lock_event("vma_lock_miss")
            mas_set(mas, address)
            rcu_read_lock()
            continue
        if vma is None:
            break
        rcu_read_unlock()
        # It may have shrunk, moved or been reused in this mm before we held it (H34, H43).
        if not vma.vm_start <= address < vma.vm_end and not (
            guards.any_removed and _ADDRESS in guards.removed
        ):
            vma_end_read(vma)
            break
        return vma
    count_vm_vma_lock_event("vma_lock_abort")
    return None


# ------------------------------------------------------------------------------------------------ self-check


def vma_state_in_words(vma: "VmAreaStruct") -> str:
    """What vm_refcnt and vm_lock_seq, or the older lock's words, say; for dump_vma(). Not an access."""
    return str(implementation.vma_state_in_words(vma))


def check_invariants(vma: "VmAreaStruct") -> None:
    """The state is one that the lock knows, such as the values of vm_refcnt's table. At any time, even by
    engines.
    """
    implementation.check_invariants(vma)
