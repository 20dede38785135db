"""What mm/ tells us: a mapping appeared, goes away, or was copied to a child.

Models:      kernel/events/uprobes.c, uprobe_mmap, uprobe_munmap, uprobe_dup_mmap, uprobe_clear_state (7.2)
Guards:      mmap_lock of the mm for writing; uprobes_mmap_mutex (13, by inode) for the lists of probes to
             install
Invariants:  P9 the half that register cannot see: a mapping is linked into i_mmap before uprobe_mmap() looks
             for uprobes
Leaves out:  errors of uprobe_mmap() are ignored, as in the kernel: its callers could not handle them
Read next:   uprobes/register.py, the other half

Importing this module fills mm's hook slots; mm itself knows nothing of uprobes.
"""

from typing import Any, Final

from kmodel.core import atomic_read, fatal_signal_pending, guards, initcall, ptr, set_bit, test_bit
from kmodel.mm import (
    MMF_HAS_UPROBES,
    MMF_RECALC_UPROBES,
    VM_SHARED,
    VM_WRITE,
    hooks,
)
from kmodel.sync import Mutex, mutex_lock, mutex_unlock, percpu_down_read, percpu_up_read
from kmodel.uprobes import delayed, register, tree
from kmodel.uprobes.breakpoint import install_breakpoint, valid_vma
from kmodel.uprobes.consumer import filter_chain
from kmodel.uprobes.lifetime import put_uprobe
from kmodel.uprobes.lookup import vma_has_uprobes
from kmodel.uprobes.pages import offset_to_vaddr, vaddr_to_offset
from kmodel.uprobes.ref_ctr import delayed_ref_ctr_inc
from kmodel.uprobes.xol import uprobe_clear_xol_area

_DUP_MMAP_SEM = guards.register(
    "no-dup-mmap-sem", "H48: a child is linked between the scan and the write: it keeps or lacks a breakpoint"
)

UPROBES_HASH_SZ: Final = 13
uprobes_mmap_mutex: tuple[Mutex, ...]


@initcall
def uprobes_mmap_init() -> None:
    """Create the mutexes; an inode's address says which is its own."""
    global uprobes_mmap_mutex
    uprobes_mmap_mutex = tuple(Mutex() for _ in range(UPROBES_HASH_SZ))


def uprobes_mmap_hash(inode: Any) -> Mutex:
    """The mutex for this inode's probes."""
    return uprobes_mmap_mutex[ptr(inode) % UPROBES_HASH_SZ]


def uprobe_mmap(vma: Any) -> int:
    """A mapping was made or moved, and is linked into i_mmap: install what belongs there. Always 0.

    Needs mmap_lock held for writing.
    """
    if tree.no_uprobe_events():
        return 0
    mm = vma.vm_mm
    if (
        vma.vm_file is not None
        and vma.vm_flags & (VM_WRITE | VM_SHARED) == VM_WRITE
        and test_bit(MMF_HAS_UPROBES, mm, "flags")
    ):
        delayed_ref_ctr_inc(vma)
    if not valid_vma(vma, True):
        return 0

    inode = vma.vm_file.f_inode
    low = vaddr_to_offset(vma, vma.vm_start)
    mutex_lock(uprobes_mmap_hash(inode))
    for uprobe in tree.build_probe_list(inode, low, low + (vma.vm_end - vma.vm_start) - 1):
        # It may have been unregistered since: then it has no consumer, and filter_chain says no.
        if not fatal_signal_pending() and filter_chain(uprobe, mm):
            install_breakpoint(uprobe, vma, offset_to_vaddr(vma, uprobe.offset))
        put_uprobe(uprobe)
    mutex_unlock(uprobes_mmap_hash(inode))
    return 0


def uprobe_munmap(vma: Any, start: int, end: int) -> None:
    """[start, end) of the mapping goes away, or is about to be split or merged. Needs mmap_lock held for
    writing.

    It may have held the mm's last breakpoint. Clearing MMF_HAS_UPROBES here would race with a register that
    is about to install another, so only a note is left (H52).
    """
    if tree.no_uprobe_events() or not valid_vma(vma, False):
        return
    mm = vma.vm_mm
    if not atomic_read(mm, "mm_users"):
        return  # the address space is being torn down
    if not test_bit(MMF_HAS_UPROBES, mm, "flags") or test_bit(MMF_RECALC_UPROBES, mm, "flags"):
        return
    if vma_has_uprobes(vma, start, end):
        set_bit(MMF_RECALC_UPROBES, mm, "flags")


def uprobe_start_dup_mmap() -> None:
    """A fork is about to copy mappings: keep register and unregister out until it has linked all of them
    (H48).
    """
    if not (guards.any_removed and _DUP_MMAP_SEM in guards.removed):
        percpu_down_read(register.dup_mmap_sem)


def uprobe_end_dup_mmap() -> None:
    """The fork has copied them."""
    if not (guards.any_removed and _DUP_MMAP_SEM in guards.removed):
        percpu_up_read(register.dup_mmap_sem)


def uprobe_dup_mmap(oldmm: Any, newmm: Any) -> None:
    """The child will inherit the parent's private pages, and so its breakpoints. Not all mappings are copied,
    hence the recount. Needs the parent's mmap_lock held for writing.
    """
    if test_bit(MMF_HAS_UPROBES, oldmm, "flags"):
        set_bit(MMF_HAS_UPROBES, newmm, "flags")
        set_bit(MMF_RECALC_UPROBES, newmm, "flags")


def uprobe_clear_state(mm: Any) -> None:
    """The address space ends: nothing may wait for it any more."""
    mutex_lock(delayed.delayed_uprobe_lock)
    delayed.delayed_uprobe_remove(None, mm)
    mutex_unlock(delayed.delayed_uprobe_lock)
    uprobe_clear_xol_area(mm)


hooks.uprobe_mmap = uprobe_mmap
hooks.uprobe_munmap = uprobe_munmap
hooks.uprobe_start_dup_mmap = uprobe_start_dup_mmap
hooks.uprobe_end_dup_mmap = uprobe_end_dup_mmap
hooks.uprobe_dup_mmap = uprobe_dup_mmap
hooks.uprobe_clear_state = uprobe_clear_state
