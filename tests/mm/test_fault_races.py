"""Faults beside munmap, mprotect, mremap, fork and each other, and what each guard is for."""

import itertools
from signal import SIGSEGV

import pytest

from kmodel.core import Deadlock, KernelBug, boot, current, engine, guards, kernel_warnings, kill, kthread_run
from kmodel.fs.page import get_page
from kmodel.mm import (
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PROT_READ,
    Signal,
    fork,
    get_mm_rss,
    handle_mm_fault,
    memory,
    mm_alloc,
    mmap,
    mmap_write_lock,
    mmap_write_unlock,
    mmput,
    mprotect,
    mremap,
    munmap,
    user_load,
    user_store,
    vma_lock,
    vma_lock_statistics,
    vma_lookup,
    vma_start_write,
)
from kmodel.mm import dup_mmap as dup_mmap_module
from kmodel.mm.page_table import Pte, check_invariants, pte_lock, pte_unlock, range_of, set_pte
from tests.mm.helpers import ANON, BASE, PAGE, RW, OneVma, over_seeds, stop_after, stop_before

SEEDS = 16


HEAD_STARTS = itertools.cycle([0, 40, 80, 120, 160, 200, 240, 300, 360, 420, 500, 600])


def late(task):
    """The task begins after so many accesses as the state says. (The engine is fair: without that two tasks
    would meet at the same places every time.)
    """

    def begins_late(state):
        for _ in range(state.late):
            assert state.data.a == 0
        task(state)

    return begins_late


class Two(OneVma):
    """One mapping of four pages, of which the first was written, and places for what the tasks find."""

    def __init__(self):
        super().__init__()
        self.late = next(HEAD_STARTS)
        user_store(self.mm, BASE, b"0")
        self.children = []


def whole(state):
    """Nothing is mapped outside mappings, nothing is counted wrong, no VMA is left locked, no warning."""
    check_invariants(state.mm)
    for page in range(4):
        vma = vma_lookup(state.mm, BASE + page * PAGE)
        assert vma is None or vma.vm_refcnt == 1
    assert kernel_warnings() == ()


def store(state, page, data):
    try:
        user_store(state.mm, BASE + page * PAGE, data)
        state.got.append((page, user_load(state.mm, BASE + page * PAGE, len(data)), data))
    except Signal as signal:
        state.got.append((page, signal.info.si_signo))


def writer(state):
    store(state, 1, b"w1")
    store(state, 2, b"w2")


def second_writer(state):
    store(state, 2, b"v2")
    store(state, 1, b"v1")


def unmapper(state):
    munmap(state.mm, BASE + PAGE, PAGE)


def protector(state):
    mprotect(state.mm, BASE + PAGE, PAGE, PROT_READ)
    mprotect(state.mm, BASE + PAGE, PAGE, RW)


def mover(state):
    to = BASE + 64 * PAGE
    mremap(state.mm, BASE, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to)


# ------------------------------------------------------------------------------------------------ any order


@pytest.mark.parametrize("changer", [unmapper, protector, mover, second_writer])
def test_faults_beside_changes(changer):
    """Whatever the order, page tables, counters and locks are whole afterwards (T1 to T3)."""
    over_seeds(SEEDS, Two, [late(writer), changer], whole)


def test_a_moved_page_is_never_lost():
    """A load sees the page where it was or a signal, never a new page of zeroes at the old place."""

    def loader(state):
        try:
            state.got.append(user_load(state.mm, BASE))
        except Signal:
            state.got.append(None)

    states = over_seeds(SEEDS, Two, [late(loader), mover], whole)
    assert {state.got[0] for state in states} == {b"0", None}


def test_both_locks_were_used():
    """Over the seeds faults succeeded under the VMA lock, and some had to fall back."""

    def count(state):
        whole(state)
        state.counts = vma_lock_statistics()

    states = over_seeds(SEEDS, Two, [late(writer), protector], count)
    total = {name: sum(state.counts[name] for state in states) for name in states[0].counts}
    assert total["vma_lock_success"]
    assert total["vma_lock_abort"]


# ------------------------------------------------------------------------------------------------ guards


@pytest.fixture
def gates():
    return []


class Gated(Two):
    """The task `who` stops where the test put a gate."""

    gates = None
    who = "faulter"

    def __init__(self):
        super().__init__()
        self.gate.who = self.who
        Gated.gates.append(self.gate)


