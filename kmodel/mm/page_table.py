"""The page table: which page an address leads to, and what may be done there.

Models:      mm/memory.c, zap_page_range, copy_page_range, set_pte_at; mm/mremap.c, move_page_tables;
             mm/mprotect.c, change_protection; include/linux/mm.h, get_mm_counter; kernel/fork.c, check_mm
             (7.2)
Guards:      the lock of the table that an entry is in, for the entry and the table's counters
Invariants:  T1 an entry lies in a mapping (when mmap_lock and all VMA locks are free)
             T2 an entry may be written only if its mapping may; in a private mapping its page is anonymous
             and
             nobody else's
             T3 the RSS counters are the numbers of entries of each kind
             T4 an entry holds a reference to its page (not to the page of zeroes), so no entry leads to a
             free one
Leaves out:  levels of tables, and tables that come and go: an mm has eight, and 2 MiB after 2 MiB takes the
             next of them; accessed and dirty bits, swap entries, huge pages. A task's access to memory takes
             the lock (mm/uaccess.py): that stands for the TLB, and for the flush that unmapping waits for
Read next:   mm/memory.py, which fills it

A table is a dict, from address to entry: only holders of its lock look into it.
"""

from typing import TYPE_CHECKING, Final

import attrs

from kmodel.core import BUG_ON, WARN, Pooled, embedded, is_freed, kernel_struct, untraced
from kmodel.fs.page import Page, get_page, is_zero_page, page_count, put_page
from kmodel.mm import hooks
from kmodel.mm.flags import (
    PAGE_SHIFT,
    PAGE_SIZE,
    TASK_SIZE,
    VM_ACCESS_FLAGS,
    VM_MAYWRITE,
    VM_SHARED,
    VM_WRITE,
)
from kmodel.sync import SpinLock, spin_lock, spin_unlock

if TYPE_CHECKING:
    from kmodel.mm.mm_struct import MmStruct
    from kmodel.mm.vma import VmAreaStruct

MM_FILEPAGES: Final = 0
MM_ANONPAGES: Final = 1
MM_SHMEMPAGES: Final = 3
_KINDS: Final = (MM_FILEPAGES, MM_ANONPAGES, MM_SHMEMPAGES)


@attrs.frozen(eq=False)
class Pte:
    """One entry (pte_t): never changed, only replaced. Two are the same if they are the same object."""

    page: Page
    # VM_READ, VM_WRITE, VM_EXEC of the mapping when it was made (vm_page_prot); none: PROT_NONE
    prot: int
    # stores need no fault
    write: bool


@kernel_struct
class PteTable(Pooled):
    """Entries that share a lock, and how many of each kind there are."""

    ptl: SpinLock = embedded(factory=SpinLock)
    # both: ptl
    ptes: dict[int, Pte] = untraced(factory=dict, init=False)
    rss_stat: list[int] = untraced(factory=lambda: [0, 0, 0, 0], init=False)


@kernel_struct
class PageTable(Pooled):
    """What mm->pgd leads to: neighbouring 2 MiB are in different tables."""

    # taken by whoever sets an anon_vma
    page_table_lock: SpinLock = embedded(factory=SpinLock)

    table0: PteTable = embedded(factory=PteTable)
    table1: PteTable = embedded(factory=PteTable)
    table2: PteTable = embedded(factory=PteTable)
    table3: PteTable = embedded(factory=PteTable)
    table4: PteTable = embedded(factory=PteTable)
    table5: PteTable = embedded(factory=PteTable)
    table6: PteTable = embedded(factory=PteTable)
    table7: PteTable = embedded(factory=PteTable)


_TABLES: Final = tuple(f"table{n}" for n in range(8))
PMD_SHIFT: Final = 21


def pte_table(mm: "MmStruct", address: int) -> PteTable:
    """The table of an address."""
    return getattr(mm.pgd, _TABLES[address >> PMD_SHIFT & 7])  # type: ignore[no-any-return]


def pte_tables(mm: "MmStruct", start: int = 0, end: int = TASK_SIZE) -> list[PteTable]:
    """The tables of [start, end)."""
    first, last = start >> PMD_SHIFT, (end - 1) >> PMD_SHIFT
    return [getattr(mm.pgd, _TABLES[n & 7]) for n in range(first, min(last, first + 7) + 1)]


