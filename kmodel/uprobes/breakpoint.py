"""Putting the breakpoint of a uprobe into an address space, and taking it out.

Models:      kernel/events/uprobes.c, prepare_uprobe, install_breakpoint, remove_breakpoint,
             uprobe_write_opcode (7.2)
Guards:      mmap_lock for writing in everything that touches an address space; consumer_rwsem for
             prepare_uprobe
Invariants:  B1 installing where a breakpoint is, or removing where none is, changes nothing (verify_opcode)
             B2 MMF_HAS_UPROBES is set before a breakpoint is written, so that no task traps in an mm that
             denies having any B3 UPROBE_COPY_INSN is set only when arch holds the analysed instruction
Leaves out:  huge pages, mmu notifiers, the x86 optimisation into a call
Read next:   uprobes/register.py, which walks the address spaces
"""

import errno
from typing import Any

from kmodel.core import (
    WARN_ON_ONCE,
    clear_bit,
    guards,
    lockdep_assert_held_write,
    set_bit,
    smp_wmb,
    test_bit,
)
from kmodel.fs import PAGE_SHIFT, read_contents
from kmodel.mm import (
    MMF_HAS_UPROBES,
    MMF_RECALC_UPROBES,
    VM_HUGETLB,
    VM_MAYEXEC,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_SHARED,
    VM_WRITE,
    for_each_vma,
    mmap_assert_locked,
    mmap_write_lock,
    mmap_write_unlock,
)
from kmodel.sync import down_write, up_write
from kmodel.uprobes.arch import (
    ENOTSUPP,
    MAX_UINSN_BYTES,
    UPROBE_SWBP_INSN,
    arch_uprobe_analyze_insn,
    is_swbp_insn,
    is_trap_insn,
)
from kmodel.uprobes.pages import (
    PAGE_MASK,
    drop_page_if_unchanged,
    find_page,
    offset_to_vaddr,
    read_page,
    write_page,
)
from kmodel.uprobes.ref_ctr import update_ref_ctr
from kmodel.uprobes.uprobe import UPROBE_COPY_INSN, Uprobe

guards.register(
    "no-insn-wmb", "H47: the bit that says the instruction is there is seen before the instruction"
)
guards.register(
    "no-has-uprobes-first", "H51: a breakpoint of ours is hit before the mm admits to having any: SIGTRAP"
)
guards.register("no-ref-ctr-revert", "H54: a breakpoint that could not be written stays counted")
guards.register("no-verify-opcode", "H54: a second install of the same breakpoint counts the semaphore twice")


def valid_vma(vma: Any, is_register: bool) -> bool:
    """Whether breakpoints may be in this mapping: a private file mapping that may be executed.

    Writable ones get none installed, but those that became writable since are still looked at when removing.
    """
    flags = VM_HUGETLB | VM_MAYEXEC | VM_MAYSHARE
    if is_register:
        flags |= VM_WRITE
    return vma.vm_file is not None and vma.vm_flags & flags == VM_MAYEXEC


# -------------------------------------------------------------------------- the instruction


def copy_insn(uprobe: Uprobe) -> int:
    """Read the original instruction from the file, as much of it as there is; -EIO if there is nothing."""
    insn = read_contents(uprobe.inode, uprobe.offset, MAX_UINSN_BYTES)
    if not insn:
        return -errno.EIO
    uprobe.arch.insn = insn.ljust(MAX_UINSN_BYTES, b"\0")
    return 0


def prepare_uprobe(uprobe: Uprobe) -> int:
    """Once per uprobe, at its first installation: copy and analyse the instruction. 0 or a negative errno."""
    if test_bit(UPROBE_COPY_INSN, uprobe, "flags"):
        return 0
    down_write(uprobe.consumer_rwsem)
    ret = 0
    if not test_bit(UPROBE_COPY_INSN, uprobe, "flags"):
        ret = __prepare_uprobe(uprobe)
    up_write(uprobe.consumer_rwsem)
    return ret


def __prepare_uprobe(uprobe: Uprobe) -> int:
    lockdep_assert_held_write(uprobe.consumer_rwsem)
    ret = copy_insn(uprobe)
    if ret:
        return ret
    # A breakpoint in the file itself belongs to somebody else: we could not tell our own from it.
    if is_trap_insn(uprobe.arch.insn[0]):
        return -ENOTSUPP
    ret = arch_uprobe_analyze_insn(uprobe.arch, uprobe.arch.insn)
    if ret:
        return ret
    if "no-insn-wmb" not in guards.removed:
        smp_wmb()  # pairs with smp_rmb() in handle_swbp (H47)
    set_bit(UPROBE_COPY_INSN, uprobe, "flags")
    return 0


# -------------------------------------------------------------------------- writing it