def faulter(state):
    store(state, 3, b"x")


def first_page_faulter(state):
    store(state, 1, b"x")


class FirstPage(Gated):
    """The task that stops is another."""

    who = "first_page_faulter"


def test_a_fault_in_what_was_cut_off(monkeypatch, gates):
    """H34: mprotect split the VMA between the walk and the lock, and what was found is the other part. The
    check sends the fault to mmap_lock; without it the fault goes by the wrong mapping's rights.
    """
    stop_before(monkeypatch, vma_lock, "vma_start_read", gates)
    Gated.gates = gates

    def splitter(state):
        state.gate.wait_until_reached()
        mprotect(state.mm, BASE + 2 * PAGE, 2 * PAGE, PROT_READ)
        state.gate.open()

    for state in over_seeds(5, FirstPage, [first_page_faulter, splitter], whole):
        assert state.got == [(1, b"x", b"x")]
    with guards.without("no-vma-address-check"):
        for state in over_seeds(5, FirstPage, [first_page_faulter, splitter], whole):
            assert state.got == [(1, SIGSEGV)]


class Reused(Gated):
    """Two mappings of which the higher will go."""

    def __init__(self):
        super().__init__()
        mmap(self.mm, BASE + 64 * PAGE, PAGE, RW, ANON)


def test_a_fault_in_a_vma_that_is_another_mapping_by_now(monkeypatch, gates):
    """H34: the VMA was freed and is a mapping elsewhere in the same address space. Without the check a page
    appears where nothing is mapped (T1).
    """
    stop_before(monkeypatch, vma_lock, "vma_start_read", gates)
    Gated.gates = gates

    def reuser(state):
        state.gate.wait_until_reached()
        vma = vma_lookup(state.mm, BASE)
        munmap(state.mm, BASE, 4 * PAGE)
        mmap(state.mm, BASE + 128 * PAGE, PAGE, RW, ANON)
        assert vma_lookup(state.mm, BASE + 128 * PAGE) is vma
        state.gate.open()

    for state in over_seeds(5, Reused, [faulter, reuser], whole):
        assert state.got == [(3, SIGSEGV)]
    with guards.without("no-vma-address-check"), pytest.raises(KernelBug, match="T1"):
        over_seeds(5, Reused, [faulter, reuser], whole)


class Unprepared(OneVma):
    """No page was written yet: the first store has to prepare an anon_vma."""

    def __init__(self):
        super().__init__()
        self.gate.who = "faulter"
        Gated.gates.append(self.gate)


def test_no_fault_waits_for_mmap_lock_with_a_vma_locked(monkeypatch, gates):
    """H38: a writer holds mmap_lock and waits for the fault's VMA lock. With a trylock the fault gives way
    and is counted as RETRY; one that waits is a deadlock.
    """
    stop_before(monkeypatch, memory, "vmf_anon_prepare", gates)
    Gated.gates = gates

    def locker(state):
        state.gate.wait_until_reached()
        mmap_write_lock(state.mm)
        state.gate.open()
        vma_start_write(vma_lookup(state.mm, BASE))
        mmap_write_unlock(state.mm)

    def count(state):
        whole(state)
        state.counts = vma_lock_statistics()

    states = over_seeds(10, Unprepared, [faulter, locker], count)
    assert [state.got for state in states] == [[(3, b"x", b"x")]] * 10
    assert sum(state.counts["vma_lock_retry"] for state in states) > 0
    with guards.without("no-anon-prepare-trylock"), pytest.raises(Deadlock):
        over_seeds(10, Unprepared, [faulter, locker], whole)


def test_two_faults_at_one_page(monkeypatch, gates):
    """F1: the second to enter its page finds the entry changed and gives its page back; without that look the
    first one's store is lost.
    """
    stop_before(monkeypatch, memory, "_enter", gates)
    Gated.gates = gates

    def other(state):
        state.gate.wait_until_reached()
        user_store(state.mm, BASE + 3 * PAGE + 8, b"other")
        state.gate.open()

    def both(state):
        assert user_load(state.mm, BASE + 3 * PAGE + 8, 5) == b"other"
        assert user_load(state.mm, BASE + 3 * PAGE) == b"x"
        whole(state)

    over_seeds(5, Gated, [faulter, other], both)
    with guards.without("no-pte-recheck"), pytest.raises(AssertionError):
        over_seeds(5, Gated, [faulter, other], both)


