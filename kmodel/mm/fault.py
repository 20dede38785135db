"""Page faults: from the address to the locked mapping, and what becomes of the task.

Models:      arch/x86/mm/fault.c, do_user_addr_fault, access_error; mm/mmap_lock.c, lock_mm_and_find_vma (7.2)
Guards:      the VMA's read lock if it can be had at once, else mmap_lock (read)
Invariants:  L1 every failure to read-lock a VMA is answered by mmap_lock
             L2 VMA_LOCK_SUCCESS + RETRY + ABORT of lock_vma_under_rcu() == faults that tried the VMA lock
             L3 on every way out no lock is held that was not held before
Leaves out:  kernel-mode faults, protection keys, vsyscall emulation, shadow stacks, PGFAULT counters; a fault
             that runs out of memory kills the task instead of another one
Read next:   mm/memory.py; mm/uaccess.py for a task's loads and stores

    lock_vma_under_rcu     -> no: ABORT                  ,-> lock_mm_and_find_vma  -> no: SIGSEGV (MAPERR)
    access_error           -> SIGSEGV (ACCERR)          |    access_error          -> SIGSEGV (ACCERR)
    handle_vma_fault       -> done: SUCCESS             |    handle_vma_fault      -> RETRY: again, once
                           -> RETRY ---------------------'
"""

from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIGBUS, SIGKILL, SIGSEGV
from typing import Final

import attrs

from kmodel.core import fatal_signal_pending
from kmodel.mm.expand_stack import expand_stack_locked
from kmodel.mm.flags import PAGE_MASK, TASK_SIZE, VM_ACCESS_FLAGS, VM_EXEC, VM_GROWSDOWN, VM_WRITE
from kmodel.mm.memory import (
    FAULT_FLAG_DEFAULT,
    FAULT_FLAG_INSTRUCTION,
    FAULT_FLAG_TRIED,
    FAULT_FLAG_USER,
    FAULT_FLAG_VMA_LOCK,
    FAULT_FLAG_WRITE,
    VM_FAULT_COMPLETED,
    VM_FAULT_ERROR,
    VM_FAULT_MAJOR,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_FAULT_SIGSEGV,
    handle_vma_fault,
)
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap_lock import (
    mmap_read_lock_killable,
    mmap_read_trylock,
    mmap_read_unlock,
    mmap_write_downgrade,
    mmap_write_lock_killable,
    mmap_write_unlock,
)
from kmodel.mm.page_table import ptep_get
from kmodel.mm.vma import VmAreaStruct
from kmodel.mm.vma_iter import find_vma
from kmodel.mm.vma_lock import count_vm_vma_lock_event, lock_vma_under_rcu, vma_end_read

SEGV_MAPERR: Final = 1
SEGV_ACCERR: Final = 2
BUS_ADRERR: Final = 2

X86_PF_PROT: Final = 1 << 0
X86_PF_WRITE: Final = 1 << 1
X86_PF_USER: Final = 1 << 2
X86_PF_INSTR: Final = 1 << 4

per_vma_lock = True
"""CONFIG_PER_VMA_LOCK. To be switched while no task runs."""


@contextmanager
def mmap_lock_only() -> Iterator[None]:
    """Run the block as a kernel without CONFIG_PER_VMA_LOCK (before 6.4): every fault takes mmap_lock. To be
    switched while no task runs.
    """
    global per_vma_lock
    before, per_vma_lock = per_vma_lock, False
    try:
        yield
    finally:
        per_vma_lock = before


@attrs.frozen
class Siginfo:
    """The signal that a fault ends in (struct kernel_siginfo)."""

    si_signo: int
    si_code: int
    si_addr: int
    fault: int  # the VM_FAULT_* bit that stands for it


# ------------------------------------------------------------------------------------------------ the entry


def handle_mm_fault(mm: MmStruct, address: int, *, write: bool = False, instruction: bool = False) -> int:
    """A task of `mm` could not load from (store to, execute) `address`: make it possible. 0, or the
    VM_FAULT_*
    bit of the signal it gets: VM_FAULT_SIGSEGV, VM_FAULT_SIGBUS, VM_FAULT_OOM; VM_FAULT_RETRY if it was
    killed.

    do_user_addr_fault() says which signal and why. (The kernel's handle_mm_fault() is handle_vma_fault().)
    """
    error_code = X86_PF_USER | (X86_PF_WRITE if write else 0) | (X86_PF_INSTR if instruction else 0)
    if instruction:
        pte = ptep_get(mm, address & PAGE_MASK)
        if pte is not None and not pte.prot & VM_EXEC:
            error_code |= X86_PF_PROT
    info = do_user_addr_fault(mm, error_code, address)
    return 0 if info is None else info.fault


