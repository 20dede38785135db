"""The maple tree's calls that need no ma_state, and its self-check.

Models:      include/linux/maple_tree.h, mtree_store_range, mtree_erase, mt_for_each, __mt_destroy,
             mt_validate (7.2)
Guards:      stores: the tree's external lock; loads: RCU, taken inside
Invariants:  those of mm/maple_node.py (N), mm/maple_walk.py (W) and mm/maple_store.py (S)
Leaves out:  docs/limits.md
Read next:   mm/vma.py, what is stored in it
"""

from collections.abc import Iterator
from typing import Any

from kmodel.core import BUG_ON, rcu_assign_pointer
from kmodel.mm.maple_build import collect_subtree
from kmodel.mm.maple_node import (
    GAP,
    PIVOT,
    SLOT,
    ULONG_MAX,
    MapleNode,
    MapleTree,
    ma_free_rcu,
    mte_set_node_dead,
)
from kmodel.mm.maple_store import mas_erase, mas_store_gfp
from kmodel.mm.maple_walk import MaState, mas_find
from kmodel.rcu import rcu_read_lock, rcu_read_unlock


def mtree_store_range(mt: MapleTree, first: int, last: int, entry: Any) -> int:
    """Make `entry` the value of [first, last]: 0 or -ENOMEM."""
    return mas_store_gfp(MaState(mt, first, last), entry)


def mtree_erase(mt: MapleTree, index: int) -> Any:
    """Clear the whole range that holds `index`; return its entry."""
    return mas_erase(MaState(mt, index, index))


def mt_for_each(mt: MapleTree, first: int = 0, last: int = ULONG_MAX) -> Iterator[tuple[int, int, Any]]:
    """(first, last, entry) of every range with an entry that begins at or below `last`, in order.

    For holders of the lock, or for readers that accept that the tree changes between two ranges.
    """
    mas = MaState(mt, first, first)
    while True:
        rcu_read_lock()
        entry = mas_find(mas, last)
        rcu_read_unlock()
        if entry is None:
            return
        yield mas.index, mas.last, entry
        mas.node = None  # stale: we left the RCU section


def mt_empty(mt: MapleTree) -> bool:
    """Whether nothing is stored."""
    return mt.ma_root is None


def __mt_destroy(mt: MapleTree) -> None:
    """Drop every node; the entries are the caller's business. Writer lock held, or nobody else left."""
    root = mt.ma_root
    if root is None:
        return
    nodes: list[MapleNode] = []
    collect_subtree(root, nodes)
    rcu_assign_pointer(mt, "ma_root", None)
    for node in nodes:
        mte_set_node_dead(node)
        ma_free_rcu(node)


mt_destroy = __mt_destroy


# ------------------------------------------------------------------------------------------------ self-check


def check_invariants(mt: MapleTree) -> int:
    """Walk the whole tree and check N1, N3, S2, the gap sizes and that all leaves are equally deep; return
    its height.

    Writer lock held, or nobody else about.
    """
    root = mt.ma_root
    if root is None:
        return 0
    height, _ = _check(mt, root, 0, ULONG_MAX)
    return height


def _check(mt: MapleTree, node: MapleNode, low: int, high: int) -> tuple[int, int]:
    """(height, largest gap) of the part of the tree below `node`."""
    where = f"in {node!r} [{low:#x}, {high:#x}]"
    slots = mt.leaf_slots if node.is_leaf else mt.arange_slots
    BUG_ON(node.parent is not None, f"N3: a dead node is linked {where}")
    BUG_ON(node.ma_end >= slots, f"N1: {node.ma_end + 1} of {slots} slots in use {where}")
    heights, largest, start, null_before = set(), 0, low, False
    for offset in range(node.ma_end + 1):
        end = getattr(node, PIVOT[offset]) if offset < node.ma_end else high
        BUG_ON(not start <= end <= high, f"N1: pivot {offset} is {end:#x} {where}")
        entry = getattr(node, SLOT[offset])
        if node.is_leaf:
            BUG_ON(entry is None and null_before, f"S2: two NULL ranges touch at {start:#x} {where}")
            null_before = entry is None
            heights.add(0)
            gap = end - start + 1 if entry is None else 0
        else:
            BUG_ON(entry is None, f"N1: no child at slot {offset} {where}")
            height, gap = _check(mt, entry, start, end)
            heights.add(height)
            BUG_ON(
                gap != getattr(node, GAP[offset]), f"gap {getattr(node, GAP[offset])}, really {gap} {where}"
            )
        largest = max(largest, gap)
        start = end + 1
    BUG_ON(start != high + 1, f"N1: ranges end at {start - 1:#x} {where}")
    BUG_ON(node.is_leaf and null_before and high != ULONG_MAX, f"S2: the leaf ends in NULL {where}")
    for offset in range(node.ma_end, len(PIVOT)):
        BUG_ON(getattr(node, PIVOT[offset]) != ULONG_MAX, f"N1: pivot {offset} behind the end {where}")
    BUG_ON(len(heights) != 1, f"leaves at different depths {where}")
    return heights.pop() + 1, largest