def pte_lock(mm: "MmStruct", address: int) -> PteTable:
    """Lock the table of an address (pte_offset_map_lock)."""
    table = pte_table(mm, address)
    spin_lock(table.ptl)
    return table


def pte_unlock(table: PteTable) -> None:
    """End of pte_lock."""
    spin_unlock(table.ptl)


def pte_at(table: PteTable, address: int) -> Pte | None:
    """The entry of a page. Table locked."""
    # Not dict.get(): on free-threaded 3.13 it is slow on a dict of another thread.
    try:
        return table.ptes[address]
    except KeyError:
        return None


def ptep_get(mm: "MmStruct", address: int) -> Pte | None:
    """The entry of a page, as it is at some moment; a page it names is not kept."""
    table = pte_lock(mm, address)
    pte = pte_at(table, address)
    pte_unlock(table)
    return pte


def pgd_none(mm: "MmStruct") -> bool:
    """Whether there is no entry at all, at some moment: then nothing has to be looked at."""
    return not any(table.ptes for table in pte_tables(mm))


# ------------------------------------------------------------------------------------------------ counters


def mm_counter(page: Page) -> int:
    """Which counter a page belongs to."""
    if page.anon:
        return MM_ANONPAGES
    return MM_SHMEMPAGES if page.mapping.a_ops.shmem else MM_FILEPAGES


def set_pte(table: PteTable, address: int, pte: Pte | None) -> Page | None:
    """Replace an entry and count; the page that lost its place and the reference with it. Table locked.

    The new entry takes over a reference that the caller holds.
    """
    old = table.ptes.pop(address, None)
    if pte is not None:
        table.ptes[address] = pte
        if not is_zero_page(pte.page):
            table.rss_stat[mm_counter(pte.page)] += 1
    if old is None or is_zero_page(old.page):
        return None
    table.rss_stat[mm_counter(old.page)] -= 1
    return old.page


def get_mm_counter(mm: "MmStruct", member: int) -> int:
    """How many pages of a kind are mapped, at some moment."""
    return sum(table.rss_stat[member] for table in pte_tables(mm))


def get_mm_rss(mm: "MmStruct") -> int:
    """How many pages are mapped, at some moment."""
    return sum(sum(table.rss_stat) for table in pte_tables(mm))


def check_mm(mm: "MmStruct") -> None:
    """The address space is gone: warn of pages that are still counted in."""
    for kind in _KINDS:
        WARN(get_mm_counter(mm, kind), f"Bad rss-counter state: {get_mm_counter(mm, kind)} of kind {kind}")
    WARN(not pgd_none(mm), "an address space ends with entries in its page table")


# ------------------------------------------------------------------------------------------------ ranges


def _addresses(ptes: dict[int, Pte], start: int, end: int) -> list[int]:
    if (end - start) >> PAGE_SHIFT <= len(ptes):
        return [address for address in range(start, end, PAGE_SIZE) if address in ptes]
    return [address for address in ptes if start <= address < end]


def zap_page_range(mm: "MmStruct", start: int, end: int) -> None:
    """Forget the entries of [start, end). Nobody can fault there: mmap_lock and the VMAs are locked for
    writing,
    or the VMAs are out of the tree; or whoever faults wants a new page (MADV_DONTNEED, mmap_lock (read)).
    """
    for table in pte_tables(mm, start, end):
        if not table.ptes:
            continue
        gathered = []
        spin_lock(table.ptl)
        for address in _addresses(table.ptes, start, end):
            page = set_pte(table, address, None)
            if page is not None:
                gathered.append(page)
        spin_unlock(table.ptl)
        # Only now: as long as the lock was held, a task may have been at the page (mmu_gather).
        for page in gathered:
            put_page(page)


def move_page_tables(mm: "MmStruct", old: int, new: int, length: int) -> None:
    """mremap: the entries of [old, old + length) go to `new`, where there are none. mmap_lock (write), both
    VMAs write-locked.
    """
    # All out first: the ranges may overlap.
    moving = []
    for address in range_of(mm, old, old + length):
        table = pte_lock(mm, address)
        pte = table.ptes[address]
        set_pte(table, address, None)
        pte_unlock(table)
        moving.append((address - old + new, pte))
    for address, pte in moving:
        table = pte_lock(mm, address)
        set_pte(table, address, pte)
        pte_unlock(table)


