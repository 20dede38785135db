"""The XOL area: found by another thread, and its last slot.

Models:      kernel/events/uprobes.c, xol_add_vma, get_xol_area, xol_get_insn_slot, xol_free_insn_slot (7.2)
Guards:      see uprobes/xol.py
Invariants:  X1 and X3 of uprobes/xol.py
Leaves out:  the mapping: mmap_lock and the tree's stores order more than the publication needs
Read next:   uprobes/sstep.py
"""

from kmodel.core import READ_ONCE, boot, current
from kmodel.explore import Verdict
from kmodel.hazards.catalogue import Scenario, register
from kmodel.mm import MmStruct
from kmodel.uprobes import get_xol_area
from kmodel.uprobes.utask import alloc_utask
from kmodel.uprobes.xol import (
    UINSNS_PER_PAGE,
    XolArea,
    publish_xol_area,
    xol_free_insn_slot,
    xol_get_insn_slot,
    xol_get_slot_nr,
)

VADDR = 0x7FFF_FFFF_E000


class Empty:
    """An address space without an area, and an area that is about to be its."""

    def __init__(self) -> None:
        boot()
        self.mm = MmStruct()
        self.area = XolArea()


def adds(state: Empty) -> None:
    """The end of xol_add_vma(): where the area is, and then the area."""
    state.area.vaddr = VADDR
    publish_xol_area(state.mm, state.area)


def finds(state: Empty) -> None:
    """uprobe_get_trampoline_vaddr() of another thread."""
    area = READ_ONCE(state.mm.uprobes_state, "xol_area")
    if area is not None:
        assert area.vaddr == VADDR, "the area was found, and its address was not"


register(
    Scenario(
        name="xol-publish",
        hazards="H68",
        summary="Another thread finds the XOL area, and not yet the address that was put into it.",
        setup=Empty,
        threads=(adds, finds),
        memory="lkmm",
        without="no-xol-release",
        breaks="data-race",
    )
)


class LastSlot:
    """An area with one slot left, and two tasks that need it."""

    def __init__(self) -> None:
        boot()
        self.mm = MmStruct()
        task = current()
        before, task.mm = task.mm, self.mm
        area = get_xol_area(task)
        task.mm = before
        assert area is not None
        for _ in range(UINSNS_PER_PAGE - 2):
            xol_get_slot_nr(area)
        self.utasks = [alloc_utask(), alloc_utask()]


def _steps(state: LastSlot, which: int) -> None:
    current().mm = state.mm
    assert xol_get_insn_slot(b"\x90", state.utasks[which])
    xol_free_insn_slot(state.utasks[which])


def steps(state: LastSlot) -> None:
    """Take the slot and give it back."""
    _steps(state, 0)


def steps_too(state: LastSlot) -> None:
    """The other one."""
    _steps(state, 1)


register(
    Scenario(
        name="xol-last-slot",
        hazards="H67",
        summary="The last slot is freed while somebody is about to sleep for it, and nobody wakes him.",
        setup=LastSlot,
        threads=(steps, steps_too),
        memory="lkmm",
        without="no-xol-free-mb",
        breaks="lost-wakeup",
        options={"max_executions": 400},
        expected=Verdict.BOUNDED,
    )
)
