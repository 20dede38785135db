"""i_mmap against the plainest oracle, its lock, and counts of writable mappings."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kmodel.core import KernelBug, LockingBug, Pooled, kernel_struct
from kmodel.fs import (
    PAGE_SHIFT,
    AddressSpace,
    empty_aops,
    i_mmap_assert_write_locked,
    i_mmap_lock_read,
    i_mmap_lock_write,
    i_mmap_unlock_read,
    i_mmap_unlock_write,
    mapping_map_writable,
    mapping_mapped,
    mapping_unmap_writable,
    mapping_writably_mapped,
    read_mapping_page,
    regular_aops,
    shmem_aops,
    shmem_mapping,
    vma_interval_tree_foreach,
    vma_interval_tree_insert,
    vma_interval_tree_remove,
)


@kernel_struct
class Vma(Pooled):
    """As much of a VMA as i_mmap looks at."""

    vm_start: int = 0
    vm_end: int = 0
    vm_pgoff: int = 0


def vma(pgoff: int, pages: int, at: int = 0x400000) -> Vma:
    return Vma(vm_start=at, vm_end=at + (pages << PAGE_SHIFT), vm_pgoff=pgoff)


RANGES = st.tuples(st.integers(0, 30), st.integers(1, 12))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(ranges=st.lists(RANGES, max_size=12), removed=st.sets(st.integers(0, 11)), query=RANGES)
def test_foreach_finds_exactly_the_overlapping_vmas(ranges: Any, removed: Any, query: Any) -> None:
    """Interval queries equal a filter over all entries, in order of the first page."""
    mapping = AddressSpace()
    entries = [vma(pgoff, pages) for pgoff, pages in ranges]
    i_mmap_lock_write(mapping)
    for entry in entries:
        vma_interval_tree_insert(entry, mapping)
    for n in sorted(removed):
        if n < len(entries):
            vma_interval_tree_remove(entries[n], mapping)
    mapping.check_invariants()
    first, last = query[0], query[0] + query[1] - 1
    expected = [
        entry
        for n, (entry, (pgoff, pages)) in enumerate(zip(entries, ranges, strict=True))
        if n not in removed and pgoff <= last and pgoff + pages - 1 >= first
    ]
    found = list(vma_interval_tree_foreach(mapping, first, last))
    i_mmap_unlock_write(mapping)

    assert sorted(map(id, found)) == sorted(map(id, expected))
    assert [v.vm_pgoff for v in found] == sorted(v.vm_pgoff for v in found)


def test_i_mmap_wants_its_lock() -> None:
    """Changing needs it for writing, walking needs it either way."""
    mapping = AddressSpace()
    with pytest.raises(LockingBug):
        vma_interval_tree_insert(vma(0, 1), mapping)
    with pytest.raises(LockingBug):
        list(vma_interval_tree_foreach(mapping, 0, 1))
    i_mmap_lock_read(mapping)
    assert list(vma_interval_tree_foreach(mapping, 0, 1)) == []
    with pytest.raises(LockingBug):
        i_mmap_assert_write_locked(mapping)
    i_mmap_unlock_read(mapping)


def test_vma_changed_while_in_i_mmap_is_found_out() -> None:
    """M1: vm_pgoff must not change between insert and remove."""
    mapping = AddressSpace()
    entry = vma(3, 1)
    i_mmap_lock_write(mapping)
    vma_interval_tree_insert(entry, mapping)
    entry.vm_pgoff = 9
    with pytest.raises(KernelBug, match="M1"):
        vma_interval_tree_remove(entry, mapping)
    with pytest.raises(AssertionError, match="M1"):
        mapping.check_invariants()
    entry.vm_pgoff = 3
    vma_interval_tree_remove(entry, mapping)
    assert not mapping_mapped(mapping)
    i_mmap_unlock_write(mapping)


def test_writable_mappings_are_counted_or_denied() -> None:
    """A negative count denies."""
    mapping = AddressSpace()
    assert [mapping_map_writable(mapping), mapping_writably_mapped(mapping)] == [0, True]
    mapping_unmap_writable(mapping)
    mapping.i_mmap_writable = -1
    assert [mapping_map_writable(mapping), mapping_writably_mapped(mapping)] == [-1, False]


def test_a_ops_say_what_can_be_read() -> None:
    """What uprobe_register asks before it refuses with -EIO."""
    assert [bool(ops.read_folio) or ops.shmem for ops in (empty_aops, regular_aops, shmem_aops)] == [
        False,
        True,
        True,
    ]
    mapping = AddressSpace(a_ops=shmem_aops)
    assert shmem_mapping(mapping)
    with pytest.raises(KernelBug):
        read_mapping_page(AddressSpace(), 0)
