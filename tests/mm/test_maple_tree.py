"""The maple tree against a plain list: every store, lookup, iteration and gap search of a random history."""

import bisect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sortedcontainers import SortedDict

from kmodel.mm.maple_node import ULONG_MAX, MapleTree
from kmodel.mm.maple_store import mas_destroy, mas_preallocate, mas_store_gfp, mas_store_prealloc
from kmodel.mm.maple_tree import check_invariants, mt_destroy, mt_for_each, mtree_erase, mtree_store_range
from kmodel.mm.maple_walk import (
    MaState,
    mas_empty_area,
    mas_empty_area_rev,
    mas_find,
    mas_next,
    mas_prev,
    mas_walk,
    mt_find,
    mtree_load,
)
from kmodel.rcu import rcu_barrier

SIZE = 48  # indexes of the histories


def small_tree() -> MapleTree:
    """Few slots per node: a handful of entries makes it three nodes deep."""
    return MapleTree(leaf_slots=4, arange_slots=4)


def ranges(oracle):
    """The oracle's runs of equal entries, as mt_for_each gives them."""
    found = []
    for index, entry in enumerate(oracle):
        if entry is None:
            continue
        if found and found[-1][2] is entry and found[-1][1] == index - 1:
            found[-1] = (found[-1][0], index, entry)
        else:
            found.append((index, index, entry))
    return found


store = st.tuples(st.integers(0, SIZE - 1), st.integers(0, 12), st.booleans())


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    history=st.lists(store, max_size=30),
    slots=st.sampled_from([(4, 4), (5, 3), (16, 10)]),
    where=st.integers(0, SIZE - 1),
    size=st.integers(1, 10),
)
def test_any_history_of_stores_equals_a_list(history, slots, where, size):
    """Loads, both iterations and both gap searches see exactly what was stored last."""
    mt = MapleTree(leaf_slots=slots[0], arange_slots=slots[1])
    oracle = [None] * SIZE
    for first, length, is_null in history:
        last = min(first + length, SIZE - 1)
        entry = None if is_null else (first, last)
        assert mtree_store_range(mt, first, last, entry) == 0
        oracle[first : last + 1] = [entry] * (last - first + 1)
        check_invariants(mt)
    assert [mtree_load(mt, i) for i in range(SIZE)] == oracle
    runs = ranges(oracle)
    assert list(mt_for_each(mt)) == runs

    mas, backwards = MaState(mt, SIZE, SIZE), []
    while (entry := mas_prev(mas)) is not None:
        backwards.append((mas.index, mas.last, entry))
    assert backwards == runs[::-1]

    free = [i for i in range(where, SIZE - size + 1) if all(oracle[j] is None for j in range(i, i + size))]
    mas = MaState(mt)
    assert (mas_empty_area(mas, where, SIZE - 1, size) == 0) == bool(free)
    if free:
        assert (mas.index, mas.last) == (free[0], free[0] + size - 1)
        assert mas_empty_area_rev(mas, where, SIZE - 1, size) == 0
        assert (mas.index, mas.last) == (free[-1], free[-1] + size - 1)


@settings(derandomize=True, max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.booleans()), max_size=150))
def test_points_equal_a_sorted_dict(history):
    """Single indexes stored and erased, full-size nodes, next and find against sortedcontainers."""
    mt, oracle = MapleTree(), SortedDict()
    for key, erase in history:
        if erase:
            assert mtree_erase(mt, key) == oracle.pop(key, None)
        else:
            mtree_store_range(mt, key, key, -key)
            oracle[key] = -key
    check_invariants(mt)
    keys = list(oracle)
    for probe in range(0, 401, 37):
        at = bisect.bisect_left(keys, probe)
        assert mt_find(mt, probe) == (oracle[keys[at]] if at < len(keys) else None)
        after = bisect.bisect_right(keys, probe)
        assert mas_next(MaState(mt, probe, probe)) == (oracle[keys[after]] if after < len(keys) else None)


def test_walk_gives_the_range():
    """mas_walk sets index and last to the whole range found, entry or gap."""
    mt = small_tree()
    mtree_store_range(mt, 0x1000, 0x2FFF, "a")
    mas = MaState(mt, 0x1800, 0x1800)
    assert (mas_walk(mas), mas.index, mas.last) == ("a", 0x1000, 0x2FFF)
    mas = MaState(mt, 0x5000, 0x5000)
    assert (mas_walk(mas), mas.index, mas.last) == (None, 0x3000, ULONG_MAX)


