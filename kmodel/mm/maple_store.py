"""Storing into the maple tree while RCU readers walk it.

Models:      lib/maple_tree.c, mas_store, mas_wr_store_entry, mas_wr_slot_store, mas_preallocate,
             mas_erase, mas_update_gap (7.2, RCU mode)
Guards:      the tree's external lock, held for writing
Invariants:  S1 one store is one publication: readers see the tree before it or the tree after it, never half
             of it
             S2 two NULL ranges never touch, and no leaf but the last ends in one, so a gap never spans leaves
             S3 a store copies the nodes whose contents change, never more than a few per level
Leaves out:  docs/limits.md: appending in place (RCU mode off), tuned split points, worst-case
             preallocation
Read next:   mm/maple_build.py for the third way, then mm/maple_tree.py

A store is planned first and carried out afterwards: planning allocates and fills every new node and may fail
(-ENOMEM, nothing changed); carrying it out cannot. mas_preallocate() is the planning alone, so that a caller
can put the point of no return between.

Three ways to store, cheapest first:
    exact fit      the range is exactly one slot's: replace the entry in place, one pointer
    boundary move  the range ends one slot and takes part of its neighbour: one pointer, one pivot, in place
    new nodes      build the changed leaf (or leaves) anew, and the nodes above for as long as their children
                   change in number; publish by one pointer in the lowest node that stays; mark what was
                   replaced dead; free it by RCU
"""

from errno import ENOMEM
from typing import Any

import attrs

from kmodel.core import (
    BUG_ON,
    lockdep_assert_held_write,
    rcu_assign_pointer,
    shared_int,
)
from kmodel.mm.maple_build import (
    MapleOutOfMemory,
    StorePlan,
    WrPath,
    build_leaf,
    overlay,
    plan_nodes,
    wr_walk,
)
from kmodel.mm.maple_node import (
    GAP,
    PIVOT,
    SLOT,
    ULONG_MAX,
    MapleNode,
    MapleTree,
    ma_free_rcu,
    max_gap,
    mt_free_one,
    mte_set_node_dead,
)
from kmodel.mm.maple_walk import MaState, _range_walk, ma_active, mas_reset

# ------------------------------------------------------------------------------------------------ the store


def mas_preallocate(mas: MaState, entry: Any) -> int:
    """Get ready to store `entry` to [mas.index, mas.last]: 0, or -ENOMEM with nothing changed. Writer lock
    held until the store.

    To be followed by mas_store_prealloc() for the same range, or mas_destroy().
    """
    mt = mas.tree
    if mt.ma_external_lock is not None:
        lockdep_assert_held_write(mt.ma_external_lock)
    BUG_ON(mas.plan is not None, "a store is prepared twice")
    BUG_ON(
        not 0 <= mas.index <= mas.last <= ULONG_MAX, f"store to the empty range {mas.index:#x}..{mas.last:#x}"
    )
    fresh: list[MapleNode] = []
    try:
        mas.plan = _plan_store(mt, mas.index, mas.last, entry, fresh)
    except MapleOutOfMemory:
        for node in fresh:
            mt_free_one(node)
        return -ENOMEM
    mas.plan.fresh = fresh
    return 0


def mas_store_prealloc(mas: MaState, entry: Any) -> None:
    """Make the store that mas_preallocate() prepared. Cannot fail."""
    BUG_ON(mas.plan is None, "a store was not prepared")
    plan: StorePlan = mas.plan
    mas.plan = None
    mas_reset(mas)
    # RELEASE: readers that find the new nodes see their contents. A boundary move is two stores: a reader
    # between them (or one that sees them the other way round) gets an entry that may not cover its index
    # (H43).
    rcu_assign_pointer(plan.target, plan.field, plan.value)
    if plan.pivot is not None:
        node, field, value = plan.pivot
        setattr(node, field, value)
    if plan.path is not None:
        if plan.gap is not None:
            level = plan.path[plan.level]
            if getattr(level.node, GAP[level.offset]) != plan.gap:
                setattr(level.node, GAP[level.offset], plan.gap)
                _update_gap(plan.path, plan.level)
        else:
            _update_gap(plan.path, plan.level)
    for node in plan.dead:
        mte_set_node_dead(node)
        ma_free_rcu(node)


def mas_destroy(mas: MaState) -> None:
    """Give up a prepared store, if there is one."""
    if mas.plan is not None:
        for node in mas.plan.fresh:
            mt_free_one(node)
        mas.plan = None


