"""Walking the maple tree: lookups, iteration, gap search.

Models:      lib/maple_tree.c, mtree_load, mas_walk, mas_find, mas_next, mas_prev, mas_empty_area,
             mas_empty_area_rev (7.2)
Guards:      RCU, or the writers' lock; gap search: the writers' lock
Invariants:  W1 for one index a walk returns what was stored there at some moment during the walk
             W2 except across an in-place boundary store, whose entry may not cover the index: callers
             re-check their range
             W3 an iterator's node is good only inside the RCU section (or lock hold) that found it;
             mas_reset() after leaving it
Leaves out:  docs/limits.md: ascending by parent pointers (an iterator that leaves a leaf walks down from
             the root again)
Read next:   mm/maple_store.py
"""

from errno import EBUSY
from typing import Any, Final

import attrs

from kmodel.core import access, cpu_relax, guards, rcu_dereference, smp_rmb
from kmodel.mm.maple_node import (
    DEAD_CHECK,
    GAP,
    PIVOT,
    SLOT,
    ULONG_MAX,
    MapleNode,
    MapleTree,
    ma_dead_node,
    mt_offset,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

ma_start: Final = 0  # no walk yet: begin at index
ma_active: Final = 1  # at the range [index, last]
ma_pause: Final = 2  # the lock was dropped: go on behind last
ma_overflow: Final = 3  # ran into the upper limit
ma_underflow: Final = 4  # ran into the lower limit


@attrs.define(eq=False)
class MaState:
    """Where one task is in a tree (struct ma_state). Lives on its stack: private, not watched."""

    tree: MapleTree
    index: int = 0
    last: int = 0
    status: int = ma_start
    node: MapleNode | None = None
    offset: int = 0
    min: int = 0
    max: int = ULONG_MAX
    plan: Any = None  # a store that is prepared (mas_preallocate)


def mas_set_range(mas: MaState, start: int, last: int) -> None:
    """Point the state at [start, last], with no walk done."""
    mas.index = start
    mas.last = last
    mas.status = ma_start
    mas.node = None


def mas_set(mas: MaState, index: int) -> None:
    """Point the state at one index, with no walk done."""
    mas_set_range(mas, index, index)


def mas_reset(mas: MaState) -> None:
    """Forget the node (it may be stale); the next operation begins at mas.index."""
    mas.status = ma_start
    mas.node = None


def mas_pause(mas: MaState) -> None:
    """Forget the node; the next find or next goes on behind mas.last."""
    mas.status = ma_pause
    mas.node = None


# ------------------------------------------------------------------------------------------------ lookup


def _start_again() -> None:
    """Not in Linux: tells a traced engine that a turn is over. Without it a walk could read the old root for
    ever, which no hardware does.
    """
    if access._tracer is not None:
        cpu_relax()


def mtree_lookup_walk(mt: MapleTree, index: int) -> Any:
    """The entry at `index`, or None. RCU (or the lock) is held."""
    # With real threads every load is single and in order already; getattr saves the call that says so to a
    # traced engine, on each of the levels.
    traced = access._tracer is not None
    load = rcu_dereference if traced else getattr
    while True:
        node: Any = load(mt, "ma_root")
        if node is None:
            return None
        while True:
            entry = load(node, SLOT[mt_offset(node, index)])
            # ma_dead_node(), written out. RMB: pairs with WMB in mte_set_node_dead().
            if traced:
                smp_rmb()
            if node.parent is node and not (guards.any_removed and DEAD_CHECK in guards.removed):
                _start_again()
                break  # what we read may be an rcu_head's words: from the root again
            if node.is_leaf:
                return entry
            node = entry


def mtree_load(mt: MapleTree, index: int) -> Any:
    """The entry at `index`, or None. Takes RCU itself; keeping the entry alive is the caller's business."""
    rcu_read_lock()
    entry = mtree_lookup_walk(mt, index)
    rcu_read_unlock()
    return entry


def _range_walk(mas: MaState, index: int) -> Any:
    """Walk down to `index`; set the state to the range found and return its entry."""
    mt = mas.tree
    while True:
        node: Any = rcu_dereference(mt, "ma_root")
        low, high = 0, ULONG_MAX
        if node is None:
            mas.node, mas.offset, mas.min, mas.max = None, 0, low, high
            mas.index, mas.last = low, high
            return None
        while True:
            offset = mt_offset(node, index)
            slot_low = getattr(node, PIVOT[offset - 1]) + 1 if offset else low
            slot_high = getattr(node, PIVOT[offset]) if offset < node.ma_end else high
            entry = rcu_dereference(node, SLOT[offset])
            if ma_dead_node(node):
                _start_again()
                break
            if node.is_leaf:
                mas.node, mas.offset, mas.min, mas.max = node, offset, low, high
                mas.index, mas.last = slot_low, slot_high
                return entry
            node, low, high = entry, slot_low, slot_high


def mas_walk(mas: MaState) -> Any:
    """The entry at mas.index, or None; mas.index and mas.last become the ends of its range."""
    entry = _range_walk(mas, mas.index)
    mas.status = ma_active
    return entry


# ------------------------------------------------------------------------------------------------ iteration


def _next_slot(mas: MaState) -> Any:
    """Move to the range behind mas.last, which is below ULONG_MAX; return its entry."""
    node = mas.node
    index = mas.last + 1
    if node is not None and mas.offset < node.ma_end:
        offset = mas.offset + 1
        last = getattr(node, PIVOT[offset]) if offset < node.ma_end else mas.max
        entry = rcu_dereference(node, SLOT[offset])
        # A boundary store may have moved the range away from under us: then, too, walk again.
        if not ma_dead_node(node) and last >= index:
            mas.offset, mas.index, mas.last = offset, index, last
            return entry
    return _range_walk(mas, index)


def _prev_slot(mas: MaState) -> Any:
    """Move to the range before mas.index, which is above 0; return its entry."""
    node = mas.node
    last = mas.index - 1
    if node is not None and mas.offset > 0:
        offset = mas.offset - 1
        index = getattr(node, PIVOT[offset - 1]) + 1 if offset else mas.min
        entry = rcu_dereference(node, SLOT[offset])
        if not ma_dead_node(node) and index <= last:
            mas.offset, mas.index, mas.last = offset, index, last
            return entry
    return _range_walk(mas, last)


def mas_next(mas: MaState, limit: int = ULONG_MAX) -> Any:
    """The first entry behind the state's range that begins up to `limit`, or None (status ma_overflow)."""
    if mas.status == ma_start:
        mas_walk(mas)
    mas.status = ma_active
    while mas.last < limit:
        entry = _next_slot(mas)
        if entry is not None:
            return entry
    mas.status = ma_overflow
    return None


def mas_prev(mas: MaState, limit: int = 0) -> Any:
    """The last entry before the state's range that ends from `limit` on, or None (status ma_underflow)."""
    if mas.status == ma_start:
        mas_walk(mas)
    mas.status = ma_active
    while mas.index > limit:
        entry = _prev_slot(mas)
        if entry is not None:
            return entry
    mas.status = ma_underflow
    return None


def mas_find(mas: MaState, limit: int = ULONG_MAX) -> Any:
    """At first the entry at or behind mas.index, later the next one, up to `limit`; None at the end."""
    if mas.status == ma_pause:
        if mas.last >= limit:
            return None
        mas.index = mas.last = mas.last + 1
        mas.status = ma_start
    if mas.status == ma_start:
        if mas.index > limit:
            return None
        entry = mas_walk(mas)
        if entry is not None:
            return entry
    return mas_next(mas, limit)


def mt_find(mt: MapleTree, index: int, limit: int = ULONG_MAX) -> Any:
    """The first entry at or behind `index`, up to `limit`. Takes RCU itself."""
    mas = MaState(mt, index, index)
    rcu_read_lock()
    entry = mas_find(mas, limit)
    rcu_read_unlock()
    return entry


# ------------------------------------------------------------------------------------------------ gaps


def mas_empty_area_rev(mas: MaState, low: int, high: int, size: int) -> int:
    """Set the state to the highest `size` free indexes within [low, high]; 0 or -EBUSY. The lock is held."""
    node = mas.tree.ma_root
    found = (low, high) if node is None and high - low + 1 >= size else None
    if node is not None and low <= high:
        found = _gap_rev(node, 0, ULONG_MAX, low, high, size)
    if found is None:
        return -EBUSY
    mas_set_range(mas, found[1] - size + 1, found[1])
    return 0


def mas_empty_area(mas: MaState, low: int, high: int, size: int) -> int:
    """Set the state to the lowest `size` free indexes within [low, high]; 0 or -EBUSY. The lock is held."""
    node = mas.tree.ma_root
    found = (low, high) if node is None and high - low + 1 >= size else None
    if node is not None and low <= high:
        found = _gap(node, 0, ULONG_MAX, low, high, size)
    if found is None:
        return -EBUSY
    mas_set_range(mas, found[0], found[0] + size - 1)
    return 0


def _slot_range(node: MapleNode, offset: int, node_min: int, node_max: int) -> tuple[int, int]:
    low = getattr(node, PIVOT[offset - 1]) + 1 if offset else node_min
    return low, (getattr(node, PIVOT[offset]) if offset < node.ma_end else node_max)


def _gap_rev(
    node: MapleNode, node_min: int, node_max: int, low: int, high: int, size: int
) -> tuple[int, int] | None:
    """The highest free part of [low, high] below `node` that is at least `size` long.

    The gap sizes of the children prune all but the two paths along low and high, where a large gap may be cut
    short.
    """
    for offset in range(mt_offset(node, high), -1, -1):
        slot_low, slot_high = _slot_range(node, offset, node_min, node_max)
        if slot_high < low:
            return None
        if node.is_leaf:
            if getattr(node, SLOT[offset]) is None:
                part = max(slot_low, low), min(slot_high, high)
                if part[1] - part[0] + 1 >= size:
                    return part
        elif getattr(node, GAP[offset]) >= size:
            found = _gap_rev(getattr(node, SLOT[offset]), slot_low, slot_high, low, high, size)
            if found is not None:
                return found
    return None


def _gap(
    node: MapleNode, node_min: int, node_max: int, low: int, high: int, size: int
) -> tuple[int, int] | None:
    """The lowest free part of [low, high] below `node` that is at least `size` long."""
    for offset in range(mt_offset(node, low), node.ma_end + 1):
        slot_low, slot_high = _slot_range(node, offset, node_min, node_max)
        if slot_low > high:
            return None
        if node.is_leaf:
            if getattr(node, SLOT[offset]) is None:
                part = max(slot_low, low), min(slot_high, high)
                if part[1] - part[0] + 1 >= size:
                    return part
        elif getattr(node, GAP[offset]) >= size:
            found = _gap(getattr(node, SLOT[offset]), slot_low, slot_high, low, high, size)
            if found is not None:
                return found
    return None