def do_user_addr_fault(mm: MmStruct, error_code: int, address: int) -> Siginfo | None:
    """A fault in user mode: None (try the access again), or the signal for the task."""
    if not 0 <= address < TASK_SIZE:
        return _bad_area(address, SEGV_MAPERR)
    flags = FAULT_FLAG_DEFAULT | FAULT_FLAG_USER
    if error_code & X86_PF_WRITE:
        flags |= FAULT_FLAG_WRITE
    if error_code & X86_PF_INSTR:
        flags |= FAULT_FLAG_INSTRUCTION

    vma = lock_vma_under_rcu(mm, address) if per_vma_lock else None
    if vma is not None:
        if access_error(error_code, vma):
            vma_end_read(vma)
            count_vm_vma_lock_event("vma_lock_success")
            return _bad_area(address, SEGV_ACCERR)
        fault = handle_vma_fault(vma, address, flags | FAULT_FLAG_VMA_LOCK)
        if not fault & (VM_FAULT_RETRY | VM_FAULT_COMPLETED):
            vma_end_read(vma)
        if not fault & VM_FAULT_RETRY:
            count_vm_vma_lock_event("vma_lock_success")
            return _done(fault, address)
        # The VMA was unlocked by whoever said so.
        count_vm_vma_lock_event("vma_lock_retry")
        if fault & VM_FAULT_MAJOR:
            flags |= FAULT_FLAG_TRIED
        if fatal_signal_pending():
            return _killed(address)
    return _fault_under_mmap_lock(mm, error_code, address, flags)


def _fault_under_mmap_lock(mm: MmStruct, error_code: int, address: int, flags: int) -> Siginfo | None:
    while True:
        vma = lock_mm_and_find_vma(mm, address)
        if vma is None:
            return _killed(address) if fatal_signal_pending() else _bad_area(address, SEGV_MAPERR)
        if access_error(error_code, vma):
            mmap_read_unlock(mm)
            return _bad_area(address, SEGV_ACCERR)
        fault = handle_vma_fault(vma, address, flags)
        if fault & VM_FAULT_RETRY:
            # mmap_lock was released by whoever said so.
            if fatal_signal_pending():
                return _killed(address)
            flags |= FAULT_FLAG_TRIED
            continue
        if not fault & VM_FAULT_COMPLETED:
            mmap_read_unlock(mm)
        return _done(fault, address)


def access_error(error_code: int, vma: VmAreaStruct) -> bool:
    """Whether the mapping forbids the access. The VMA is locked."""
    flags = vma.vm_flags
    if error_code & X86_PF_WRITE:
        return not flags & VM_WRITE
    if error_code & X86_PF_PROT:
        return True  # a page is there, and does not allow it: it has been faulted in with the VMA's flags
    # An instruction fetch is not looked at more closely: the page is brought in, and the next try is refused.
    return not flags & VM_ACCESS_FLAGS


# ------------------------------------------------------------------------------------------------ outcomes


def _bad_area(address: int, si_code: int) -> Siginfo:
    return Siginfo(SIGSEGV, si_code, address, VM_FAULT_SIGSEGV)


def _killed(address: int) -> Siginfo:
    return Siginfo(SIGKILL, 0, address, VM_FAULT_RETRY)


def _done(fault: int, address: int) -> Siginfo | None:
    if not fault & VM_FAULT_ERROR:
        return None
    if fault & VM_FAULT_OOM:
        return Siginfo(SIGKILL, 0, address, VM_FAULT_OOM)
    if fault & VM_FAULT_SIGBUS:
        return Siginfo(SIGBUS, BUS_ADRERR, address, VM_FAULT_SIGBUS)
    return _bad_area(address, SEGV_MAPERR)


# ------------------------------------------------------------------------------------------------ mmap_lock


def lock_mm_and_find_vma(mm: MmStruct, addr: int) -> VmAreaStruct | None:
    """Take mmap_lock for reading and find the mapping of `addr`, growing a stack down to it if need be. None,
    and no lock: there is none, or the task was killed while it waited.
    """
    if not mmap_read_trylock(mm) and mmap_read_lock_killable(mm):
        return None
    vma: VmAreaStruct | None = find_vma(mm, addr)
    if vma is not None and vma.vm_start <= addr:
        return vma
    if vma is None or not vma.vm_flags & VM_GROWSDOWN:
        mmap_read_unlock(mm)
        return None
    # A stack grows under the write lock. There is no way up from the read lock: drop it and look again.
    mmap_read_unlock(mm)
    if mmap_write_lock_killable(mm):
        return None
    vma = find_vma(mm, addr)
    if vma is not None and vma.vm_start > addr:
        if not vma.vm_flags & VM_GROWSDOWN or expand_stack_locked(vma, addr):
            vma = None
    if vma is None:
        mmap_write_unlock(mm)
        return None
    mmap_write_downgrade(mm)
    return vma
