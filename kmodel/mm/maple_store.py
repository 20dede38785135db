"""Storing into the maple tree while RCU readers walk it.

Models:      lib/maple_tree.c, mas_store, mas_wr_store_entry, mas_wr_slot_store, mas_wr_node_store,
             mas_wr_spanning_store, mas_erase, mas_update_gap (7.2, RCU mode)
Guards:      the tree's external lock, held for writing
Invariants:  S1 one store is one publication: readers see the tree before it or the tree after it, never half
             of it
             S2 two NULL ranges never touch, and no leaf but the last ends in one, so a gap never spans leaves
             S3 a store copies the nodes whose contents change, never more than a few per level
Leaves out:  docs/limits.d/mm.md: appending in place (RCU mode off), tuned split points, worst-case
             preallocation
Read next:   mm/maple_tree.py

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
from itertools import pairwise
from typing import Any, Final, cast

import attrs

from kmodel.core import (
    BUG_ON,
    lockdep_assert_held_write,
    rcu_assign_pointer,
    shared_int,
)
from kmodel.mm.maple_node import (
    GAP,
    PIVOT,
    SLOT,
    ULONG_MAX,
    Child,
    LeafItem,
    MapleNode,
    MapleTree,
    children,
    leaf_items,
    ma_free_rcu,
    max_gap,
    mt_free_one,
    mt_offset,
    mte_set_node_dead,
    new_arange,
    new_leaf,
)
from kmodel.mm.maple_walk import MaState, _range_walk, ma_active, mas_reset


@attrs.define(eq=False)
class _Level:
    """One step of a writer's way down: the node, the slot taken, and what the node and the slot cover."""

    node: MapleNode
    offset: int
    min: int
    max: int
    slot_min: int
    slot_max: int

    def entry(self, offset: int) -> Any:
        return getattr(self.node, SLOT[offset])

    def slot_end(self, offset: int) -> int:
        return getattr(self.node, PIVOT[offset]) if offset < self.node.ma_end else self.max

    def slot_start(self, offset: int) -> int:
        return getattr(self.node, PIVOT[offset - 1]) + 1 if offset else self.min


type _Path = list[_Level]  # from the root down to a leaf


def _wr_walk(mt: MapleTree, index: int) -> _Path:
    node: Any = mt.ma_root
    low, high = 0, ULONG_MAX
    path: _Path = []
    while True:
        offset = mt_offset(node, index)
        slot_low = getattr(node, PIVOT[offset - 1]) + 1 if offset else low
        slot_high = getattr(node, PIVOT[offset]) if offset < node.ma_end else high
        path.append(_Level(node, offset, low, high, slot_low, slot_high))
        if node.is_leaf:
            return path
        node, low, high = getattr(node, SLOT[offset]), slot_low, slot_high


@attrs.define(eq=False)
class StorePlan:
    """A store that is ready to be made."""

    target: Any  # the struct and field of the one pointer that publishes it, and the pointer
    field: str
    value: Any
    pivot: tuple[MapleNode, str, int] | None = None  # the second store of a boundary move
    path: _Path | None = None  # the way down whose noted gap sizes change, if they may
    level: int = 0
    gap: int | None = None  # the gap size of the published node, where it replaces one child
    fresh: list[MapleNode] = attrs.field(factory=list)
    dead: list[MapleNode] = attrs.field(factory=list)


class _OutOfMemory(Exception):
    pass


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
    except _OutOfMemory:
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
        leaf = _leaf(0, _overlay([(ULONG_MAX, None)], 0, first, last, entry), fresh)[1]
        return StorePlan(mt, "ma_root", leaf)
    left = _wr_walk(mt, first)
    right = left if last <= left[-1].slot_max else _wr_walk(mt, last)
    if entry is None:
        first, last, right = _extend_null(mt, first, last, left, right)
    if left[-1].node is right[-1].node:
        plan = _plan_in_place(left, first, last, entry)
        if plan is not None:
            return plan
    if right is left:
        right = [attrs.evolve(level) for level in left]
    return _plan_nodes(mt, left, right, first, last, entry, fresh)


