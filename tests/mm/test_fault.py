"""Page faults one at a time: what appears in the page table, which lock was used, which signal comes."""

from signal import SIGBUS, SIGSEGV

import pytest

from kmodel.core import kernel_warnings
from kmodel.fs import fput, kernel_read, open_file, prune_icache
from kmodel.mm import (
    BUS_ADRERR,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_GROWSDOWN,
    MAP_PRIVATE,
    MAP_SHARED,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    SEGV_ACCERR,
    SEGV_MAPERR,
    STACK_GUARD_GAP,
    TASK_SIZE,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
    VM_FAULT_SIGSEGV,
    Signal,
    expand_stack,
    find_vma,
    get_mm_rss,
    handle_mm_fault,
    mm_alloc,
    mmap,
    mmap_lock_only,
    mmap_read_lock,
    mmap_read_unlock,
    mmput,
    mprotect,
    mremap,
    munmap,
    user_fetch,
    user_load,
    user_store,
    vma_lock_statistics,
    vma_lookup,
)
from kmodel.mm.memory import VM_FAULT_MAJOR
from kmodel.mm.page_table import (
    MM_ANONPAGES,
    MM_FILEPAGES,
    MM_SHMEMPAGES,
    check_invariants,
    get_mm_counter,
    ptep_get,
)
from kmodel.rcu import rcu_barrier
from kmodel.slab import fail_nth, leaks
from tests.mm.helpers import ANON, BASE, PAGE, RW

SHARED = MAP_SHARED | MAP_FIXED
PRIVATE = MAP_PRIVATE | MAP_FIXED


@pytest.fixture
def mm():
    mm = mm_alloc()
    yield mm
    check_invariants(mm)
    mmput(mm)
    rcu_barrier()
    prune_icache()
    rcu_barrier()
    assert [leak for leak in leaks() if leak.cache in ("page", "anon_vma", "vm_area_struct")] == []


