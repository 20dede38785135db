"""Readers inside the maple tree while a writer replaces its nodes."""

import pytest

from kmodel.core import BUG_ON, CoopEngine, KernelBug, boot, rcu_dereference, smp_cond_load_acquire, variables
from kmodel.mm import maple_walk
from kmodel.mm.maple_node import SLOT, MapleTree, mt_offset
from kmodel.mm.maple_tree import check_invariants, mt_for_each, mtree_store_range
from kmodel.mm.maple_walk import MaState, mas_next, mtree_load
from kmodel.rcu import rcu_barrier, rcu_read_lock, rcu_read_unlock

SEEDS = range(25)

# One writer's stores. Entries carry their range, as VMAs do, so that a reader can check that one covers its
# index.
STORES = [
    (4, 5, True),
    (0, 1, False),
    (20, 33, True),
    (6, 25, False),
    (24, 31, True),
    (10, 11, True),
    (0, 40, True),
]


class Shared:
    """A small deep tree, and the history of what it held."""

    def __init__(self):
        boot()
        self.mt = MapleTree(leaf_slots=4, arange_slots=4)
        self.history = [[None] * 41]
        self.started = 0
        self.done = 0
        for i in range(0, 40, 4):
            self.store(i, i + 3, True)
        self.started = self.done = len(self.history) - 1

    def store(self, first, last, entry):
        after = list(self.history[-1])
        value = (first, last, len(self.history)) if entry else None
        after[first : last + 1] = [value] * (last - first + 1)
        self.history.append(after)
        self.started += 1
        mtree_store_range(self.mt, first, last, value)
        self.done += 1


def writer(shared):
    for first, last, entry in STORES:
        shared.store(first, last, entry)


def splitting_writer(shared):
    """Only stores that replace nodes: the middle of a range, never a boundary."""
    for first in (5, 21, 37, 9, 33, 25):
        shared.store(first, first + 1, first % 8 == 1)


def reader_with(load, *, strict=False, indexes=(5, 21, 38, 9)):
    def reader(shared):
        for index in indexes:
            since = shared.done
            entry = load(shared.mt, index)
            seen = {shared.history[version][index] for version in range(since, shared.started + 1)}
            # W1, and W2: an entry that does not cover the index is what callers throw away.
            covers = strict or entry is None or entry[0] <= index <= entry[1]
            BUG_ON(covers and entry not in seen, f"index {index}: {entry} of {seen}")

    return reader


def final(shared):
    check_invariants(shared.mt)
    assert [mtree_load(shared.mt, i) for i in range(41)] == shared.history[-1]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lookup_sees_what_was_stored_at_some_moment(seed):
    """W1: whatever the interleaving, a lookup's answer was the truth between its begin and its end."""
    CoopEngine(seed).run(Shared, [writer, reader_with(mtree_load)], final)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lookup_beside_node_replacements_is_exact(seed):
    """W1 without W2: when no boundary moves in place, even an entry's range is right."""
    CoopEngine(seed).run(Shared, [splitting_writer, reader_with(mtree_load, strict=True)], final)


def load_without_dead_check(mt, index):
    """mtree_load without its dead-node check."""
    rcu_read_lock()
    try:
        node = rcu_dereference(mt, "ma_root")
        while node is not None:
            entry = rcu_dereference(node, SLOT[maple_walk.mt_offset(node, index)])
            if node.is_leaf:
                return entry
            node = entry
        return None
    finally:
        rcu_read_unlock()


def run_with_a_reader_caught_in_a_leaf(load, monkeypatch):
    """The reader has found its leaf; before it looks inside, the writer replaces it."""
    gate = variables(reached=0, replaced=0)

    def pausing_mt_offset(node, index):
        if node.is_leaf and not gate.reached:
            gate.reached = 1
            smp_cond_load_acquire(gate, "replaced", bool)
        return mt_offset(node, index)

    def replacing_writer(shared):
        smp_cond_load_acquire(gate, "reached", bool)
        shared.store(5, 6, True)
        gate.replaced = 1

    monkeypatch.setattr(maple_walk, "mt_offset", pausing_mt_offset)
    reader = reader_with(load, strict=True, indexes=(1,))
    CoopEngine(0).run(Shared, [replacing_writer, reader], final)
    assert gate.replaced


def test_a_reader_caught_in_a_dead_node_starts_again(monkeypatch):
    """H42: the node it reads is an rcu_head by now; the dead check sends it back to the root."""
    run_with_a_reader_caught_in_a_leaf(mtree_load, monkeypatch)


def test_without_the_dead_node_check_a_lookup_goes_astray(monkeypatch):
    """H42, the broken twin: the reader follows an rcu_head's words to another index's entry."""
    with pytest.raises(KernelBug, match="index 1"):
        run_with_a_reader_caught_in_a_leaf(load_without_dead_check, monkeypatch)


@pytest.mark.parametrize("seed", SEEDS)
def test_iteration_beside_a_writer_is_in_order(seed):
    """A reader that iterates never goes backwards and ends, whatever nodes die under it."""

    def reader(shared):
        mas = MaState(shared.mt)
        starts = []
        rcu_read_lock()
        while (entry := mas_next(mas, 40)) is not None:
            starts.append(mas.last)
            assert mas.index <= mas.last
            assert entry[2] <= shared.started
        rcu_read_unlock()
        assert starts == sorted(set(starts))

    CoopEngine(seed).run(Shared, [writer, reader], final)


def test_nodes_are_freed_only_after_their_readers():
    """N3 and RCU: a walk that holds a replaced node reads no poison until it ends."""

    def setup():
        shared = Shared()
        shared.mt.leaf_slots = 4
        return shared

    def slow_reader(shared):
        rcu_read_lock()
        first = list(mt_for_each(shared.mt))
        second = list(mt_for_each(shared.mt))
        rcu_read_unlock()
        assert first is not second

    def barrier(shared):
        writer(shared)
        rcu_barrier()

    for seed in range(8):
        CoopEngine(seed).run(setup, [slow_reader, barrier], final)
