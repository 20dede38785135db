"""mprotect(2): change access, which splits and merges mappings.

Models:      mm/mprotect.c, do_mprotect_pkey, mprotect_fixup (7.2)
Guards:      mmap_lock (write); the VMA write lock before the flags change
Invariants:  G2 of mm/vma_merge.py
Leaves out:  protection keys, W^X policies, charging (only its flag, VM_ACCOUNT)
Read next:   mm/mremap.py
"""

from errno import EACCES, EINTR, EINVAL, ENOMEM, EPERM
from typing import Final

from kmodel.fs import task_work_run
from kmodel.mm import hooks
from kmodel.mm.flags import (
    PAGE_ALIGN,
    PROT_EXEC,
    PROT_GROWSDOWN,
    PROT_GROWSUP,
    PROT_READ,
    PROT_SEM,
    PROT_WRITE,
    VM_ACCESS_FLAGS,
    VM_ACCOUNT,
    VM_GROWSDOWN,
    VM_HUGETLB,
    VM_NORESERVE,
    VM_SEALED,
    VM_SHARED,
    VM_STICKY,
    VM_WRITE,
    calc_vm_prot_bits,
    offset_in_page,
)
from kmodel.mm.maple_node import ULONG_MAX
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap import _raise
from kmodel.mm.mmap_lock import mmap_write_lock_killable, mmap_write_unlock
from kmodel.mm.vma import VmAreaStruct, vm_flags_reset, vma_is_anonymous
from kmodel.mm.vma_iter import VmaIterator, find_vma_prev, vma_find, vma_iter_init, vma_iter_set
from kmodel.mm.vma_lock import vma_start_write
from kmodel.mm.vma_merge import vma_modify, vmg_of

_PROT_VALID: Final = PROT_READ | PROT_WRITE | PROT_EXEC | PROT_SEM


def mprotect(mm: MmStruct, addr: int, length: int, prot: int) -> int:
    """Give [addr, addr + length) the access `prot`; 0. OSError with the kernel's errno; what comes before a
    hole is changed all the same.
    """
    grows = prot & (PROT_GROWSDOWN | PROT_GROWSUP)
    if grows == PROT_GROWSDOWN | PROT_GROWSUP or offset_in_page(addr):
        _raise(-EINVAL)
    if not length:
        return 0
    end = addr + PAGE_ALIGN(length)
    if end > ULONG_MAX:
        _raise(-ENOMEM)
    prot &= ~grows
    if prot & ~_PROT_VALID:
        _raise(-EINVAL)
    if mmap_write_lock_killable(mm):
        _raise(-EINTR)
    error = do_mprotect(mm, addr, end, prot, grows)
    mmap_write_unlock(mm)
    task_work_run()
    return _raise(error)


def do_mprotect(mm: MmStruct, start: int, end: int, prot: int, grows: int = 0) -> int:
    """mprotect of whole pages: 0 or a negative errno. mmap_lock (write)."""
    vmi = vma_iter_init(mm, start)
    vma = vma_find(vmi, end)
    if vma is None:
        return -ENOMEM
    if grows & PROT_GROWSDOWN:
        start = vma.vm_start
        if not vma.vm_flags & VM_GROWSDOWN:
            return -EINVAL
    elif vma.vm_start <= start and grows & PROT_GROWSUP:
        return -EINVAL  # no stack grows up on x86
    at = start
    while at < end:
        vma_iter_set(vmi, at)
        vma = vma_find(vmi, end)
        if vma is None or vma.vm_start > at:
            return -ENOMEM
        newflags = calc_vm_prot_bits(prot) | (vma.vm_flags & ~VM_ACCESS_FLAGS)
        # VM_MAYx are the VM_x four bits up.
        if newflags & ~(newflags >> 4) & VM_ACCESS_FLAGS:
            return -EACCES
        stop = min(vma.vm_end, end)
        result = mprotect_fixup(vmi, vma, at, stop, newflags)
        if isinstance(result, int):
            return result
        at = max(stop, min(result.vm_end, end))
    return 0


def mprotect_fixup(
    vmi: VmaIterator, vma: VmAreaStruct, start: int, end: int, newflags: int
) -> VmAreaStruct | int:
    """Change [start, end) of one VMA: the VMA that covers it afterwards, or an error."""
    oldflags = vma.vm_flags
    if oldflags & VM_SEALED:
        return -EPERM
    if newflags == oldflags:
        return vma
    if newflags & VM_WRITE:
        if not oldflags & (VM_ACCOUNT | VM_WRITE | VM_HUGETLB | VM_SHARED | VM_NORESERVE):
            newflags |= VM_ACCOUNT  # private pages may appear from now on
    elif oldflags & VM_ACCOUNT and vma_is_anonymous(vma) and vma.anon_vma is None:
        newflags &= ~VM_ACCOUNT  # none ever did
    mm = vma.vm_mm
    assert mm is not None
    prev = find_vma_prev(mm, vma.vm_start)[1]
    vma_iter_set(vmi, vma.vm_end)
    next_ = vma_find(vmi, vma.vm_end + 1)
    vmg = vmg_of(vma, prev, next_, start, end)
    vmg.vm_flags = newflags
    modified = vma_modify(vmg, vmi)
    if isinstance(modified, int):
        return modified
    vma_start_write(modified)
    # What it merged with may have had sticky flags.
    vm_flags_reset(modified, newflags | modified.vm_flags & VM_STICKY)
    hooks.change_protection(modified, start, end)
    return modified