def _extend_null(mt: MapleTree, first: int, last: int, left: _Path, right: _Path) -> tuple[int, int, _Path]:
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
        right = _wr_walk(mt, last)
    if last == right[-1].max and last != ULONG_MAX:
        right = _wr_walk(mt, last + 1)
        if right[-1].entry(0) is None:
            last = right[-1].slot_max
    return first, last, right


def _plan_in_place(path: _Path, first: int, last: int, entry: Any) -> StorePlan | None:
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


def _update_gap(path: _Path, level: int) -> None:
    """The gaps of path[level].node changed: bring the sizes noted above it up to date."""
    while level:
        below, above = path[level], path[level - 1]
        gap = max_gap(below.node, below.min, below.max)
        if getattr(above.node, GAP[above.offset]) == gap:
            return
        setattr(above.node, GAP[above.offset], gap)
        level -= 1


# ---------------------------------------------------------------------------------------- stores by new nodes


def _leaf(low: int, items: list[LeafItem], fresh: list[MapleNode]) -> Child:
    made = new_leaf(low, items)
    if made is None:
        raise _OutOfMemory
    fresh.append(made[1])
    return made


def _arange(members: list[Child], fresh: list[MapleNode]) -> Child:
    made = new_arange(members)
    if made is None:
        raise _OutOfMemory
    fresh.append(made[1])
    return made


def _overlay(items: list[LeafItem], low: int, first: int, last: int, entry: Any) -> list[LeafItem]:
    """`items`, which begin at `low`, with [first, last] replaced by `entry`."""
    result: list[LeafItem] = []
    stored = False
    for end, old in items:
        if low < first:
            result.append((min(end, first - 1), old))
        if not stored and end >= first:
            result.append((last, entry))
            stored = True
        if end > last:
            result.append((end, old))
        low = end + 1
    return result


def _plan_nodes(
    mt: MapleTree, left: _Path, right: _Path, first: int, last: int, entry: Any, fresh: list[MapleNode]
) -> StorePlan:
    """Replace the leaves of `left` and `right` and everything between them, bottom up (S1, S3)."""
    dead: list[MapleNode] = []
    _collect_between(left, right, dead)
    level = len(left) - 1
    lo, hi = left[level], right[level]
    items, low = leaf_items(lo.node, lo.max), lo.min
    dead.append(lo.node)
    if hi.node is not lo.node:
        items = [item for item in items if item[0] < first] + _tail(lo, first) + leaf_items(hi.node, hi.max)
        dead.append(hi.node)
    items = _overlay(items, low, first, last, entry)
    # Appending: nodes at the upper end of the tree are left full behind us, and may be small themselves.
    at_end = hi.max == ULONG_MAX
    if len(items) < _least(mt.leaf_slots) and not at_end:
        sibling, is_left = _take_sibling(left, right, level)
        if sibling is not None:
            more = leaf_items(sibling.node, sibling.max)
            items, low = (more + items, sibling.min) if is_left else (items + more, low)
            dead.append(sibling.node)
    made = [_leaf(start, part, fresh) for start, part in _split_leaf(items, low, mt.leaf_slots, at_end)]

    while level:
        level -= 1
        lo, hi = left[level], right[level]
        if len(made) == 1 and lo.node is hi.node and lo.offset == hi.offset:
            return StorePlan(
                lo.node, SLOT[lo.offset], made[0][1], path=left, level=level, gap=made[0][2], dead=dead
            )
        members = children(lo.node, lo.max)[: lo.offset] + made + children(hi.node, hi.max)[hi.offset + 1 :]
        dead.append(lo.node)
        if hi.node is not lo.node:
            dead.append(hi.node)
        if len(members) < _least(mt.arange_slots) and not at_end:
            sibling, is_left = _take_sibling(left, right, level)
            if sibling is not None:
                kin = children(sibling.node, sibling.max)
                members = kin + members if is_left else members + kin
                dead.append(sibling.node)
        made = [_arange(part, fresh) for part in _split(members, mt.arange_slots, at_end)]
    return StorePlan(mt, "ma_root", _new_root(mt, made, fresh, dead), dead=dead)


def _tail(level: _Level, first: int) -> list[LeafItem]:
    """The part of a leaf's range at its offset that lies before `first` (none if the store begins with the
    range).
    """
    return [(first - 1, level.entry(level.offset))] if level.slot_min < first else []


