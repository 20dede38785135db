"""What a page fault does once its mapping is known and locked: find or make the page, and enter it.

Models:      mm/memory.c, __handle_mm_fault, handle_pte_fault, do_anonymous_page, do_fault, do_read_fault,
             do_cow_fault, do_shared_fault, do_wp_page, wp_page_copy, __vmf_anon_prepare; mm/filemap.c,
             filemap_fault; mm/shmem.c, shmem_fault (7.2)
Guards:      the VMA's read lock (FAULT_FLAG_VMA_LOCK) or mmap_lock (read or write) for the mapping;
             the lock of the table that the entry is in
Invariants:  F1 an entry is set only if it still is what the decision was made from (orig_pte)
             F2 VM_FAULT_RETRY means: the lock that was held is released already
             F3 under a VMA lock nothing waits for mmap_lock (H38)
Leaves out:  fault-around, read-ahead, huge pages, swap, NUMA hints, userfaultfd, page_mkwrite, page locks
Read next:   mm/fault.py, the way here

    entry       mapping       access   result
    none        anonymous     load     the page of zeroes, read-only
                              store    a new page
    none        file          load     the file's page, read-only
                private       store    a copy of it (do_cow_fault)
                shared        store    the file's page, writable
    read-only   private       store    writable if nobody else has the page, else a copy (do_wp_page)
                shared        store    writable
"""

from typing import Any, Final

import attrs

from kmodel.core import READ_ONCE, guards, test_bit
from kmodel.fs import fput, get_file, i_size_read, shmem_mapping
from kmodel.fs import page as page_module
from kmodel.fs.filemap import filemap_get_page, filemap_read_page
from kmodel.fs.page import Page, alloc_page, get_page, is_zero_page, page_count, put_page
from kmodel.mm.anon_vma import anon_vma_prepare
from kmodel.mm.flags import (
    MMF_UNSTABLE,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    VM_ACCESS_FLAGS,
    VM_MAYSHARE,
    VM_SHARED,
    VM_WRITE,
)
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap_lock import (
    mmap_assert_locked,
    mmap_read_lock,
    mmap_read_trylock,
    mmap_read_unlock,
)
from kmodel.mm.page_table import Pte, pte_at, pte_lock, pte_unlock, ptep_get, set_pte
from kmodel.mm.vma import VmAreaStruct, vma_is_anonymous
from kmodel.mm.vma_iter import find_vma, find_vma_prev
from kmodel.mm.vma_lock import vma_end_read

FAULT_FLAG_WRITE: Final = 1 << 0
FAULT_FLAG_ALLOW_RETRY: Final = 1 << 2
FAULT_FLAG_KILLABLE: Final = 1 << 4
FAULT_FLAG_TRIED: Final = 1 << 5
FAULT_FLAG_USER: Final = 1 << 6
FAULT_FLAG_REMOTE: Final = 1 << 7
FAULT_FLAG_INSTRUCTION: Final = 1 << 8
FAULT_FLAG_INTERRUPTIBLE: Final = 1 << 9
FAULT_FLAG_VMA_LOCK: Final = 1 << 12
FAULT_FLAG_DEFAULT: Final = FAULT_FLAG_ALLOW_RETRY | FAULT_FLAG_KILLABLE | FAULT_FLAG_INTERRUPTIBLE

VM_FAULT_OOM: Final = 0x1
VM_FAULT_SIGBUS: Final = 0x2
VM_FAULT_MAJOR: Final = 0x4
VM_FAULT_SIGSEGV: Final = 0x40
VM_FAULT_NOPAGE: Final = 0x100
VM_FAULT_RETRY: Final = 0x400
VM_FAULT_COMPLETED: Final = 0x4000
VM_FAULT_ERROR: Final = VM_FAULT_OOM | VM_FAULT_SIGBUS | VM_FAULT_SIGSEGV

_TRYLOCK = guards.register(
    "no-anon-prepare-trylock", "H38: a fault waits for mmap_lock while the writer waits for its VMA lock"
)
_RECHECK = guards.register(
    "no-pte-recheck", "F1: two faults at one page both enter theirs, and what was stored in the first is lost"
)


@attrs.define(eq=False)
class VmFault:
    """One fault (struct vm_fault)."""

    vma: VmAreaStruct
    mm: MmStruct
    address: int  # of the page
    pgoff: int
    flags: int
    orig_pte: Pte | None = None
    page: Page | None = None  # the file's, with a reference
    major: int = 0


def handle_vma_fault(vma: VmAreaStruct, address: int, flags: int) -> int:
    """Make the access of this kind at this address possible: 0 or VM_FAULT_* bits. (The kernel's
    handle_mm_fault(); that name is the model's entry, see mm/fault.py.)

    The VMA is read-locked (FAULT_FLAG_VMA_LOCK) or mmap_lock is held; the VMA allows the access, or the
    caller has the right to force it.
    """
    mm = vma.vm_mm
    assert mm is not None
    address &= PAGE_MASK
    pgoff = vma.vm_pgoff + ((address - vma.vm_start) >> PAGE_SHIFT)
    vmf = VmFault(vma, mm, address, pgoff, flags)
    vmf.orig_pte = ptep_get(mm, address)
    if vmf.orig_pte is None:
        return do_anonymous_page(vmf) if vma_is_anonymous(vma) else do_fault(vmf)
    if not flags & FAULT_FLAG_WRITE or vmf.orig_pte.write:
        # Somebody else was faster, or the entry is older than the mapping's flags.
        if vmf.orig_pte.prot != vma.vm_flags & VM_ACCESS_FLAGS:
            _refresh(vmf)
        return 0
    return do_wp_page(vmf)