# ------------------------------------------------------------------------------------------------ fork


def forker(state):
    state.children.append(fork(state.mm))


class Written(Two):
    """Two pages that hold 0."""

    def __init__(self):
        super().__init__()
        user_store(self.mm, BASE + PAGE, b"0")


def in_order(state):
    """Stores the first page, then the second."""
    user_store(state.mm, BASE, b"1")
    user_store(state.mm, BASE + PAGE, b"1")


def one_moment(state):
    child = state.children[0]
    seen = user_load(child, BASE), user_load(child, BASE + PAGE)
    assert seen != (b"0", b"1"), "D1: the child has the second store and not the first"
    assert (user_load(state.mm, BASE), user_load(state.mm, BASE + PAGE)) == (b"1", b"1")
    check_invariants(child)
    state.seen = seen
    whole(state)


def test_a_child_is_its_parent_at_one_moment():
    """Whatever the order, the child never has a later store without an earlier one (D1)."""
    states = over_seeds(SEEDS, Written, [late(in_order), forker], one_moment)
    assert len({state.seen for state in states}) > 1


def test_fork_locks_the_parents_mappings(monkeypatch, gates):
    """D1: between two pages that fork copies a fault has to wait for the VMA lock. Without it the store goes
    to a new page, and the next one to a page that is still to be copied.
    """
    seen = []

    def slow_copy(dst_vma, src_vma):
        for number, address in enumerate(range_of(src_vma.vm_mm, src_vma.vm_start, src_vma.vm_end)):
            if number == 1 and guards.any_removed:
                seen[-1].gate.stop()
            table = pte_lock(src_vma.vm_mm, address)
            pte = table.ptes[address] = Pte(table.ptes[address].page, table.ptes[address].prot, False)
            get_page(pte.page)
            childs = pte_lock(dst_vma.vm_mm, address)
            set_pte(childs, address, pte)
            pte_unlock(childs)
            pte_unlock(table)

    monkeypatch.setattr(dup_mmap_module, "copy_page_range", slow_copy)

    class Slow(Written):
        def __init__(self):
            super().__init__()
            seen.append(self)

    def storer(state):
        if guards.any_removed:
            state.gate.wait_until_reached()
        in_order(state)
        state.gate.open()

    over_seeds(5, Slow, [storer, forker], one_moment)
    with guards.without("no-fork-vma-lock"), pytest.raises(AssertionError, match="D1"):
        over_seeds(5, Slow, [storer, forker], one_moment)


def test_a_fork_that_is_killed_while_it_waits_for_a_fault(monkeypatch, gates):
    """vma_start_write_killable: -EINTR, nothing of the child is left, the fault goes on."""
    stop_after(monkeypatch, memory, "alloc_page", gates)
    Gated.gates = gates

    def forks(state):
        state.gate.wait_until_reached()
        task = kthread_run(killer, state, current(), comm="killer", daemon=False)
        assert task
        with pytest.raises(InterruptedError):
            fork(state.mm)
        state.gate.open()

    def killer(_state, task):
        kill(task)

    for state in over_seeds(10, Gated, [faulter, forks], whole):
        assert state.got == [(3, b"x", b"x")]


def test_real_threads_fault_and_fork():
    """The same on real threads: parent and child are whole, whoever was faster."""
    for _ in range(5):
        boot()
        mm = mm_alloc()
        mmap(mm, BASE, 64 * PAGE, RW, ANON)
        children = []

        def stores(mm=mm):
            for page in range(64):
                user_store(mm, BASE + page * PAGE, b"%03d" % page)

        def forks(mm=mm, children=children):
            for _ in range(3):
                children.append(fork(mm))

        tasks = [kthread_run(stores, daemon=False), kthread_run(forks, daemon=False)]
        for task in tasks:
            assert engine().join(task, timeout=30)
        pages = []
        for child in children:
            check_invariants(child)
            # The last page may be there and its store not yet.
            count = get_mm_rss(child)
            assert [user_load(child, BASE + page * PAGE, 3) for page in range(count - 1)] == [
                b"%03d" % page for page in range(count - 1)
            ]
            pages.append(count)
            mmput(child)
        assert pages == sorted(pages)
        assert handle_mm_fault(mm, BASE, write=True) == 0
        check_invariants(mm)
        mmput(mm)
        assert kernel_warnings() == ()