def _new_root(
    mt: MapleTree, made: list[Child], fresh: list[MapleNode], dead: list[MapleNode]
) -> MapleNode | None:
    """The nodes of the top level as a tree: one more level if there are several, fewer if the only one has
    one child.
    """
    while len(made) > 1:
        made = [_arange(part, fresh) for part in _split(made, mt.arange_slots)]
    root: Any = made[0][1]
    while not root.is_leaf and root.ma_end == 0:
        dead.append(root)  # never published; freed like the others
        root = root.slot0
    if root.is_leaf and root.ma_end == 0 and root.slot0 is None:
        dead.append(root)
        return None
    return cast("MapleNode", root)


def _collect_between(left: _Path, right: _Path, dead: list[MapleNode]) -> None:
    """Every node that lies wholly between two ways down: its ranges are overwritten, so it goes with all its
    children.
    """
    for lo, hi in zip(left[:-1], right[:-1], strict=True):
        if lo.node is hi.node:
            for offset in range(lo.offset + 1, hi.offset):
                _collect_subtree(lo.entry(offset), dead)
        else:
            for offset in range(lo.offset + 1, lo.node.ma_end + 1):
                _collect_subtree(lo.entry(offset), dead)
            for offset in range(hi.offset):
                _collect_subtree(hi.entry(offset), dead)


def _collect_subtree(node: MapleNode, dead: list[MapleNode]) -> None:
    dead.append(node)
    if not node.is_leaf:
        for offset in range(node.ma_end + 1):
            _collect_subtree(getattr(node, SLOT[offset]), dead)


# ------------------------------------------------------------------------------------------------ occupancy

_LEAST_SLOTS: Final = 2


def _least(slots: int) -> int:
    """With fewer members than this a node takes in a sibling (mt_min_slots)."""
    return max(_LEAST_SLOTS, slots // 2 - 1)


def _take_sibling(left: _Path, right: _Path, level: int) -> tuple[_Level | None, bool]:
    """Widen the write by a neighbour of the nodes at `level` that has the same parent: (its level, whether it
    is the left one).

    None if there is no such neighbour: the node stays small until a later store meets it.
    """
    if level == 0:
        return None, False
    parent = left[level - 1]
    if parent.offset > 0:
        parent.offset -= 1
        start, end = parent.slot_start(parent.offset), parent.slot_end(parent.offset)
        return _Level(parent.entry(parent.offset), 0, start, end, start, end), True
    parent = right[level - 1]
    if parent.offset < parent.node.ma_end:
        parent.offset += 1
        start, end = parent.slot_start(parent.offset), parent.slot_end(parent.offset)
        return _Level(parent.entry(parent.offset), 0, start, end, start, end), False
    return None, False


def _bounds(count: int, slots: int, packed: bool) -> list[int]:
    """Where to cut `count` members into as few nodes as hold them: evenly, or with all but the last full."""
    nodes = -(-count // slots)
    if packed:
        return [*range(0, count, slots), count]
    return [count * i // nodes for i in range(nodes + 1)]


def _split[T](members: list[T], slots: int, packed: bool = False) -> list[list[T]]:
    """Distribute over nodes."""
    return [members[a:b] for a, b in pairwise(_bounds(len(members), slots, packed))]


def _split_leaf(
    items: list[LeafItem], low: int, slots: int, packed: bool
) -> list[tuple[int, list[LeafItem]]]:
    """Distribute over leaves so that none but the last ends in NULL (S2); with each part, where it begins."""
    # One slot is kept free where a NULL range may be moved on to the next leaf.
    room = slots if len(items) <= slots else slots - 1
    cuts = _bounds(len(items), room, packed)
    for i in range(1, len(cuts) - 1):
        if items[cuts[i] - 1][1] is None:
            cuts[i] -= 1  # the NULL range goes to the next leaf; the range before it is not NULL
    starts = [low] + [items[cut - 1][0] + 1 for cut in cuts[1:-1]]
    return [(start, items[a:b]) for start, (a, b) in zip(starts, pairwise(cuts), strict=True)]