def change_protection(vma: "VmAreaStruct", start: int, end: int) -> None:
    """The VMA's flags changed: so does what its entries allow. It is write-locked.

    What may be written from now on is found out by the next fault; what may not be any more loses it at once.
    """
    mm = vma.vm_mm
    assert mm is not None
    prot = vma.vm_flags & VM_ACCESS_FLAGS
    for table in pte_tables(mm, start, end):
        if not table.ptes:
            continue
        spin_lock(table.ptl)
        for address in _addresses(table.ptes, start, end):
            pte = table.ptes[address]
            table.ptes[address] = Pte(pte.page, prot, pte.write and bool(prot & VM_WRITE))
        spin_unlock(table.ptl)


def is_cow_mapping(flags: int) -> bool:
    """Whether a write through a mapping with these flags goes to a private copy."""
    return flags & (VM_SHARED | VM_MAYWRITE) == VM_MAYWRITE


def copy_page_range(dst_vma: "VmAreaStruct", src_vma: "VmAreaStruct") -> None:
    """fork: the child maps the parent's pages. In private mappings neither may write them any more, so that
    whoever writes first makes a copy. Both mmap_locks (write); src_vma is write-locked, so nobody faults
    in the parent's pages while some of them are copied and others not.
    """
    # A mapping without private pages need not be copied: the child's faults find the same pages in the file.
    if src_vma.anon_vma is None:
        return
    mm, child = src_vma.vm_mm, dst_vma.vm_mm
    assert mm is not None
    assert child is not None
    cow = is_cow_mapping(src_vma.vm_flags)
    for address in range_of(mm, src_vma.vm_start, src_vma.vm_end):
        # The child is unknown to everybody else; its lock nests inside.
        table = pte_lock(mm, address)
        pte = table.ptes[address]
        if cow and pte.write:
            pte = table.ptes[address] = Pte(pte.page, pte.prot, False)
        if not is_zero_page(pte.page):
            get_page(pte.page)
        childs = pte_lock(child, address)
        set_pte(childs, address, pte)
        pte_unlock(childs)
        pte_unlock(table)


def entries(mm: "MmStruct", start: int = 0, end: int = TASK_SIZE) -> list[tuple[int, Pte]]:
    """The entries in [start, end) in order. A picture of one moment only where nobody faults or zaps."""
    found = []
    for table in pte_tables(mm, start, end):
        if table.ptes:
            spin_lock(table.ptl)
            found += [(address, table.ptes[address]) for address in _addresses(table.ptes, start, end)]
            spin_unlock(table.ptl)
    return sorted(found, key=_address_of)


def _address_of(entry: tuple[int, Pte]) -> int:
    return entry[0]


def range_of(mm: "MmStruct", start: int, end: int) -> list[int]:
    """The addresses in [start, end) that have an entry, in order."""
    return [address for address, _pte in entries(mm, start, end)]


def anon_pages(mm: "MmStruct") -> dict[int, Page]:
    """The private pages by address (for dumps and tests)."""
    return {address: pte.page for address, pte in entries(mm) if pte.page.anon}


def check_invariants(mm: "MmStruct") -> None:
    """T1 to T4. mmap_lock (write) held, or nothing runs."""
    from kmodel.mm.vma_iter import vma_lookup

    counts = dict.fromkeys(_KINDS, 0)
    for address, pte in entries(mm):
        vma = vma_lookup(mm, address)
        BUG_ON(vma is None, f"T1: {address:#x} has a page and no mapping")
        BUG_ON(is_freed(pte.page), f"T4: {address:#x} leads to a free page")
        if pte.write:
            BUG_ON(not vma.vm_flags & VM_WRITE, f"T2: {address:#x} may be written, its mapping may not")
            BUG_ON(is_zero_page(pte.page), f"T2: the page of zeroes may be written at {address:#x}")
            if is_cow_mapping(vma.vm_flags):
                BUG_ON(not pte.page.anon, f"T2: a private mapping may write its file at {address:#x}")
                BUG_ON(page_count(pte.page) != 1, f"T2: the page at {address:#x} is writable and shared")
        if not is_zero_page(pte.page):
            counts[mm_counter(pte.page)] += 1
    for kind, count in counts.items():
        BUG_ON(
            get_mm_counter(mm, kind) != count, f"T3: counter {kind} is {get_mm_counter(mm, kind)} for {count}"
        )


hooks.zap_pages = zap_page_range
hooks.move_pages = move_page_tables
hooks.change_protection = change_protection
