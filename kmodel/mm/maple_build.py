"""Building the nodes of a store: what a write that changes the number of ranges replaces, and by what.

Models:      lib/maple_tree.c, mas_wr_node_store, mas_wr_spanning_store, mas_wr_split, mas_wr_rebalance (7.2)
Guards:      the tree's external lock, held for writing; nothing built here is visible yet
Invariants:  S2 and S3 of mm/maple_store.py
             B1 all leaves are equally deep; B2 a node that is not at the tree's upper end has few slots only
             if it had no neighbour with the same parent to be joined with
Leaves out:  docs/limits.md: the kernel's split points and big nodes
Read next:   mm/maple_store.py, which publishes the result
"""

from itertools import pairwise
from typing import Any, Final, cast

import attrs

from kmodel.mm.maple_node import (
    PIVOT,
    SLOT,
    ULONG_MAX,
    Child,
    LeafItem,
    MapleNode,
    MapleTree,
    children,
    leaf_items,
    mt_offset,
    new_arange,
    new_leaf,
)


@attrs.define(eq=False)
class WrLevel:
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


type WrPath = list[WrLevel]  # from the root down to a leaf


def wr_walk(mt: MapleTree, index: int) -> WrPath:
    """A writer's way down to `index`."""
    node: Any = mt.ma_root
    low, high = 0, ULONG_MAX
    path: WrPath = []
    while True:
        offset = mt_offset(node, index)
        slot_low = getattr(node, PIVOT[offset - 1]) + 1 if offset else low
        slot_high = getattr(node, PIVOT[offset]) if offset < node.ma_end else high
        path.append(WrLevel(node, offset, low, high, slot_low, slot_high))
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
    path: WrPath | None = None  # the way down whose noted gap sizes change, if they may
    level: int = 0
    gap: int | None = None  # the gap size of the published node, where it replaces one child
    fresh: list[MapleNode] = attrs.field(factory=list)
    dead: list[MapleNode] = attrs.field(factory=list)


class MapleOutOfMemory(Exception):
    """A node was not to be had; what was built so far is in the caller's list."""


def build_leaf(low: int, items: list[LeafItem], fresh: list[MapleNode]) -> Child:
    """A leaf, noted in `fresh`."""
    made = new_leaf(low, items)
    if made is None:
        raise MapleOutOfMemory
    fresh.append(made[1])
    return made


def _arange(members: list[Child], fresh: list[MapleNode]) -> Child:
    made = new_arange(members)
    if made is None:
        raise MapleOutOfMemory
    fresh.append(made[1])
    return made


def overlay(items: list[LeafItem], low: int, first: int, last: int, entry: Any) -> list[LeafItem]:
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


def plan_nodes(
    mt: MapleTree, left: WrPath, right: WrPath, first: int, last: int, entry: Any, fresh: list[MapleNode]
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
    items = overlay(items, low, first, last, entry)
    # Appending: nodes at the upper end of the tree are left full behind us, and may be small themselves.
    at_end = hi.max == ULONG_MAX
    if len(items) < _least(mt.leaf_slots) and not at_end:
        sibling, is_left = _take_sibling(left, right, level)
        if sibling is not None:
            more = leaf_items(sibling.node, sibling.max)
            items, low = (more + items, sibling.min) if is_left else (items + more, low)
            dead.append(sibling.node)
    made = [build_leaf(start, part, fresh) for start, part in _split_leaf(items, low, mt.leaf_slots, at_end)]

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


def _tail(level: WrLevel, first: int) -> list[LeafItem]:
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


def _collect_between(left: WrPath, right: WrPath, dead: list[MapleNode]) -> None:
    """Every node that lies wholly between two ways down: its ranges are overwritten, so it goes with all its
    children.
    """
    for lo, hi in zip(left[:-1], right[:-1], strict=True):
        if lo.node is hi.node:
            for offset in range(lo.offset + 1, hi.offset):
                collect_subtree(lo.entry(offset), dead)
        else:
            for offset in range(lo.offset + 1, lo.node.ma_end + 1):
                collect_subtree(lo.entry(offset), dead)
            for offset in range(hi.offset):
                collect_subtree(hi.entry(offset), dead)


def collect_subtree(node: MapleNode, dead: list[MapleNode]) -> None:
    """The node and all below it."""
    dead.append(node)
    if not node.is_leaf:
        for offset in range(node.ma_end + 1):
            collect_subtree(getattr(node, SLOT[offset]), dead)


# ------------------------------------------------------------------------------------------------ occupancy

_LEAST_SLOTS: Final = 2


def _least(slots: int) -> int:
    """With fewer members than this a node takes in a sibling (mt_min_slots)."""
    return max(_LEAST_SLOTS, slots // 2 - 1)


def _take_sibling(left: WrPath, right: WrPath, level: int) -> tuple[WrLevel | None, bool]:
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
        return WrLevel(parent.entry(parent.offset), 0, start, end, start, end), True
    parent = right[level - 1]
    if parent.offset < parent.node.ma_end:
        parent.offset += 1
        start, end = parent.slot_start(parent.offset), parent.slot_end(parent.offset)
        return WrLevel(parent.entry(parent.offset), 0, start, end, start, end), False
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