# ------------------------------------------------------------------------------------------------ helpers


def _removed(guard: str) -> bool:
    return guards.any_removed and guard in guards.removed


def release_fault_lock(vmf: VmFault) -> None:
    """Let go of whichever lock the fault came with; VM_FAULT_RETRY has to follow."""
    if vmf.flags & FAULT_FLAG_VMA_LOCK:
        vma_end_read(vmf.vma)
    else:
        mmap_read_unlock(vmf.mm)


def __anon_vma_prepare(vma: VmAreaStruct) -> int:
    """Give the VMA an anon_vma: 0 or -ENOMEM. mmap_lock, because the neighbours are looked at."""
    mm = vma.vm_mm
    assert mm is not None
    mmap_assert_locked(mm)
    return anon_vma_prepare(vma, find_vma_prev(mm, vma.vm_start)[1], find_vma(mm, vma.vm_end))


def vmf_anon_prepare(vmf: VmFault) -> int:
    """The VMA gets its first private page: it needs an anon_vma, and that needs mmap_lock. 0, VM_FAULT_OOM,
    or
    VM_FAULT_RETRY with the VMA's lock released.
    """
    if READ_ONCE(vmf.vma, "anon_vma") is not None:
        return 0
    under_vma_lock = vmf.flags & FAULT_FLAG_VMA_LOCK
    if under_vma_lock:
        # A writer may hold it and wait for our read lock (H38).
        if _removed(_TRYLOCK):
            mmap_read_lock(vmf.mm)
        elif not mmap_read_trylock(vmf.mm):
            vma_end_read(vmf.vma)
            return VM_FAULT_RETRY
    error = __anon_vma_prepare(vmf.vma)
    if under_vma_lock:
        mmap_read_unlock(vmf.mm)
    return VM_FAULT_OOM if error else 0


def _enter(vmf: VmFault, page: Page, write: bool) -> bool:
    """Set the entry unless it changed (F1); it takes over the caller's reference. Whether it did."""
    pte = Pte(page, vmf.vma.vm_flags & VM_ACCESS_FLAGS, write)
    table = pte_lock(vmf.mm, vmf.address)
    now = pte_at(table, vmf.address)
    same = now is vmf.orig_pte or _removed(_RECHECK)
    old = set_pte(table, vmf.address, pte) if same else None
    pte_unlock(table)
    if old is not None:
        put_page(old)
    return same


def _refresh(vmf: VmFault) -> None:
    """Let the entry allow what its mapping does (ptep_set_access_flags)."""
    table = pte_lock(vmf.mm, vmf.address)
    pte = pte_at(table, vmf.address)
    if pte is not None and pte is vmf.orig_pte:
        table.ptes[vmf.address] = Pte(pte.page, vmf.vma.vm_flags & VM_ACCESS_FLAGS, pte.write)
    pte_unlock(table)


def _unstable(vmf: VmFault) -> bool:
    """Whether the address space is being torn down: a new page in it may be another than what was there."""
    return test_bit(MMF_UNSTABLE, vmf.mm, "flags")


# ------------------------------------------------------------------------------------------------ anonymous


def do_anonymous_page(vmf: VmFault) -> int:
    """The first access to a page of anonymous memory."""
    vma = vmf.vma
    if vma.vm_flags & VM_SHARED:
        return VM_FAULT_SIGBUS  # shared memory has a file
    if _unstable(vmf):
        return VM_FAULT_SIGBUS
    if not vmf.flags & FAULT_FLAG_WRITE:
        _enter(vmf, page_module.empty_zero_page, False)
        return 0
    ret = vmf_anon_prepare(vmf)
    if ret:
        return ret
    page = alloc_page(mapping=vma.anon_vma, index=vmf.pgoff, anon=True)
    if page is None:
        return VM_FAULT_OOM
    if not _enter(vmf, page, bool(vma.vm_flags & VM_WRITE)):
        put_page(page)
    return 0


# ------------------------------------------------------------------------------------------------ files


def do_fault(vmf: VmFault) -> int:
    """The first access to a page of a file (or of what else somebody maps)."""
    if vmf.vma.vm_file is None:
        return VM_FAULT_SIGBUS
    if not vmf.flags & FAULT_FLAG_WRITE:
        ret = _fault(vmf)
        return ret if ret else _finish_fault(vmf, False)
    if vmf.vma.vm_flags & VM_SHARED:
        ret = _fault(vmf)
        return ret if ret else _finish_fault(vmf, True)
    return do_cow_fault(vmf)


