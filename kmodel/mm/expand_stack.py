"""A stack that grows: the mapping is extended down to the address that was touched.

Models:      mm/vma.c, expand_stack_locked, expand_downwards, acct_stack_growth (7.2)
Guards:      mmap_lock (write), the VMA's write lock
Invariants:  S1 a guard gap stays between the stack and what is mapped below it
Leaves out:  RLIMIT_AS, RLIMIT_MEMLOCK, stacks that grow up
Read next:   mm/fault.py
"""

from errno import EFAULT, ENOMEM, EPERM

from kmodel.core import shared_int
from kmodel.mm.flags import (
    MMAP_MIN_ADDR,
    PAGE_MASK,
    PAGE_SHIFT,
    STACK_GUARD_GAP,
    VM_ACCESS_FLAGS,
    VM_GROWSDOWN,
)
from kmodel.mm.memory import __anon_vma_prepare
from kmodel.mm.mmap_lock import mmap_assert_write_locked
from kmodel.mm.vma import VmAreaStruct
from kmodel.mm.vma_iter import (
    find_vma_prev,
    vma_iter_free,
    vma_iter_init,
    vma_iter_prealloc,
    vma_iter_store_overwrite,
)
from kmodel.mm.vma_lock import vma_start_write

rlimit_stack = 8 << 20
"""RLIMIT_STACK of every task, in bytes."""


def expand_stack_locked(vma: VmAreaStruct, address: int) -> int:
    """Let the stack begin at the page of `address`: 0 or a negative errno. mmap_lock (write)."""
    if not vma.vm_flags & VM_GROWSDOWN:
        return -EFAULT
    mm = vma.vm_mm
    assert mm is not None
    mmap_assert_write_locked(mm)
    address &= PAGE_MASK
    if address < MMAP_MIN_ADDR:
        return -EPERM
    prev = find_vma_prev(mm, vma.vm_start)[1]
    if (
        prev is not None
        and not prev.vm_flags & VM_GROWSDOWN
        and prev.vm_flags & VM_ACCESS_FLAGS
        and address - prev.vm_end < STACK_GUARD_GAP
    ):
        return -ENOMEM
    vmi = vma_iter_init(mm, address)
    if vma_iter_prealloc(vmi, address, vma.vm_end, vma):
        return -ENOMEM
    if __anon_vma_prepare(vma):
        vma_iter_free(vmi)
        return -ENOMEM
    # Faults in the part that is there already wait.
    vma_start_write(vma)
    grow = (vma.vm_start - address) >> PAGE_SHIFT
    if grow > vma.vm_pgoff or vma.vm_end - address > rlimit_stack:
        vma_iter_free(vmi)
        return -ENOMEM
    mm.total_vm += grow
    vma.vm_start = shared_int(address)
    vma.vm_pgoff = shared_int(vma.vm_pgoff - grow)
    vma_iter_store_overwrite(vmi, vma)
    return 0
