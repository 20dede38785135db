"""Every value vm_refcnt ever has, against the table; a writer that is killed; late readers; another mm."""

from errno import EINTR

import pytest

from kmodel.core import BUG_ON, READ_ONCE, boot, current, guards, kill, raw_get
from kmodel.explore import Verdict, explore
from kmodel.hazards import find_scenario
from kmodel.hazards.vma_lives import attached_vma, detach_and_free
from kmodel.mm import (
    VM_REFCNT_EXCLUDE_READERS_FLAG,
    mm_alloc,
    mmap_write_lock,
    mmap_write_unlock,
    vma_end_read,
    vma_mark_detached,
    vma_start_read,
    vma_start_write,
    vma_start_write_killable,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock
from tests.mm.test_vma_lock_explored import State, reader, writer

pytestmark = pytest.mark.explore

F = VM_REFCNT_EXCLUDE_READERS_FLAG


def detacher(state):
    mmap_write_lock(state.mm)
    vma_start_write(state.vma)
    vma_mark_detached(state.vma)
    mmap_write_unlock(state.mm)


def watcher(state):
    """One look, at any moment: over all executions every value that anybody can meet."""
    state.seen = READ_ONCE(state.vma, "vm_refcnt")


def seen(state):
    return state.seen


@pytest.mark.parametrize(
    ("threads", "values"),
    [
        ((reader, watcher), {1, 2}),
        ((writer, watcher), {1, F + 1}),
        ((reader, writer, watcher), {1, 2, F + 1, F + 2}),
        ((detacher, watcher), {0, 1, F + 1}),
        # F: the detacher met a temporary reader, which is gone
        ((reader, detacher, watcher), {0, 1, 2, F, F + 1, F + 2}),
    ],
    ids=["read", "write", "read-write", "detach", "read-detach"],
)
def test_vm_refcnt_has_the_values_of_the_table_and_no_others(threads, values):
    """V3: one reader and one writer, whatever they do."""
    result = explore(State, *threads, outcome=seen, memory="sc")
    assert result.verdict is Verdict.PASS
    assert set(result.outcomes) == values


def killed_writer(state):
    mmap_write_lock(state.mm)
    kill(current())
    error = vma_start_write_killable(state.vma)
    BUG_ON(error not in (0, -EINTR), f"a killed writer got {error}")
    mmap_write_unlock(state.mm)


def nothing_is_left(state):
    BUG_ON(raw_get(state.vma, "vm_refcnt") != 1, f"vm_refcnt stays {raw_get(state.vma, 'vm_refcnt'):#x}")


def test_a_killed_writer_takes_its_bit_along():
    """H39: in every execution the count is 1 afterwards; without the cleanup readers fail for ever."""
    threads = (killed_writer, reader)
    assert explore(State, *threads, final=nothing_is_left, memory="sc").verdict is Verdict.PASS
    with guards.without("no-vma-killed-cleanup"):
        result = explore(State, *threads, final=nothing_is_left, memory="sc")
    assert result.verdict is Verdict.FAIL
    assert "stays 0x40000001" in result.violation.message


@pytest.mark.parametrize("memory", ["sc", "lkmm"])
@pytest.mark.parametrize(
    "name",
    ["vma-refcnt-limit", "vma-mm-copy", "vma-mm-grab", "vma-seq-wrap"],
)
def test_the_catalogues_scenarios_hold_and_break_with_reordering_too(name, memory):
    """H21, H28, H31, H33: their guards are no barriers; what sc finds, the kernel's model finds."""
    scenario = find_scenario(name)
    kept = scenario.explore(memory=memory, max_seconds=20)
    broken = scenario.explore(memory=memory, max_seconds=20, broken=True)
    assert (kept.verdict, broken.verdict) == (Verdict.PASS, Verdict.FAIL), f"{kept}; {broken}"


class TwoSpaces:
    """A VMA that somebody has found, and another address space. No trees: those are explored elsewhere."""

    def __init__(self):
        boot()
        self.mm, self.other_mm = mm_alloc(), mm_alloc()
        self.vma = attached_vma(self.mm)


def late_reader(state):
    rcu_read_lock()
    vma = vma_start_read(state.mm, state.vma)
    if vma is state.vma:
        BUG_ON(vma.vm_mm is not state.mm, "the reader locked a VMA of another address space")
        BUG_ON(READ_ONCE(vma, "vm_refcnt") < 2, "the reader locked a VMA that is detached")
        rcu_read_unlock()
        vma_end_read(vma)


def freer(state):
    detach_and_free(state.mm, state.vma)


def reuser(state):
    detach_and_free(state.mm, state.vma)
    assert attached_vma(state.other_mm) is state.vma


@pytest.mark.parametrize("memory", ["sc", "lkmm"])
@pytest.mark.parametrize(
    ("writer", "guard"),
    [(freer, "no-refcount-zero-test"), (reuser, "no-vma-mm-check")],
    ids=["H25", "H32"],
)
def test_a_late_reader_gets_its_vma_or_none(writer, guard, memory):
    """H25, H32: detached, freed, attached elsewhere: the count of 0 and vm_mm refuse, in every execution."""
    threads = (late_reader, writer)
    kept = explore(TwoSpaces, *threads, memory=memory, races=False)
    with guards.without(guard):
        broken = explore(TwoSpaces, *threads, memory=memory, races=False)
    assert (kept.verdict, broken.verdict) == (Verdict.PASS, Verdict.FAIL), f"{kept}; {broken}"