def _finish_fault(vmf: VmFault, write: bool) -> int:
    page = vmf.page
    assert page is not None
    if _unstable(vmf):
        put_page(page)
        return VM_FAULT_SIGBUS
    if not _enter(vmf, page, write and bool(vmf.vma.vm_flags & VM_WRITE)):
        put_page(page)
    return vmf.major


def do_cow_fault(vmf: VmFault) -> int:
    """A store to a private file mapping: a copy of the file's page, which is not itself mapped."""
    ret = vmf_anon_prepare(vmf)
    if ret:
        return ret
    ret = _fault(vmf)
    if ret:
        return ret
    page = vmf.page
    assert page is not None
    copy = alloc_page(READ_ONCE(page, "contents"), vmf.vma.anon_vma, vmf.pgoff, anon=True)
    put_page(page)
    if copy is None:
        return VM_FAULT_OOM
    vmf.page = copy
    return _finish_fault(vmf, True)


def _fault(vmf: VmFault) -> int:
    """vm_ops->fault: the page of the file in vmf.page, with a reference; 0 or what went wrong."""
    file = vmf.vma.vm_file
    mapping = file.f_mapping
    if mapping.a_ops.read_folio is None:
        return VM_FAULT_SIGBUS
    return filemap_fault(vmf, file, mapping)


def _beyond(mapping: Any, pgoff: int) -> bool:
    return bool(pgoff >= (i_size_read(mapping.host) + PAGE_SIZE - 1) >> PAGE_SHIFT)


def filemap_fault(vmf: VmFault, file: Any, mapping: Any) -> int:
    """The page from the page cache. Reading it in takes long: no lock is held meanwhile, and the fault starts
    anew (once).
    """
    if _beyond(mapping, vmf.pgoff):
        return VM_FAULT_SIGBUS
    page = filemap_get_page(mapping, vmf.pgoff)
    if page is None:
        if not shmem_mapping(mapping):  # whose new pages come from nowhere
            vmf.major = VM_FAULT_MAJOR
            if vmf.flags & (FAULT_FLAG_ALLOW_RETRY | FAULT_FLAG_TRIED) == FAULT_FLAG_ALLOW_RETRY:
                # The VMA may go as soon as it is unlocked; the file stays (maybe_unlock_mmap_for_io).
                get_file(file)
                release_fault_lock(vmf)
                page = filemap_read_page(mapping, vmf.pgoff)
                if page is not None:
                    put_page(page)
                fput(file)
                return VM_FAULT_RETRY | VM_FAULT_MAJOR
        page = filemap_read_page(mapping, vmf.pgoff)
        if page is None:
            return VM_FAULT_OOM
    if _beyond(mapping, vmf.pgoff):
        put_page(page)
        return VM_FAULT_SIGBUS
    vmf.page = page
    return 0


# -------------------------------------------------------------------------------------------- read-only pages


def do_wp_page(vmf: VmFault) -> int:
    """A store to a page that is mapped read-only."""
    vma, pte = vmf.vma, vmf.orig_pte
    assert pte is not None
    may_write = bool(vma.vm_flags & VM_WRITE)
    table = pte_lock(vmf.mm, vmf.address)
    if pte_at(table, vmf.address) is not pte:
        pte_unlock(table)
        return 0
    page = pte.page
    shared = bool(vma.vm_flags & (VM_SHARED | VM_MAYSHARE))
    # Ours alone? Nobody can find it but by this entry, whose lock we hold.
    if shared or (page.anon and page_count(page) == 1):
        if may_write:
            table.ptes[vmf.address] = Pte(page, vma.vm_flags & VM_ACCESS_FLAGS, True)
        pte_unlock(table)
        return 0
    counted = not is_zero_page(page)
    if counted:
        get_page(page)  # it may be unmapped while we copy
    pte_unlock(table)
    return wp_page_copy(vmf, page, counted, may_write)


def wp_page_copy(vmf: VmFault, old: Page, counted: bool, may_write: bool) -> int:
    """Give the mapping a copy of its own of a page that others have, too."""
    ret = vmf_anon_prepare(vmf)
    if not ret:
        contents = READ_ONCE(old, "contents") if counted else None
        copy = alloc_page(contents, vmf.vma.anon_vma, vmf.pgoff, anon=True)
        if copy is None:
            ret = VM_FAULT_OOM
        elif not _enter(vmf, copy, may_write):
            put_page(copy)
    if counted:
        put_page(old)
    return ret


def faultin_private_page(vma: VmAreaStruct, address: int) -> Page | int:
    """The mapping's own copy of the page, made if need be, as for a debugger's store (get_user_page with
    FOLL_WRITE | FOLL_FORCE): it, or VM_FAULT_*. mmap_lock (write): nobody shares it until that is released.
    """
    mm = vma.vm_mm
    assert mm is not None
    address &= PAGE_MASK
    while True:
        pte = ptep_get(mm, address)
        if pte is not None and pte.page.anon and page_count(pte.page) == 1:
            return pte.page
        ret = handle_vma_fault(vma, address, FAULT_FLAG_WRITE | FAULT_FLAG_REMOTE)
        if ret & VM_FAULT_ERROR:
            return ret
