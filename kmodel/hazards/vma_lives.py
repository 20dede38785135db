"""The VMA lock at its edges: late readers, the last put, an address space that ends, a number that wraps.

Models:      mm/mmap_lock.c, vma_start_read, vma_refcount_put, vma_start_write, vma_mark_detached (7.2)
Guards:      see mm/vma_refcnt.py and mm/mmap_lock.py
Invariants:  V1 nobody changes a VMA under its reader; nobody touches an address space that is gone
Leaves out:  the trees: each VMA here has been found, or is about to leave
Read next:   hazards/vma_locks.py, the common cases
"""

from typing import Any

from kmodel.core import boot
from kmodel.hazards.catalogue import Scenario, register
from kmodel.hazards.vma_locks import State, change, fault_looks_twice
from kmodel.mm import (
    MmStruct,
    mm_alloc,
    mmap_write_lock,
    mmap_write_unlock,
    vm_area_alloc,
    vm_area_free,
    vma_end_read,
    vma_mark_attached,
    vma_mark_detached,
    vma_start_read,
    vma_start_write,
)
from kmodel.mm.mm_struct import mmdrop
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

_SC: dict[str, Any] = {"memory": "sc", "options": {"races": False}}

register(
    Scenario(
        name="vma-refcnt-limit",
        hazards=("H28", "H37"),
        summary="A reader counts itself in over the writer's bit, which is to keep readers out.",
        setup=State,
        threads=(fault_looks_twice, change),
        without="no-vma-refcnt-limit",
        breaks="assertion",
        **_SC,
    )
)


# ------------------------------------------------------------------------------------ a VMA and its reader


def attached_vma(mm: MmStruct) -> Any:
    """A VMA, in no tree, but as if."""
    vma = vm_area_alloc(mm)
    assert vma is not None
    mmap_write_lock(mm)
    vma_start_write(vma)
    vma_mark_attached(vma)
    mmap_write_unlock(mm)
    return vma


def read_lock(mm: MmStruct, vma: Any) -> None:
    """A reader gets in, which nobody disputes."""
    rcu_read_lock()
    assert vma_start_read(mm, vma) is vma
    rcu_read_unlock()


def detach_and_free(mm: MmStruct, vma: Any) -> None:
    """What munmap(2) and exit do to a VMA."""
    mmap_write_lock(mm)
    vma_start_write(vma)
    vma_mark_detached(vma)
    vm_area_free(vma)
    mmap_write_unlock(mm)


class ReaderInside:
    """A VMA that is read-locked, and another address space."""

    def __init__(self) -> None:
        boot()
        self.mm = MmStruct()
        self.other_mm = MmStruct()
        self.vma = attached_vma(self.mm)
        read_lock(self.mm, self.vma)


def end_read(state: ReaderInside) -> None:
    """The reader is done."""
    vma_end_read(state.vma)


def free_and_reuse(state: ReaderInside) -> None:
    """The writer gets in when the reader is out; the VMA is freed, and its memory used for another one."""
    detach_and_free(state.mm, state.vma)
    assert vm_area_alloc(state.other_mm) is state.vma


register(
    Scenario(
        name="vma-mm-copy",
        hazards="H31",
        summary="A reader that has given up its count asks the VMA whom to wake: another VMA by now.",
        setup=ReaderInside,
        threads=(end_read, free_and_reuse),
        without="no-vma-mm-copy",
        breaks="assertion",
        **_SC,
    )
)


class ReusedElsewhere:
    """A VMA whose memory was found in one address space, and is part of another one now."""

    def __init__(self) -> None:
        boot()
        mm, other_mm = mm_alloc(), mm_alloc()
        assert mm is not None
        assert other_mm is not None
        self.mm, self.other_mm = mm, other_mm
        self.vma = attached_vma(other_mm)


def lock_by_mistake(state: ReusedElsewhere) -> None:
    """The late reader takes a count, and finds whose VMA it is."""
    rcu_read_lock()
    assert vma_start_read(state.mm, state.vma) is not state.vma


def end_of_the_other(state: ReusedElsewhere) -> None:
    """The other address space ends: its VMA goes, then its struct."""
    detach_and_free(state.other_mm, state.vma)
    mmdrop(state.other_mm)


register(
    Scenario(
        name="vma-mm-grab",
        hazards="H33",
        summary="A reader gives up a foreign VMA, whose mm is freed before the reader has woken its writer.",
        setup=ReusedElsewhere,
        threads=(lock_by_mistake, end_of_the_other),
        without="no-vma-mm-grab",
        breaks="use-after-free",
        **_SC,
    )
)


# ------------------------------------------------------------------------------------------- the number wraps


class LongReader(State):
    """A reader is inside, and stays for some time."""

    def __init__(self) -> None:
        super().__init__()
        read_lock(self.mm, self.vma)


def look_twice_and_leave(state: LongReader) -> None:
    """The reader reads what only a writer may change, and not under a reader."""
    before, after = state.vma.vm_private_data, state.vma.vm_private_data
    assert before == after, "the VMA was changed under its reader"
    vma_end_read(state.vma)


def other_work_then_change(state: LongReader) -> None:
    """mmap_lock is taken for something else; then the VMA is changed."""
    mmap_write_lock(state.mm)
    mmap_write_unlock(state.mm)
    change(state)


register(
    Scenario(
        name="vma-seq-wrap",
        hazards="H21",
        summary="A narrow number is what it was when the VMA was locked last: it still is, so it seems.",
        setup=LongReader,
        threads=(look_twice_and_leave, other_work_then_change),
        without="no-wide-mm-seq",
        breaks="assertion",
        **_SC,
    )
)
