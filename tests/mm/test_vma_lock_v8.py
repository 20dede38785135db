"""The VMA lock of 6.4 to 6.14 behind the same names: the room's scenarios, and each of its guards removed."""

from errno import EAGAIN, EINTR

import pytest

from kmodel.core import (
    BUG_ON,
    boot,
    current,
    guards,
    is_freed,
    kernel_warnings,
    kill,
    rcu_assign_pointer,
    rcu_dereference,
    variables,
)
from kmodel.explore import Verdict, explore
from kmodel.mm import (
    find_vma,
    lock_vma_under_rcu,
    mm_alloc,
    mmap,
    mmap_read_lock,
    mmap_read_unlock,
    mmap_write_lock,
    mmap_write_unlock,
    mprotect,
    munmap,
    vm_area_alloc,
    vm_area_free,
    vma_end_read,
    vma_lock_seq,
    vma_lock_v8,
    vma_lookup,
    vma_mark_attached,
    vma_mark_detached,
    vma_start_read,
    vma_start_read_locked,
    vma_start_write,
    vma_start_write_killable,
    vma_state_in_words,
)
from kmodel.mm.vma_lock import check_invariants, vma_lock_variant
from kmodel.rcu import rcu_barrier, rcu_read_lock, rcu_read_lock_held, rcu_read_unlock
from kmodel.slab import all_caches
from tests.mm.helpers import ANON, BASE, PAGE, RW, OneVma, over_seeds, quiet
from tests.mm.test_vma_lock import reader, unmapper, writer
from tests.mm.test_vma_lock_explored import READ_WRITE, State


@pytest.fixture(autouse=True, params=[vma_lock_v8, vma_lock_seq], ids=["v8", "seq"])
def variant(request, fresh_boot):
    """Each test with both: they differ by a barrier."""
    with vma_lock_variant(request.param):
        boot()
        yield request.param
        rcu_barrier()  # its VMAs are freed while it is still there


def test_a_vma_goes_through_its_states():
    """Detached, attached and write-locked, unlocked, with a reader, detached again."""
    mm = mm_alloc()
    vma = vm_area_alloc(mm)
    seen = [vma_state_in_words(vma)]
    mmap_write_lock(mm)
    vma_start_write(vma)
    assert vma_mark_attached(vma)
    seen.append(vma_state_in_words(vma))
    mmap_write_unlock(mm)
    seen.append(vma_state_in_words(vma))
    rcu_read_lock()
    assert vma_start_read(mm, vma) is vma
    rcu_read_unlock()
    seen.append(vma_state_in_words(vma))
    check_invariants(vma)
    vma_end_read(vma)
    mmap_write_lock(mm)
    vma_start_write(vma)
    assert vma_mark_detached(vma)
    seen.append(vma_state_in_words(vma))
    mmap_write_unlock(mm)
    vm_area_free(vma)
    assert seen == [
        "detached",
        "attached, write-locked",
        "attached, unlocked",
        "attached, 1 readers",
        "detached",
    ]
    assert kernel_warnings() == ()


def test_failures_of_start_read_leave_rcu():
    """H41: the same contract as the count's: None and -EAGAIN end the RCU section."""
    mm = OneVma().mm
    vma = vma_lookup(mm, BASE)
    other = vm_area_alloc(mm)
    rcu_read_lock()
    assert vma_start_read(mm, other) == -EAGAIN
    assert not rcu_read_lock_held()
    mmap_write_lock(mm)
    vma_start_write(vma)
    rcu_read_lock()
    assert vma_start_read(mm, vma) is None
    assert not rcu_read_lock_held()
    mmap_write_unlock(mm)


def test_mmap_lock_is_traded_for_a_vma_lock():
    """It cannot fail: a semaphore has no limit that counts."""
    mm = OneVma().mm
    mmap_read_lock(mm)
    vma = find_vma(mm, BASE)
    assert vma_start_read_locked(vma)
    mmap_read_unlock(mm)
    assert vma_state_in_words(vma) == "attached, 1 readers"
    vma_end_read(vma)


def test_a_killed_writer_leaves_nothing():
    """H39: -EINTR, and readers get in as before."""
    state = OneVma()

    def long_reader(state):
        vma = lock_vma_under_rcu(state.mm, BASE)
        state.gate.stop()
        vma_end_read(vma)

    def killed_writer(state):
        state.gate.wait_until_reached()
        mmap_write_lock(state.mm)
        kill(current())
        state.got.append(vma_start_write_killable(vma_lookup(state.mm, BASE)))
        mmap_write_unlock(state.mm)
        state.gate.open()

    for state in over_seeds(5, OneVma, [long_reader, killed_writer], quiet):
        vma = vma_lookup(state.mm, BASE)
        assert state.got == [-EINTR]
        assert vma_state_in_words(vma) == "attached, unlocked"


