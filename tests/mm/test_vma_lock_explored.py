"""The VMA lock under the explorer: every interleaving, every reordering the kernel's memory model allows."""

import pytest

from kmodel.core import BUG_ON, boot, guards, variables
from kmodel.explore import Verdict, explore
from kmodel.mm import (
    mm_alloc,
    mmap,
    mmap_write_lock,
    mmap_write_unlock,
    munmap,
    vma_end_read,
    vma_lookup,
    vma_mark_attached,
    vma_mark_detached,
    vma_start_read,
    vma_start_write,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock
from tests.mm.helpers import ANON, BASE, PAGE, RW

pytestmark = pytest.mark.explore


class State:
    """One mapping, and two words that only its write lock protects."""

    def __init__(self):
        boot()
        self.mm = mm_alloc()
        mmap(self.mm, BASE, 4 * PAGE, RW, ANON)
        self.vma = vma_lookup(self.mm, BASE)
        self.data = variables(a=0, b=0)


def writer(state):
    mmap_write_lock(state.mm)
    vma_start_write(state.vma)
    state.data.a = 1
    state.data.b = 1
    mmap_write_unlock(state.mm)


def reader(state):
    rcu_read_lock()
    vma = vma_start_read(state.mm, state.vma)
    if vma is state.vma:
        a, b = state.data.a, state.data.b
        rcu_read_unlock()
        vma_end_read(vma)
        BUG_ON(a != b, f"a reader saw {a} and {b}")


def reuser(state):
    """The VMA leaves the tree and is another mapping at once."""
    mmap_write_lock(state.mm)
    vma_start_write(state.vma)
    vma_mark_detached(state.vma)
    state.vma.vm_pgoff = 7
    state.vma.vm_end = 9
    vma_mark_attached(state.vma)
    mmap_write_unlock(state.mm)


def reader_of_fields(state):
    rcu_read_lock()
    vma = vma_start_read(state.mm, state.vma)
    if vma is state.vma:
        pgoff, end = vma.vm_pgoff, vma.vm_end
        rcu_read_unlock()
        vma_end_read(vma)
        BUG_ON((pgoff == 7) != (end == 9), f"a reader saw pgoff {pgoff} and end {end}")


def unmapper(state):
    munmap(state.mm, BASE + PAGE, PAGE)


def walker(state):
    vma = vma_lookup(state.mm, BASE)
    BUG_ON(vma is None, "a mapped address was not found")


READ_WRITE = (writer, reader)
REUSE = (reuser, reader_of_fields)


@pytest.mark.parametrize("memory", ["sc", "lkmm"])
@pytest.mark.parametrize("threads", [READ_WRITE, REUSE], ids=["read-write", "reuse"])
def test_the_lock_holds_in_every_execution(threads, memory):
    """V1, V2, V4: exhausted, nothing found."""
    assert explore(State, *threads, memory=memory).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("threads", "guard", "memory"),
    [
        (READ_WRITE, "no-vma-writer-wait", "sc"),  # H27
        (READ_WRITE, "no-vma-seq-recheck", "sc"),  # V2
        (READ_WRITE, "no-vma-inc-acquire", "lkmm"),  # H35
        (READ_WRITE, "no-seqcount-end-wmb", "lkmm"),  # I4
        (REUSE, "no-vma-detach-wait", "sc"),  # H26
        (REUSE, "no-vma-attach-release", "lkmm"),  # H36
        (REUSE, "no-vma-inc-acquire", "lkmm"),  # H35
    ],
)
def test_without_a_guard_the_explorer_finds_the_failure(threads, guard, memory):
    """Each guard is needed: without it there is an execution that goes wrong."""
    with guards.without(guard):
        assert explore(State, *threads, memory=memory).verdict is Verdict.FAIL


@pytest.mark.parametrize("guard", ["no-vma-inc-acquire", "no-vma-attach-release"])
def test_ordering_guards_do_nothing_where_memory_is_sequential(guard):
    """H35 and H36 are about reordering: with sequentially consistent memory even the broken twin passes."""
    with guards.without(guard):
        assert explore(State, *REUSE, memory="sc").verdict is Verdict.PASS


def test_a_lookup_beside_munmap_is_exhausted():
    """W1: the tree's root is replaced under a walker; it finds the part that stays in every interleaving."""
    assert explore(State, unmapper, walker, memory="sc", max_seconds=60).verdict is Verdict.PASS
