"""The VMA lock: page faults that lock one mapping, beside a writer, a detacher, and a second life of the VMA.

Models:      mm/mmap_lock.c, lock_vma_under_rcu and vma_start_write; munmap(2) where one is needed (7.2)
Guards:      see mm/vma_refcnt.py; each of its lines that is about a race is a guard
Invariants:  V1 nobody changes a VMA under its reader, and nobody frees it
             V2 a write-locked VMA has no reader
             what a reader locks is the mapping of its address in its mm
Leaves out:  what a fault does with the VMA
Read next:   mm/vma_refcnt.py, the table of vm_refcnt's values
"""

import mmap as prot
from typing import Any

from kmodel.core import boot
from kmodel.hazards.catalogue import Scenario, register
from kmodel.mm import (
    MAP_FIXED,
    PAGE_SIZE,
    MmStruct,
    lock_vma_under_rcu,
    mmap,
    mmap_write_lock,
    mmap_write_unlock,
    mprotect,
    munmap,
    vm_area_alloc,
    vm_area_free,
    vma_end_read,
    vma_lookup,
    vma_mark_attached,
    vma_start_read,
    vma_start_write,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

ADDRESS = 0x100000


class State:
    """An address space with one anonymous page."""

    def __init__(self) -> None:
        boot()
        self.mm = MmStruct()
        map_page(self.mm, ADDRESS)
        vma = vma_lookup(self.mm, ADDRESS)
        assert vma is not None
        self.vma = vma


def map_page(mm: MmStruct, address: int, pages: int = 1) -> None:
    """Anonymous memory."""
    flags = prot.MAP_PRIVATE | prot.MAP_ANONYMOUS | MAP_FIXED
    mmap(mm, address, pages * PAGE_SIZE, prot.PROT_READ | prot.PROT_WRITE, flags)


def fault(state: State) -> None:
    """A page fault: lock the VMA, if that is easily done, and use it."""
    vma: Any = lock_vma_under_rcu(state.mm, ADDRESS)
    if vma is None:
        return  # the real one takes mmap_lock and looks again
    assert vma.vm_mm is state.mm, "the fault is served with a VMA of another address space"
    assert vma.vm_start <= ADDRESS < vma.vm_end, "the VMA does not cover the address of the fault"
    vma_end_read(vma)


def fault_looks_twice(state: State) -> None:
    """A page fault that reads a field twice, which only a writer may change, and not under a reader."""
    vma: Any = lock_vma_under_rcu(state.mm, ADDRESS)
    if vma is not None:
        before, after = vma.vm_private_data, vma.vm_private_data
        assert before == after, "the VMA was changed under its reader"
        vma_end_read(vma)


def change(state: State) -> None:
    """What madvise() and others do: write-lock the VMA, and change it by plain stores."""
    mmap_write_lock(state.mm)
    vma: Any = state.vma
    vma_start_write(vma)
    vma.vm_private_data = "changed"
    mmap_write_unlock(state.mm)


def unmap(state: State) -> None:
    """The VMA is detached and freed."""
    munmap(state.mm, ADDRESS, PAGE_SIZE)


def _vma(name: str, guard: str, summary: str, threads: Any, breaks: str, *hazards: str, **more: Any) -> None:
    register(
        Scenario(
            **{
                "name": name,
                "hazards": hazards,
                "summary": summary,
                "setup": State,
                "threads": threads,
                "without": guard,
                "breaks": breaks,
                "memory": "sc",
                **more,
            }
        )
    )


_vma(
    "vma-writer-wait",
    "no-vma-writer-wait",
    "A writer does not wait for the reader that is inside, and changes the VMA under it.",
    (fault_looks_twice, change),
    "assertion",
    "H27",
    options={"races": False},
)
_vma(
    "vma-seq-recheck",
    "no-vma-seq-recheck",
    "A reader finds the VMA unlocked, a writer locks it, the reader counts itself in and stays.",
    (fault_looks_twice, change),
    "assertion",
    options={"races": False},
)
_vma(
    "vma-inc-acquire",
    "no-vma-inc-acquire",
    "A reader counts itself in, and compares a lock word of now with one of before: unlocked, it thinks.",
    (fault_looks_twice, change),
    "data-race",
    "H35",
    memory="lkmm",
)
_vma(
    "vma-detach-wait",
    "no-vma-detach-wait",
    "A VMA is detached and freed while a reader, about to back out, still holds a count.",
    (fault, unmap),
    "warning",
    "H26",
    options={"races": False},
)
_vma(
    "vma-detach-wake",
    "no-vma-detach-wake",
    "The last temporary reader does not wake the detacher that waits for it.",
    (fault, unmap),
    "lost-wakeup",
    "H29",
    "H30",
    options={"races": False},
)
_vma(
    "vma-inc-not-zero",
    "no-refcount-zero-test",
    "A reader takes a count on a VMA that is detached, and has it.",
    (fault, unmap),
    "assertion",
    "H25",
    options={"races": False},
)


# ------------------------------------------------------------------------- another life of the VMA


class TwoSpaces(State):
    """A second address space, which has nothing yet."""

    def __init__(self) -> None:
        super().__init__()
        self.other_mm = MmStruct()


def unmap_and_map_in_the_other(state: TwoSpaces) -> None:
    """The VMA is freed; the next one that is made, in another address space, is the same memory."""
    munmap(state.mm, ADDRESS, PAGE_SIZE)
    map_page(state.other_mm, ADDRESS)


_vma(
    "vma-mm-check",
    "no-vma-mm-check",
    "Between its lookup and its lock a VMA is reused in another address space, whose memory is then used.",
    (fault, unmap_and_map_in_the_other),
    "assertion",
    "H32",
    setup=TwoSpaces,
    options={"races": False},
)


def two_pages() -> State:
    """One VMA of two pages, below ADDRESS and at it."""
    state = State()
    map_page(state.mm, ADDRESS - PAGE_SIZE)  # grows the one that is there
    assert state.vma.vm_start == ADDRESS - PAGE_SIZE
    return state


def protect_lower_page(state: State) -> None:
    """The VMA is split at ADDRESS, and becomes its own lower half."""
    mprotect(state.mm, ADDRESS - PAGE_SIZE, PAGE_SIZE, prot.PROT_READ)


_vma(
    "vma-address-check",
    "no-vma-address-check",
    "A VMA shrinks between its lookup and its lock, and the address of the fault is not in it any more.",
    (fault, protect_lower_page),
    "assertion",
    "H34",
    "H43",
    setup=two_pages,
    options={"races": False},
)


class Freed(State):
    """A VMA that was freed a moment ago; somebody who looked it up before still has its address."""

    def __init__(self) -> None:
        super().__init__()
        vma: Any = vm_area_alloc(self.mm)
        vma.vm_private_data = "first life"
        vm_area_free(vma)
        self.vma = vma


def second_life(state: Freed) -> None:
    """The memory becomes a VMA again: its fields, then the count that lets readers in."""
    mmap_write_lock(state.mm)
    vma: Any = vm_area_alloc(state.mm)
    assert vma is state.vma
    vma.vm_private_data = "second life"
    vma_start_write(vma)
    vma_mark_attached(vma)
    mmap_write_unlock(state.mm)


def late_reader(state: Freed) -> None:
    """The last part of lock_vma_under_rcu(), with a VMA that was looked up in its first life."""
    rcu_read_lock()
    vma: Any = vma_start_read(state.mm, state.vma)
    if vma is state.vma:
        rcu_read_unlock()
        assert vma.vm_private_data == "second life", "the reader sees the VMA as it was in its first life"
        vma_end_read(vma)


_vma(
    "vma-attach-release",
    "no-vma-attach-release",
    "A reader counts itself in on a new VMA, and sees the fields of the one that was there before.",
    (late_reader, second_life),
    "assertion",
    "H36",
    setup=Freed,
    memory="lkmm",
    options={"races": False},
)
