"""Readers of address spaces against their writers, in every way that one preemption allows."""

import pytest

from kmodel.core import guards
from kmodel.explore import Verdict, explore
from tests.proc import world

pytestmark = pytest.mark.explore

# vma_lock_init() stores vm_lock_seq plainly into memory that a late reader may look at: a race by the
# letter, in
# the kernel too. What is asked for here is what the readers see.
OPTIONS = {"races": False, "preemptions": 1}


@pytest.mark.parametrize("guard", world.H40)
def test_lock_next_vma_needs_each_of_its_guards(guard):
    """H40 is found when the guard is gone."""
    setup, threads = world.H40[guard]
    with guards.without(guard):
        result = explore(setup, *threads, memory="lkmm", **OPTIONS)
    assert result.verdict is Verdict.FAIL


@pytest.mark.parametrize("guard", world.H40)
def test_lock_next_vma_shows_no_hole_that_never_was(guard):
    """H40 is not there otherwise: all executions with one preemption."""
    setup, threads = world.H40[guard]
    result = explore(setup, *threads, memory="sc", **OPTIONS)
    assert (result.violation, result.verdict) == (None, Verdict.BOUNDED)


@pytest.mark.parametrize("guard", ["maps-snapshot-recheck", "maps-snapshot-file-ref"])
def test_the_copying_reader_needs_the_file_and_the_first_check(guard):
    """Without, it follows a file that somebody is just opening."""
    with guards.without(guard):
        result = explore(world.Mapped, world.file_reader, world.close_and_reuse, memory="sc", **OPTIONS)
    assert result.verdict is Verdict.FAIL


def test_the_copying_reader_shows_a_mapping_with_its_file():
    """S1 and S2."""
    result = explore(world.Mapped, world.file_reader, world.close_and_reuse, memory="sc", **OPTIONS)
    assert (result.violation, result.verdict) == (None, Verdict.BOUNDED)


@pytest.mark.parametrize(
    ("variant", "removed", "verdict"),
    [
        ("mmap-lock", (), Verdict.BOUNDED),
        ("snapshot", (), Verdict.BOUNDED),
        ("snapshot", ("maps-snapshot-final-recheck",), Verdict.FAIL),
        # as in the kernel: brk(2) sets mm->brk before it waits for the VMA's readers (L2 of proc/show_map.py)
        ("vma-lock", (), Verdict.FAIL),
    ],
)
def test_who_may_show_a_heap_without_its_name(variant, removed, verdict):
    """The name of the heap is judged by mm->brk, which a VMA's lock does not protect."""
    with guards.without(*removed):
        result = explore(world.Heap, world.heap_reader(variant), world.shrink_heap, memory="sc", **OPTIONS)
    assert result.verdict is verdict


@pytest.mark.parametrize(
    ("removed", "verdict"), [((), Verdict.BOUNDED), (("procmap-query-vma-lock",), Verdict.FAIL)]
)
def test_a_query_is_answered_with_one_moment_of_one_vma(removed, verdict):
    """P1."""
    with guards.without(*removed):
        result = explore(world.border_space, world.query, world.split_off, memory="sc", **OPTIONS)
    assert result.verdict is verdict