def test_a_vma_is_freed_after_readers_that_may_have_found_it():
    """The memory is not another VMA's before a grace period is over."""

    def walker(state):
        rcu_read_lock()
        vma = vma_lookup(state.mm, BASE)
        state.gate.stop()
        state.got.append((is_freed(vma), vma.vm_start))
        rcu_read_unlock()

    def remapper(state):
        state.gate.wait_until_reached()
        munmap(state.mm, BASE, 4 * PAGE)
        mmap(state.mm, BASE + 8 * PAGE, PAGE, RW, ANON)
        state.gate.open()

    for state in over_seeds(5, OneVma, [walker, remapper], quiet):
        assert state.got == [(False, BASE)]


def test_semaphores_are_not_leaked():
    """One per VMA: split, merge and unmap give back as many as they take."""
    state = OneVma()
    mprotect(state.mm, BASE + PAGE, PAGE, 0)
    mprotect(state.mm, BASE + PAGE, PAGE, RW)
    mmap(state.mm, BASE + 8 * PAGE, PAGE, RW, ANON)
    munmap(state.mm, BASE, 16 * PAGE)
    rcu_barrier()
    in_use = {cache.name: cache.statistics().live for cache in all_caches()}
    assert (in_use["vma_lock"], in_use["vm_area_struct"]) == (0, 0)


def holder(state):
    vma = lock_vma_under_rcu(state.mm, BASE + PAGE)
    if vma is None:
        return
    state.got.append(vma)
    for _ in range(3):
        BUG_ON(is_freed(vma) or vma.detached or vma.vm_start != BASE, "the VMA went away under its reader")
    vma_end_read(vma)


@pytest.mark.parametrize("threads", [[writer, reader], [unmapper, holder]], ids=["write", "unmap"])
def test_it_passes_what_the_count_passes(threads):
    """V1, V2 on seeded schedules: nobody inside while it is written or unmapped; readers do get in."""
    states = over_seeds(15, OneVma, threads, quiet)
    assert any(state.got for state in states)


# ------------------------------------------------------------------------------------------------ explored


class Found(State):
    """One mapping, and a word where readers find it, as if that were the tree."""

    def __init__(self):
        super().__init__()
        self.tree = variables(slot=self.vma)


def finder(state):
    rcu_read_lock()
    found = rcu_dereference(state.tree, "slot")
    if found is None:
        rcu_read_unlock()
        return
    vma = vma_start_read(state.mm, found)
    if vma is found:
        BUG_ON(vma.detached, "a reader locked a VMA that is in no tree")
        rcu_read_unlock()
        vma_end_read(vma)


def freer(state):
    mmap_write_lock(state.mm)
    vma_start_write(state.vma)
    rcu_assign_pointer(state.tree, "slot", None)
    vma_mark_detached(state.vma)
    vm_area_free(state.vma)
    mmap_write_unlock(state.mm)


FREE = (Found, finder, freer)


@pytest.mark.explore
@pytest.mark.parametrize("memory", ["sc", "lkmm"])
@pytest.mark.parametrize("scenario", [(State, *READ_WRITE), FREE], ids=["read-write", "free"])
def test_the_lock_holds_in_every_execution(scenario, memory):
    """V1, V2, and nobody meets freed memory: exhausted, nothing found."""
    assert explore(*scenario, memory=memory).verdict is Verdict.PASS


@pytest.mark.explore
@pytest.mark.parametrize(
    ("scenario", "guard", "kind"),
    [
        ((State, *READ_WRITE), "no-v8-writer-wait", "data-race"),
        ((State, *READ_WRITE), "no-v8-seq-recheck", "data-race"),
        (FREE, "no-v8-detached-check", "assertion"),
        (FREE, "no-v8-rcu-free", "use-after-free"),
        (FREE, "no-v8-end-read-rcu", "use-after-free"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_without_a_guard_the_explorer_finds_the_failure(scenario, guard, kind):
    """Each guard is needed: without it there is an execution that goes wrong."""
    with guards.without(guard):
        result = explore(*scenario, memory="sc")
    assert (Verdict.FAIL, kind) == (result.verdict, result.violation and result.violation.kind), str(result)
