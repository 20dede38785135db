"""The XOL area: one page of a probed address space from which displaced instructions are executed.

Models:      kernel/events/uprobes.c, struct xol_area, xol_add_vma, __create_xol_area, get_xol_area,
             uprobe_get_trampoline_vaddr, xol_get_insn_slot, xol_free_insn_slot, dup_xol_work (7.2)
Guards:      mmap_lock (write) for the area of an mm; read-modify-write for the slots' bitmap
Invariants:  X1 an mm has one area at most, and who finds it finds it initialised (H68), X2 a slot belongs to
             one task at a time, X3 a task that waits for a slot is woken when one is freed (H67), X4 slot 0
             is the return trampoline and never handed out
Leaves out:  the page in the page tables: the slots' bytes are kept in the area, user space cannot read them
Read next:   uprobes/sstep.py for the slots; uprobes/uretprobe.py for the trampoline
"""

import errno
from typing import Any, Final

from kmodel.core import (
    READ_ONCE,
    WARN_ON_ONCE,
    WRITE_ONCE,
    Struct,
    TaskStruct,
    atomic,
    clear_bit,
    current,
    embedded,
    guards,
    kernel_struct,
    smp_mb__after_atomic,
    smp_store_release,
    test_and_set_bit,
    test_bit,
    untraced,
)
from kmodel.fs import PAGE_SIZE
from kmodel.mm import mmap_write_lock_killable, mmap_write_unlock
from kmodel.mm.flags import TASK_SIZE, VM_DONTCOPY, VM_EXEC, VM_IO, VM_MAYEXEC
from kmodel.mm.special_mapping import _install_special_mapping
from kmodel.mm.unmapped_area import get_unmapped_area
from kmodel.slab import kfree, kzalloc
from kmodel.sync import WaitQueueHead, wait_event, waitqueue_active, wake_up
from kmodel.uprobes.arch import UPROBE_SWBP_INSN

UPROBE_XOL_SLOT_BYTES: Final = 128
UINSNS_PER_PAGE: Final = PAGE_SIZE // UPROBE_XOL_SLOT_BYTES
UPROBE_NO_TRAMPOLINE_VADDR: Final = 0xFFFF_FFFF_FFFF_FFFF
"""No address: what is there cannot be a breakpoint's."""

_RELEASE = guards.register(
    "no-xol-release", "H68: another thread finds the XOL area and not what was put into it before"
)
_FREE_MB = guards.register(
    "no-xol-free-mb", "H67: a slot is freed while somebody is about to sleep for it, and nobody wakes him"
)


@kernel_struct
class XolArea(Struct):
    """struct xol_area."""

    wq: WaitQueueHead = embedded(factory=WaitQueueHead)
    # one bit per slot in use
    bitmap: int = atomic(default=0)
    # set before the area is published, constant afterwards
    vaddr: int = 0
    # The model's page: a slot's number to its bytes; who owns the slot writes and reads.
    page: dict[int, bytes] = untraced(factory=dict, init=False)


# ------------------------------------------------------------------------------------------------ the area


def xol_add_vma(mm: Any, area: XolArea) -> int:
    """Map the area into `mm` and publish it: 0, -EALREADY if another thread was faster, -ENOMEM, -EINTR."""
    if mmap_write_lock_killable(mm):
        return -errno.EINTR
    try:
        if mm.uprobes_state.xol_area is not None:
            return -errno.EALREADY
        if not area.vaddr:
            # As high as can be, out of the way of what the program maps.
            vaddr = get_unmapped_area(mm, TASK_SIZE - PAGE_SIZE, PAGE_SIZE, 0)
            if vaddr < 0:
                return vaddr
            area.vaddr = vaddr
        vma = _install_special_mapping(
            mm, area.vaddr, PAGE_SIZE, VM_EXEC | VM_MAYEXEC | VM_DONTCOPY | VM_IO, "[uprobes]"
        )
        if isinstance(vma, int):
            return vma
        publish_xol_area(mm, area)
        return 0
    finally:
        mmap_write_unlock(mm)


def publish_xol_area(mm: Any, area: XolArea) -> None:
    """Let the other threads of the address space find it."""
    if _RELEASE in guards.removed:
        WRITE_ONCE(mm.uprobes_state, "xol_area", area)
    else:
        smp_store_release(mm.uprobes_state, "xol_area", area)  # pairs with get_xol_area()