def mas_store_gfp(mas: MaState, entry: Any) -> int:
    """Make `entry` (None to clear) the value of [mas.index, mas.last], whatever was there: 0, or -ENOMEM with
    nothing changed.
    """
    error = mas_preallocate(mas, entry)
    if not error:
        mas_store_prealloc(mas, entry)
    return error


def mas_erase(mas: MaState) -> Any:
    """Clear the whole range that holds mas.index and return its entry, or None. Writer lock held.

    Nothing is reserved for it: the kernel waits for memory here, the model reports a bug.
    """
    entry = _range_walk(mas, mas.index)
    if entry is not None:
        BUG_ON(mas_store_gfp(mas, None), "out of memory in mas_erase")
    mas.status = ma_active
    return entry


def _plan_store(mt: MapleTree, first: int, last: int, entry: Any, fresh: list[MapleNode]) -> StorePlan:
    if mt.ma_root is None:
        if entry is None:
            return StorePlan(mt, "ma_root", None)
        leaf = build_leaf(0, overlay([(ULONG_MAX, None)], 0, first, last, entry), fresh)[1]
        return StorePlan(mt, "ma_root", leaf)
    left = wr_walk(mt, first)
    right = left if last <= left[-1].slot_max else wr_walk(mt, last)
    if entry is None:
        first, last, right = _extend_null(mt, first, last, left, right)
    if left[-1].node is right[-1].node:
        plan = _plan_in_place(left, first, last, entry)
        if plan is not None:
            return plan
    if right is left:
        right = [attrs.evolve(level) for level in left]
    return plan_nodes(mt, left, right, first, last, entry, fresh)


def _extend_null(
    mt: MapleTree, first: int, last: int, left: WrPath, right: WrPath
) -> tuple[int, int, WrPath]:
    """Let a NULL store swallow the NULL ranges it touches, and move the end of the write off a leaf's end
    (S2).
    """
    leaf = left[-1]
    if leaf.entry(leaf.offset) is None:
        first = leaf.slot_min
    elif first == leaf.slot_min and leaf.offset and leaf.entry(leaf.offset - 1) is None:
        first = leaf.slot_start(leaf.offset - 1)
        if right is left:
            right = [attrs.evolve(level) for level in left]
        leaf.offset, leaf.slot_min, leaf.slot_max = leaf.offset - 1, first, leaf.slot_min - 1
    leaf = right[-1]
    if leaf.entry(leaf.offset) is None:
        last = leaf.slot_max
    elif last == leaf.slot_max and leaf.offset < leaf.node.ma_end and leaf.entry(leaf.offset + 1) is None:
        last = leaf.slot_end(leaf.offset + 1)
        right = wr_walk(mt, last)
    if last == right[-1].max and last != ULONG_MAX:
        right = wr_walk(mt, last + 1)
        if right[-1].entry(0) is None:
            last = right[-1].slot_max
    return first, last, right


def _plan_in_place(path: WrPath, first: int, last: int, entry: Any) -> StorePlan | None:
    """An exact fit or a boundary move, if the store is one; the number of ranges must not change (N2)."""
    leaf = path[-1]
    node, offset = leaf.node, leaf.offset
    level = len(path) - 1
    if first == leaf.slot_min and last == leaf.slot_max:
        nulls = entry is None or leaf.entry(offset) is None
        return StorePlan(node, SLOT[offset], entry, path=path if nulls else None, level=level)
    if offset == node.ma_end or last <= leaf.slot_max:
        return None
    neighbour_max = leaf.slot_end(offset + 1)
    nulls = entry is None or leaf.entry(offset) is None or leaf.entry(offset + 1) is None
    if first == leaf.slot_min and last < neighbour_max:
        # All of this range and the beginning of the next. A reader between the two stores sees the new entry
        # in its old bounds.
        slot, pivot = SLOT[offset], (node, PIVOT[offset], shared_int(last))
    elif first > leaf.slot_min and last == neighbour_max:
        # The end of this range and all of the next.
        slot, pivot = SLOT[offset + 1], (node, PIVOT[offset], shared_int(first - 1))
    else:
        return None
    return StorePlan(node, slot, entry, pivot=pivot, path=path if nulls else None, level=level)


def _update_gap(path: WrPath, level: int) -> None:
    """The gaps of path[level].node changed: bring the sizes noted above it up to date."""
    while level:
        below, above = path[level], path[level - 1]
        gap = max_gap(below.node, below.min, below.max)
        if getattr(above.node, GAP[above.offset]) == gap:
            return
        setattr(above.node, GAP[above.offset], gap)
        level -= 1
