"""What an address space sees at an address: its private copies of file pages, else the file.

Models:      mm/gup.c, mm/memory.c as far as uprobes needs them: FOLL_FORCE reads, breaking COW;
             kernel/events/uprobes.c, is_trap_at_addr, uprobe_copy_from_page, copy_to_page (7.2)
Guards:      mmap_lock (read: look, write: add or change a copy), which keeps a copy that was found
Invariants:  those of mm/page_table.py
Leaves out:  looking does not fault the file's page in, as the kernel's get_user_page would
Read next:   uprobes/breakpoint.py, which writes into the copies
"""

import errno
from typing import Any

from kmodel.core import READ_ONCE, WARN_ON_ONCE
from kmodel.fs import PAGE_SHIFT, PAGE_SIZE, i_size_read, read_mapping_page
from kmodel.fs.page import Page, memcpy_to_page
from kmodel.mm import mmap_read_lock, mmap_read_unlock, vma_lookup
from kmodel.mm.memory import VM_FAULT_OOM, faultin_private_page
from kmodel.mm.page_table import pte_table, ptep_get, zap_page_range
from kmodel.uprobes.arch import UPROBE_SWBP_INSN_SIZE, is_trap_insn

PAGE_MASK = ~(PAGE_SIZE - 1)


def vaddr_to_offset(vma: Any, vaddr: int) -> int:
    """The byte of the mapped file that is at this address."""
    return int((vma.vm_pgoff << PAGE_SHIFT) + (vaddr - vma.vm_start))


def offset_to_vaddr(vma: Any, offset: int) -> int:
    """The address at which this byte of the mapped file is (the VMA must map it)."""
    return int(vma.vm_start + offset - (vma.vm_pgoff << PAGE_SHIFT))


def find_page(mm: Any, vaddr: int) -> Page | None:
    """The private copy that covers the address, if there is one."""
    # Not even the lock is taken where no page was ever mapped.
    if not pte_table(mm, vaddr).ptes:
        return None
    pte = ptep_get(mm, vaddr & PAGE_MASK)
    return pte.page if pte is not None and pte.page.anon else None


def file_page(vma: Any, vaddr: int) -> bytes | None:
    """The page of the file (or of zeroes) under the address; None where that is past the end of the file."""
    if vma.vm_file is None:
        return bytes(PAGE_SIZE)
    inode = vma.vm_file.f_inode
    offset = vaddr_to_offset(vma, vaddr & PAGE_MASK)
    if offset >= i_size_read(inode):
        return None
    return read_mapping_page(inode.i_mapping, offset >> PAGE_SHIFT)


def read_page(vma: Any, vaddr: int) -> bytes | None:
    """What the task sees in the page of this address; None for a bus error. Needs mmap_lock."""
    page = find_page(vma.vm_mm, vaddr)
    return READ_ONCE(page, "contents") if page is not None else file_page(vma, vaddr)


def write_page(vma: Any, vaddr: int, data: bytes) -> int:
    """Change the task's private copy of the page, making it first if need be (breaking COW); 0, -EFAULT or
    -ENOMEM.

    Needs mmap_lock held for writing. `data` must not cross the page's end: every caller checked alignment.
    """
    page = faultin_private_page(vma, vaddr)
    if isinstance(page, int):
        return -errno.ENOMEM if page & VM_FAULT_OOM else -errno.EFAULT
    memcpy_to_page(page, vaddr & ~PAGE_MASK, data)
    return 0


def drop_page_if_unchanged(vma: Any, vaddr: int) -> bool:
    """Unmap the private copy if it equals the file's page again, which the next access will then use; whether
    it did.
    """
    mm = vma.vm_mm
    page = find_page(mm, vaddr)
    if page is None or READ_ONCE(page, "contents") != file_page(vma, vaddr):
        return False
    zap_page_range(mm, vaddr & PAGE_MASK, (vaddr & PAGE_MASK) + PAGE_SIZE)
    return True


def is_trap_at_addr(mm: Any, vaddr: int) -> int:
    """1 if a trap instruction is at the address, 0 if another byte is, -EFAULT if nothing can be read. Needs
    mmap_lock.
    """
    if WARN_ON_ONCE(vaddr % UPROBE_SWBP_INSN_SIZE != 0, "unaligned breakpoint address"):
        return -errno.EINVAL
    vma = vma_lookup(mm, vaddr)
    page = read_page(vma, vaddr) if vma is not None else None
    if page is None:
        return -errno.EFAULT
    return int(is_trap_insn(page[vaddr & ~PAGE_MASK]))


def fetch_opcode(mm: Any, vaddr: int) -> int:
    """The byte a CPU of this address space would execute; -EFAULT where it would fault. Takes mmap_lock for
    reading.
    """
    mmap_read_lock(mm)
    vma = vma_lookup(mm, vaddr)
    page = read_page(vma, vaddr) if vma is not None else None
    mmap_read_unlock(mm)
    return page[vaddr & ~PAGE_MASK] if page is not None else -errno.EFAULT