def test_erase_takes_the_whole_range_and_empties_the_tree():
    """Erasing through any index of a range clears all of it; the last one leaves no node behind."""
    mt = small_tree()
    mtree_store_range(mt, 10, 19, "a")
    mtree_store_range(mt, 30, 39, "b")
    assert (mtree_erase(mt, 15), mtree_erase(mt, 15)) == ("a", None)
    assert list(mt_for_each(mt)) == [(30, 39, "b")]
    assert mtree_erase(mt, 39) == "b"
    assert mt.ma_root is None


@pytest.mark.parametrize(
    ("first", "last", "in_place"),
    [
        (10, 19, True),  # exact fit
        (10, 24, True),  # all of "b" and the beginning of "c"
        (15, 29, True),  # the end of "b" and all of "c"
        (12, 15, False),  # the middle of "b": one range becomes three
        (15, 24, False),  # the end of "b" and the beginning of "c"
        (0, 29, False),  # three ranges become one
    ],
)
def test_only_stores_that_keep_the_number_of_ranges_are_made_in_place(first, last, in_place):
    """N2: exact fits and boundary moves change the leaf, anything else replaces it."""
    mt = MapleTree()
    for i, name in enumerate("abc"):
        mtree_store_range(mt, i * 10, i * 10 + 9, name)
    before = mt.ma_root
    mtree_store_range(mt, first, last, "new")
    assert (mt.ma_root is before) == in_place
    assert (before.parent is before) == (not in_place)  # N3
    assert [mtree_load(mt, i) for i in (first, last)] == ["new", "new"]
    check_invariants(mt)


def test_a_prepared_store_can_be_given_up():
    """mas_preallocate changes nothing; mas_destroy gives its nodes back."""
    from kmodel.mm import maple_node

    mt = small_tree()
    for i in range(0, 40, 2):
        mtree_store_range(mt, i, i, i)
    rcu_barrier()
    live = maple_node.maple_leaf_cache.statistics().live
    before = list(mt_for_each(mt))
    mas = MaState(mt, 5, 33)
    assert mas_preallocate(mas, "x") == 0
    assert list(mt_for_each(mt)) == before
    mas_destroy(mas)
    assert maple_node.maple_leaf_cache.statistics().live == live
    mas = MaState(mt, 5, 33)
    assert mas_preallocate(mas, "x") == 0
    mas_store_prealloc(mas, "x")
    assert mtree_load(mt, 20) == "x"
    check_invariants(mt)


def test_no_memory_changes_nothing(monkeypatch):
    """A store that cannot get its nodes returns -ENOMEM and gives back those it got."""
    from errno import ENOMEM

    from kmodel.mm import maple_node

    mt = small_tree()
    for i in range(0, 40, 2):
        mtree_store_range(mt, i, i, i)
    rcu_barrier()
    before = list(mt_for_each(mt))
    live = maple_node.maple_leaf_cache.statistics().live
    for failing in range(1, 30):
        left = failing
        real = maple_node.kmem_cache_zalloc

        def limited(cache, real=real):
            nonlocal left
            left -= 1
            return real(cache) if left > 0 else None

        monkeypatch.setattr(maple_node, "kmem_cache_zalloc", limited)
        result = mas_store_gfp(MaState(mt, 5, 33), "x")
        monkeypatch.setattr(maple_node, "kmem_cache_zalloc", real)
        if result == 0:
            break
        assert result == -ENOMEM
        assert list(mt_for_each(mt)) == before
        assert maple_node.maple_leaf_cache.statistics().live == live
    assert failing > 1
    assert mtree_load(mt, 5) == "x"


def test_every_node_comes_back():
    """After mt_destroy and a grace period both node caches are as they were."""
    from kmodel.mm import maple_node

    mt = small_tree()
    for i in range(200):
        mtree_store_range(mt, i * 3 % 199, i * 3 % 199 + 1, i)
    mt_destroy(mt)
    rcu_barrier()
    assert maple_node.maple_leaf_cache.statistics().live == 0
    assert maple_node.maple_arange_cache.statistics().live == 0


def test_find_goes_on_from_where_it_was():
    """mas_find returns the entry at the index first, then the following ones up to the limit."""
    mt = small_tree()
    for i in range(5):
        mtree_store_range(mt, i * 10, i * 10 + 4, i)
    mas = MaState(mt, 12, 12)
    assert [mas_find(mas, 39) for _ in range(4)] == [1, 2, 3, None]