def verify_opcode(old: int, new: int) -> bool:
    """Whether there is anything to write: not if a breakpoint is there already, or has gone already."""
    if "no-verify-opcode" in guards.removed:
        return True
    return not is_swbp_insn(old) if is_swbp_insn(new) else is_swbp_insn(old)


def is_cow_mapping(flags: int) -> bool:
    """Whether a write through this mapping goes to a private copy."""
    return flags & (VM_SHARED | VM_MAYWRITE) == VM_MAYWRITE


def uprobe_write_opcode(uprobe: Uprobe, vma: Any, vaddr: int, opcode: int, is_register: bool) -> int:
    """Write one opcode into the task's private copy of the page. 0 or a negative errno."""
    mm = vma.vm_mm
    mmap_assert_locked(mm)  # by all callers for writing: H50, register_one_vma()
    if WARN_ON_ONCE(not is_cow_mapping(vma.vm_flags), "breakpoint for a shared mapping"):
        return -errno.EINVAL
    page = read_page(vma, vaddr)
    if page is None:
        return -errno.EFAULT
    if not verify_opcode(page[vaddr & ~PAGE_MASK], opcode):
        return 0

    # The instruction is about to change, and only now: what verify_opcode refuses must not count (H54).
    ref_ctr_updated = bool(uprobe.ref_ctr_offset)
    if ref_ctr_updated:
        ret = update_ref_ctr(uprobe, mm, 1 if is_register else -1)
        if ret:
            return ret
    if not is_register and find_page(mm, vaddr) is None:
        return (
            0  # no private page, so nothing of ours: a trap of the file's own (seen on 6.18, not read in 7.2)
        )
    ret = write_page(vma, vaddr, bytes([opcode]))
    if ret < 0:
        if ref_ctr_updated and "no-ref-ctr-revert" not in guards.removed:
            update_ref_ctr(uprobe, mm, -1 if is_register else 1)
        return ret
    if not is_register:
        drop_page_if_unchanged(vma, vaddr)
    return 0


def set_swbp(uprobe: Uprobe, vma: Any, vaddr: int) -> int:
    """Write the breakpoint."""
    return uprobe_write_opcode(uprobe, vma, vaddr, UPROBE_SWBP_INSN, True)


def set_orig_insn(uprobe: Uprobe, vma: Any, vaddr: int) -> int:
    """Write the original instruction's first byte back."""
    return uprobe_write_opcode(uprobe, vma, vaddr, uprobe.arch.insn[0], False)


# -------------------------------------------------------------------------- per mapping


def install_breakpoint(uprobe: Uprobe, vma: Any, vaddr: int) -> int:
    """Prepare the uprobe if that was not done, and write its breakpoint. Needs mmap_lock held for writing."""
    mm = vma.vm_mm
    ret = prepare_uprobe(uprobe)
    if ret:
        return ret
    if "no-has-uprobes-first" in guards.removed:
        ret = set_swbp(uprobe, vma, vaddr)
        if not ret:
            set_bit(MMF_HAS_UPROBES, mm, "flags")
        return ret
    # Before the write: a task of this mm may hit the breakpoint as soon as it is there (B2).
    first_uprobe = not test_bit(MMF_HAS_UPROBES, mm, "flags")
    if first_uprobe:
        set_bit(MMF_HAS_UPROBES, mm, "flags")
    ret = set_swbp(uprobe, vma, vaddr)
    if not ret:
        clear_bit(MMF_RECALC_UPROBES, mm, "flags")
    elif first_uprobe:
        clear_bit(MMF_HAS_UPROBES, mm, "flags")
    return ret


def remove_breakpoint(uprobe: Uprobe, vma: Any, vaddr: int) -> int:
    """Restore the original instruction. Needs mmap_lock held for writing.

    Whether it was the mm's last breakpoint is not known here: the next miss will find out
    (MMF_RECALC_UPROBES, H52).
    """
    set_bit(MMF_RECALC_UPROBES, vma.vm_mm, "flags")
    return set_orig_insn(uprobe, vma, vaddr)


def unapply_uprobe(uprobe: Uprobe, mm: Any) -> int:
    """Remove the uprobe's breakpoints from every mapping of one mm."""
    err = 0
    mmap_write_lock(mm)
    for vma in for_each_vma(mm):
        if not valid_vma(vma, False) or vma.vm_file.f_inode is not uprobe.inode:
            continue
        start = vma.vm_pgoff << PAGE_SHIFT
        if not start <= uprobe.offset < start + vma.vm_end - vma.vm_start:
            continue
        err |= remove_breakpoint(uprobe, vma, offset_to_vaddr(vma, uprobe.offset))
    mmap_write_unlock(mm)
    return err