def __create_xol_area(mm: Any, vaddr: int) -> XolArea | None:
    """A new area, at `vaddr` or wherever there is room; None if it could not be had or was there already."""
    area = kzalloc(XolArea)
    if area is None:
        return None
    area.vaddr = vaddr
    # Slot 0 is for the trampoline of return probes: a breakpoint, which handle_swbp() knows by its address.
    area.bitmap = 1
    area.page[0] = bytes([UPROBE_SWBP_INSN])
    if xol_add_vma(mm, area):
        kfree(area)
        return None
    return area


def get_xol_area(task: TaskStruct | None = None) -> XolArea | None:
    """The area of current's address space, made if there is none yet; None if it cannot be had."""
    mm = (task if task is not None else current()).mm
    state = mm.uprobes_state
    if READ_ONCE(state, "xol_area") is None:
        __create_xol_area(mm, 0)
    # Pairs with the release in publish_xol_area(), by the address dependency.
    return READ_ONCE(state, "xol_area")  # type: ignore[no-any-return]


def uprobe_clear_xol_area(mm: Any) -> None:
    """The address space ends: free its area (the second half of uprobe_clear_state)."""
    area = mm.uprobes_state.xol_area
    if area is not None:
        mm.uprobes_state.xol_area = None
        kfree(area)


def uprobe_get_trampoline_vaddr(task: TaskStruct | None = None) -> int:
    """Where probed functions return to in current's address space; no address at all if there is no area."""
    area = READ_ONCE((task if task is not None else current()).mm.uprobes_state, "xol_area")
    return area.vaddr if area is not None else UPROBE_NO_TRAMPOLINE_VADDR


def dup_xol_work(vaddr: int) -> None:
    """Task work of a forked child: an area at the parent's address, to which functions of the child's copy of
    the stack will return (VM_DONTCOPY: the mapping itself was not inherited).
    """
    # Without one the kernel prints a line, and the child's functions return to an address without mapping.
    __create_xol_area(current().mm, vaddr)


# ------------------------------------------------------------------------------------------------ slots


def xol_get_slot_nr(area: XolArea) -> int:
    """Take a slot: its number, or UINSNS_PER_PAGE if none is free."""
    for slot_nr in range(UINSNS_PER_PAGE):
        if not test_bit(slot_nr, area, "bitmap"):
            # Only the first free one is tried: who loses it comes again.
            return UINSNS_PER_PAGE if test_and_set_bit(slot_nr, area, "bitmap") else slot_nr
    return UINSNS_PER_PAGE


def xol_get_insn_slot(insn: bytes, utask: Any) -> bool:
    """Take a slot for current, waiting until one is free, and copy the instruction there; utask.xol_vaddr
    says where. False: there is no area.
    """
    area = get_xol_area()
    if area is None:
        return False
    found = UINSNS_PER_PAGE

    def taken() -> bool:
        nonlocal found
        found = xol_get_slot_nr(area)
        return found < UINSNS_PER_PAGE

    wait_event(area.wq, taken)
    area.page[found] = insn
    utask.xol_vaddr = area.vaddr + found * UPROBE_XOL_SLOT_BYTES
    return True


def xol_free_insn_slot(utask: Any) -> None:
    """Give current's slot back and wake who waits for one."""
    area = current().mm.uprobes_state.xol_area
    offset = utask.xol_vaddr - area.vaddr
    utask.xol_vaddr = 0
    if WARN_ON_ONCE(not 0 <= offset < PAGE_SIZE, "an XOL slot outside of the area"):
        return
    clear_bit(offset // UPROBE_XOL_SLOT_BYTES, area, "bitmap")
    if _FREE_MB not in guards.removed:
        # Pairs with the barrier of prepare_to_wait(): we see the waiter or it sees the bit clear.
        smp_mb__after_atomic()
    if waitqueue_active(area.wq):
        wake_up(area.wq)


def xol_insn(area: XolArea, address: int) -> bytes:
    """Not in Linux: the instruction at an address of the area, as a processor would fetch it."""
    return area.page[(address - area.vaddr) // UPROBE_XOL_SLOT_BYTES]