@pytest.fixture
def file():
    file = open_file("/A", contents=b"abcdefgh" * (3 * PAGE // 8) + b"end")
    yield file
    fput(file)


def signal_of(action, *args):
    with pytest.raises(Signal) as caught:
        action(*args)
    return caught.value.info.si_signo, caught.value.info.si_code


def rss(mm):
    return tuple(get_mm_counter(mm, kind) for kind in (MM_FILEPAGES, MM_ANONPAGES, MM_SHMEMPAGES))


def changes(action):
    """What the action adds to the VMA_LOCK counters: success, abort, retry, miss."""
    before = vma_lock_statistics()
    action()
    after = vma_lock_statistics()
    return tuple(after[name] - before[name] for name in before)


# ------------------------------------------------------------------------------------------------ anonymous


def test_a_load_of_new_memory_maps_the_page_of_zeroes(mm):
    """It costs no page and prepares no anon_vma."""
    mmap(mm, BASE, 4 * PAGE, RW, ANON)
    assert user_load(mm, BASE + 5, 3) == b"\0\0\0"
    assert (get_mm_rss(mm), vma_lookup(mm, BASE).anon_vma) == (0, None)


def test_a_store_makes_a_page(mm):
    """The first store prepares the anon_vma, and the page keeps what is stored."""
    mmap(mm, BASE, 4 * PAGE, RW, ANON)
    user_store(mm, BASE + PAGE + 7, b"seven")
    assert user_load(mm, BASE + PAGE + 6, 7) == b"\0seven\0"
    assert (rss(mm), len(vma_lookup(mm, BASE).anon_vma_chain)) == ((0, 1, 0), 1)


def test_a_store_after_a_load_replaces_the_page_of_zeroes(mm):
    """do_wp_page copies: the page of zeroes is nobody's to write."""
    mmap(mm, BASE, 4 * PAGE, RW, ANON)
    user_load(mm, BASE)
    user_store(mm, BASE, b"x")
    assert (user_load(mm, BASE, 2), rss(mm)) == (b"x\0", (0, 1, 0))


def test_unmapping_gives_pages_back(mm):
    """munmap drops the entries of its range, and no other."""
    mmap(mm, BASE, 4 * PAGE, RW, ANON)
    for page in range(4):
        user_store(mm, BASE + page * PAGE, bytes([page]))
    munmap(mm, BASE + PAGE, 2 * PAGE)
    assert (rss(mm), user_load(mm, BASE + 3 * PAGE)) == ((0, 2, 0), b"\3")


def test_pages_move_with_mremap(mm):
    """move_page_tables: the contents are found at the new address, and not at the old one."""
    mmap(mm, BASE, 2 * PAGE, RW, ANON)
    user_store(mm, BASE + PAGE, b"moved")
    to = BASE + 64 * PAGE
    mremap(mm, BASE, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to)
    assert user_load(mm, to + PAGE, 5) == b"moved"
    assert signal_of(user_load, mm, BASE + PAGE) == (SIGSEGV, SEGV_MAPERR)


def test_shared_anonymous_memory_is_a_file(mm):
    """Its pages are counted as shmem, and a new one costs no read: no retry."""
    mmap(mm, BASE, 2 * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED)
    assert changes(lambda: user_store(mm, BASE, b"s")) == (1, 0, 0, 0)
    assert rss(mm) == (0, 0, 1)


# ------------------------------------------------------------------------------------------------ files


def test_a_private_mapping_reads_the_file_and_copies_on_write(mm, file):
    """do_read_fault maps the file's page, do_wp_page copies it; the file stays."""
    mmap(mm, BASE, 3 * PAGE, RW, PRIVATE, file)
    assert (user_load(mm, BASE + 8, 4), rss(mm)) == (b"abcd", (1, 0, 0))
    user_store(mm, BASE + 8, b"XY")
    assert (user_load(mm, BASE + 8, 4), rss(mm)) == (b"XYcd", (0, 1, 0))
    assert kernel_read(file, 8, 4) == b"abcd"


def test_a_store_first_copies_at_once(mm, file):
    """do_cow_fault: the file's page is not mapped on the way."""
    mmap(mm, BASE, 3 * PAGE, RW, PRIVATE, file)
    user_store(mm, BASE, b"Q")
    assert (user_load(mm, BASE, 4), rss(mm)) == (b"Qbcd", (0, 1, 0))


def test_a_shared_mapping_writes_the_file(mm, file):
    """do_shared_fault: a second mapping and read(2) see the store; no anon_vma appears."""
    other = mm_alloc()
    mmap(mm, BASE, 3 * PAGE, RW, SHARED, file)
    mmap(other, BASE, 3 * PAGE, PROT_READ, SHARED, file)
    assert user_load(other, BASE + 1, 2) == b"bc"
    user_store(mm, BASE + 1, b"!!")
    assert (user_load(other, BASE, 4), kernel_read(file, 0, 4)) == (b"a!!d", b"a!!d")
    assert (rss(mm), vma_lookup(mm, BASE).anon_vma) == ((1, 0, 0), None)
    mmput(other)


def test_a_shared_page_that_was_read_becomes_writable(mm, file):
    """do_wp_page in a shared mapping: the same page, no copy."""
    mmap(mm, BASE, 3 * PAGE, RW, SHARED, file)
    user_load(mm, BASE)
    page = ptep_get(mm, BASE).page
    user_store(mm, BASE, b"w")
    assert (ptep_get(mm, BASE).page, kernel_read(file, 0, 2)) == (page, b"wb")


def test_a_page_that_must_be_read_costs_a_retry(mm, file):
    """No lock is held while the file is read: the first fault counts RETRY, the next one does not."""
    mmap(mm, BASE, 3 * PAGE, PROT_READ, PRIVATE, file)
    assert changes(lambda: user_load(mm, BASE)) == (0, 0, 1, 0)
    munmap(mm, BASE, PAGE)
    mmap(mm, BASE, PAGE, PROT_READ, PRIVATE, file)
    assert changes(lambda: user_load(mm, BASE)) == (1, 0, 0, 0)


def test_a_retry_under_mmap_lock_happens_once(mm, file):
    """Without VMA locks the page is read with no lock held, and the fault starts anew."""
    mmap(mm, BASE, 3 * PAGE, PROT_READ, PRIVATE, file)
    with mmap_lock_only():
        assert changes(lambda: user_load(mm, BASE + PAGE, 2)) == (0, 0, 0, 0)
    assert user_load(mm, BASE + PAGE, 2) == b"ab"


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("locks", ["vma", "mmap"])
def test_signals(mm, file, locks):
    """MAPERR where nothing is, ACCERR where the access is forbidden, SIGBUS behind the end of the file."""
    mmap(mm, BASE, PAGE, PROT_READ, ANON)
    mmap(mm, BASE + PAGE, PAGE, PROT_NONE, ANON)
    mmap(mm, BASE + 8 * PAGE, 8 * PAGE, RW, PRIVATE, file)

    def check():
        assert signal_of(user_load, mm, BASE - 1) == (SIGSEGV, SEGV_MAPERR)
        assert signal_of(user_load, mm, TASK_SIZE) == (SIGSEGV, SEGV_MAPERR)
        assert signal_of(user_store, mm, BASE, b"x") == (SIGSEGV, SEGV_ACCERR)
        assert signal_of(user_fetch, mm, BASE) == (SIGSEGV, SEGV_ACCERR)
        assert signal_of(user_load, mm, BASE + PAGE) == (SIGSEGV, SEGV_ACCERR)
        assert user_load(mm, BASE + 11 * PAGE, 5) == b"end\0\0"
        assert signal_of(user_load, mm, BASE + 12 * PAGE) == (SIGBUS, BUS_ADRERR)
        assert signal_of(user_store, mm, BASE + 12 * PAGE, b"x") == (SIGBUS, BUS_ADRERR)

    if locks == "mmap":
        with mmap_lock_only():
            check()
    else:
        check()
    mmap_read_lock(mm)  # nothing was left locked
    mmap_read_unlock(mm)


def test_the_entry_says_what_went_wrong_in_bits(mm, file):
    """handle_mm_fault(): 0, VM_FAULT_SIGSEGV, VM_FAULT_SIGBUS, VM_FAULT_OOM."""
    mmap(mm, BASE, 8 * PAGE, RW, PRIVATE, file)
    assert handle_mm_fault(mm, BASE) & ~VM_FAULT_MAJOR == 0
    assert handle_mm_fault(mm, BASE, write=True) == 0
    assert handle_mm_fault(mm, BASE + 5 * PAGE) == VM_FAULT_SIGBUS
    assert handle_mm_fault(mm, BASE, instruction=True) == VM_FAULT_SIGSEGV
    assert handle_mm_fault(mm, 0) == VM_FAULT_SIGSEGV


def test_a_fetch_from_a_mapping_that_is_not_executable_brings_the_page_in_first(mm, file):
    """x86 looks at VM_EXEC only when the page is there: past the end of the file that is a SIGBUS."""
    mmap(mm, BASE, 8 * PAGE, RW, PRIVATE, file)
    assert handle_mm_fault(mm, BASE, instruction=True) & ~VM_FAULT_MAJOR == 0
    assert handle_mm_fault(mm, BASE, instruction=True) == VM_FAULT_SIGSEGV
    assert handle_mm_fault(mm, BASE + 5 * PAGE, instruction=True) == VM_FAULT_SIGBUS


@pytest.mark.parametrize("cache", ["page", "anon_vma"])
def test_no_memory_for_a_page_or_an_anon_vma(mm, cache):
    """VM_FAULT_OOM, nothing is entered or left locked, and the next fault works."""
    mmap(mm, BASE, PAGE, RW, ANON)
    with fail_nth(1, cache=cache):
        assert handle_mm_fault(mm, BASE, write=True) == VM_FAULT_OOM
    assert (rss(mm), vma_lookup(mm, BASE).vm_refcnt) == ((0, 0, 0), 1)
    user_store(mm, BASE, b"x")
    assert user_load(mm, BASE) == b"x"


# ------------------------------------------------------------------------------------------------ protection


def test_mprotect_takes_the_right_to_write_at_once(mm):
    """A page that was writable faults after mprotect(PROT_READ), and again works when it may be written."""
    mmap(mm, BASE, 2 * PAGE, RW, ANON)
    user_store(mm, BASE, b"1")
    mprotect(mm, BASE, PAGE, PROT_READ)
    assert signal_of(user_store, mm, BASE, b"2") == (SIGSEGV, SEGV_ACCERR)
    assert user_load(mm, BASE) == b"1"
    mprotect(mm, BASE, PAGE, PROT_NONE)
    assert signal_of(user_load, mm, BASE) == (SIGSEGV, SEGV_ACCERR)
    mprotect(mm, BASE, PAGE, RW)
    user_store(mm, BASE, b"3")
    assert user_load(mm, BASE) == b"3"


def test_execution_needs_exec(mm, file):
    """mprotect gives it to a page that is mapped already."""
    mmap(mm, BASE, PAGE, PROT_READ, PRIVATE, file)
    user_load(mm, BASE)
    assert signal_of(user_fetch, mm, BASE) == (SIGSEGV, SEGV_ACCERR)
    mprotect(mm, BASE, PAGE, PROT_READ | PROT_EXEC)
    assert user_fetch(mm, BASE, 3) == b"abc"


# ------------------------------------------------------------------------------------------------ stacks


def test_a_stack_grows_down_to_the_fault(mm):
    """The VMA begins at the page that was touched; faults below go on from there."""
    mmap(mm, BASE, 2 * PAGE, RW, ANON | MAP_GROWSDOWN)
    assert changes(lambda: user_store(mm, BASE - 3 * PAGE, b"deep")) == (0, 1, 0, 0)
    vma = vma_lookup(mm, BASE)
    assert (vma.vm_start, vma.vm_end, mm.total_vm) == (BASE - 3 * PAGE, BASE + 2 * PAGE, 5)
    assert user_load(mm, BASE - 3 * PAGE, 4) == b"deep"


def test_a_stack_keeps_its_guard_gap(mm):
    """It does not grow up to what is mapped below; an inaccessible mapping there does not count."""
    mmap(mm, BASE, PAGE, RW, ANON | MAP_GROWSDOWN)
    below = BASE - STACK_GUARD_GAP - 2 * PAGE
    mmap(mm, below, PAGE, RW, ANON)
    user_store(mm, BASE - PAGE, b"x")
    assert signal_of(user_store, mm, BASE - 2 * PAGE, b"x") == (SIGSEGV, SEGV_MAPERR)
    mprotect(mm, below, PAGE, PROT_NONE)
    user_store(mm, BASE - 2 * PAGE, b"x")


def test_a_stack_stops_at_its_limit(mm, monkeypatch):
    """RLIMIT_STACK."""
    monkeypatch.setattr(expand_stack, "rlimit_stack", 4 * PAGE)
    mmap(mm, BASE, 2 * PAGE, RW, ANON | MAP_GROWSDOWN)
    user_store(mm, BASE - 2 * PAGE, b"x")
    assert signal_of(user_store, mm, BASE - 3 * PAGE, b"x") == (SIGSEGV, SEGV_MAPERR)


def test_a_mapping_that_is_no_stack_does_not_grow(mm):
    """The fault below it is MAPERR."""
    mmap(mm, BASE, 2 * PAGE, RW, ANON)
    assert signal_of(user_load, mm, BASE - PAGE) == (SIGSEGV, SEGV_MAPERR)


# ------------------------------------------------------------------------------------------------ merging


def test_neighbours_share_an_anon_vma_if_they_could_merge(mm):
    """A fault in the second of two VMAs that mprotect could make one takes over the first one's anon_vma."""
    mmap(mm, BASE, 2 * PAGE, RW, ANON)
    mprotect(mm, BASE + PAGE, PAGE, PROT_READ)
    user_store(mm, BASE, b"x")
    mprotect(mm, BASE + PAGE, PAGE, RW | PROT_EXEC)
    user_store(mm, BASE + PAGE, b"y")
    first, second = vma_lookup(mm, BASE), vma_lookup(mm, BASE + PAGE)
    assert first is not second
    assert first.anon_vma is second.anon_vma
    mprotect(mm, BASE + PAGE, PAGE, RW)
    mmap_read_lock(mm)
    assert find_vma(mm, BASE).vm_end == BASE + 2 * PAGE
    mmap_read_unlock(mm)
    assert kernel_warnings() == ()
