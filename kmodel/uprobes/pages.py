"""What an address space sees at an address: its private copies of file pages, else the file.

Models:      mm/gup.c, mm/memory.c as far as uprobes needs them: FOLL_FORCE reads, breaking COW;
             kernel/events/uprobes.c, is_trap_at_addr, uprobe_copy_from_page, copy_to_page (7.2)
Guards:      mmap_lock (read: look, write: add or change a copy); page_table_lock for the table itself, as for
             a kernel's PTEs
Invariants:  G1 a page has a private copy only while a mapping covers it
Leaves out:  page tables proper, anonymous memory's contents (zeroes), swap, huge pages, TLBs (stubbed:
             docs/limits.md)
Read next:   uprobes/breakpoint.py, which writes into the copies
"""

import errno
from typing import Any

from kmodel.core import WARN_ON_ONCE, Struct, embedded, kernel_struct, untraced
from kmodel.fs import PAGE_SHIFT, PAGE_SIZE, i_size_read, read_mapping_page
from kmodel.mm import VM_DONTCOPY, for_each_vma, mmap_read_lock, mmap_read_unlock, vma_lookup
from kmodel.sync import SpinLock, spin_lock, spin_unlock
from kmodel.uprobes.arch import UPROBE_SWBP_INSN_SIZE, is_trap_insn

PAGE_MASK = ~(PAGE_SIZE - 1)


@kernel_struct
class AnonPage(Struct):
    """A private copy of a page: what FOLL_WRITE on a private file mapping leaves in the page table."""

    contents: bytes = b""


@kernel_struct
class UprobesState(Struct):
    """struct uprobes_state, and in it the model's stand-in for the mm's page table: the private copies by
    page address.
    """

    page_table_lock: SpinLock = embedded(factory=SpinLock)
    # write and read: page_table_lock
    pages: dict[int, AnonPage] = untraced(factory=dict, init=False)


def uprobes_state(mm: Any) -> UprobesState:
    """The mm's, made on first use. Needs mmap_lock held for writing."""
    state: UprobesState | None = mm.uprobes_state
    if state is None:
        state = mm.uprobes_state = UprobesState()
    return state


def vaddr_to_offset(vma: Any, vaddr: int) -> int:
    """The byte of the mapped file that is at this address."""
    return int((vma.vm_pgoff << PAGE_SHIFT) + (vaddr - vma.vm_start))


def offset_to_vaddr(vma: Any, offset: int) -> int:
    """The address at which this byte of the mapped file is (the VMA must map it)."""
    return int(vma.vm_start + offset - (vma.vm_pgoff << PAGE_SHIFT))


def find_page(mm: Any, vaddr: int) -> AnonPage | None:
    """The private copy that covers the address, if there is one."""
    state: UprobesState | None = mm.uprobes_state
    if state is None:
        return None
    spin_lock(state.page_table_lock)
    page = state.pages.get(vaddr & PAGE_MASK)
    spin_unlock(state.page_table_lock)
    return page


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
    return page.contents if page is not None else file_page(vma, vaddr)


def write_page(vma: Any, vaddr: int, data: bytes) -> int:
    """Change the task's private copy of the page, making it first if need be (breaking COW); 0 or -EFAULT.

    Needs mmap_lock held for writing. `data` must not cross the page's end: every caller checked alignment.
    """
    mm = vma.vm_mm
    state = uprobes_state(mm)
    page = find_page(mm, vaddr)
    old = page.contents if page is not None else file_page(vma, vaddr)
    if old is None:
        return -errno.EFAULT
    at = vaddr & ~PAGE_MASK
    new = old[:at] + data + old[at + len(data) :]
    spin_lock(state.page_table_lock)
    if page is None:
        state.pages[vaddr & PAGE_MASK] = AnonPage(contents=new)
    else:
        page.contents = new
    spin_unlock(state.page_table_lock)
    return 0


def drop_page_if_unchanged(vma: Any, vaddr: int) -> bool:
    """Unmap the private copy if it equals the file's page again, which the next access will then use; whether
    it did.
    """
    mm = vma.vm_mm
    page = find_page(mm, vaddr)
    if page is None or page.contents != file_page(vma, vaddr):
        return False
    zap_pages(mm, vaddr & PAGE_MASK, (vaddr & PAGE_MASK) + PAGE_SIZE)
    return True


def zap_pages(mm: Any, start: int, end: int) -> None:
    """Forget the private copies of [start, end): what unmapping does to a page table."""
    state: UprobesState | None = mm.uprobes_state
    if state is None:
        return
    spin_lock(state.page_table_lock)
    for address in [a for a in state.pages if start <= a < end]:
        del state.pages[address]
    spin_unlock(state.page_table_lock)


def move_pages(mm: Any, old: int, new: int, length: int) -> None:
    """mremap: the private copies of [old, old + length) go along to `new`. Needs mmap_lock (write)."""
    state: UprobesState | None = mm.uprobes_state
    if state is None:
        return
    spin_lock(state.page_table_lock)
    moving = {a: state.pages.pop(a) for a in list(state.pages) if old <= a < old + length}
    for address, page in moving.items():
        state.pages[address - old + new] = page
    spin_unlock(state.page_table_lock)


def dup_pages(oldmm: Any, mm: Any) -> None:
    """Give a child the parent's private pages, and with them the breakpoints in them (copy_page_range, H48).

    Not those of mappings that are not copied. Needs both mmap_locks held for writing.
    """
    state: UprobesState | None = oldmm.uprobes_state
    if state is None:
        return
    child = uprobes_state(mm)
    for vma in for_each_vma(oldmm):
        if vma.vm_flags & VM_DONTCOPY:
            continue
        spin_lock(state.page_table_lock)
        for address, page in state.pages.items():
            if vma.vm_start <= address < vma.vm_end:
                child.pages[address] = AnonPage(contents=page.contents)
        spin_unlock(state.page_table_lock)


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
