"""Red-black trees that may be searched without a lock while they are being changed.

Models:      include/linux/rbtree.h, lib/rbtree.c: rb_link_node_rcu, rb_insert_color, rb_erase, rb_next (7.2)
Guards:      writers: the owner's lock; searchers: that lock, or RCU plus the owner's seqcount for "not there"
Invariants:  B1 keys are in order, B2 no red node has a red child, B3 every path has as many black nodes, B4 a
             child's rb_parent is its parent, B5 child pointers never form a loop, at no instant, not even for
             a reader who stands at a removed node
Leaves out:  augmented and cached trees; parent and colour share a word in the kernel and are two fields here
Read next:   rcu/rbtree_find.py, the searches

What a lockless reader gets (B5): its descent ends, and every node it meets was in the tree at some time
during the descent. What it does not get: a rotation makes a whole subtree unreachable between two stores, so
"not found" may be wrong (H03). Only the writer's seqcount tells.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Final

from kmodel.core import guards
from kmodel.core.access import READ_ONCE, WRITE_ONCE, rcu_assign_pointer
from kmodel.core.struct import Pooled, kernel_struct, raw_get

RB_RED: Final = 0
RB_BLACK: Final = 1

_INIT_FIRST = guards.register(
    "rb-init-before-publish", "H05: a new node's links are set before readers can reach it"
)
_RELEASE = guards.register("rb-publish-release", "H05: linking a node is a store-release")
_DETACH_FIRST = guards.register(
    "rb-detach-first", "B5: a rotation cuts the old link before it makes the opposite one"
)


@kernel_struct
class RbNode(Pooled):
    """struct rb_node, to be embedded at offset zero: `class Uprobe(RbNode)`."""

    # write: the tree's lock; read: the tree's lock
    rb_parent: Any = None
    rb_color: int = RB_RED
    # write: the tree's lock, with WRITE_ONCE or release; read: that lock, or RCU
    rb_left: Any = None
    rb_right: Any = None


@kernel_struct
class RbRoot(Pooled):
    """struct rb_root. rb_node is guarded like a child pointer."""

    rb_node: Any = None


def RB_CLEAR_NODE(node: RbNode) -> None:
    """Mark `node` as being in no tree. Readers that still stand at it keep their way down."""
    node.rb_parent = node


def RB_EMPTY_NODE(node: RbNode) -> bool:
    """Whether RB_CLEAR_NODE was the last thing done to `node`."""
    return node.rb_parent is node


def RB_EMPTY_ROOT(root: RbRoot) -> bool:
    """Whether the tree is empty; may be asked without the lock."""
    return READ_ONCE(root, "rb_node") is None


# ------------------------------------------------------------------------------------------------ insertion


def rb_link_node_rcu(node: RbNode, parent: RbNode | None, root: RbRoot, link: str) -> None:
    """Hang `node` under `parent` (or at the root) and publish it. rb_insert_color must follow.

    `link` is "rb_left", "rb_right" or, for the root, "rb_node".
    """
    where: Any = root if parent is None else parent
    if _INIT_FIRST in guards.removed:
        WRITE_ONCE(where, link, node)
        rb_init_node(node, parent)
        return
    rb_init_node(node, parent)
    # RELEASE: pairs with rcu_dereference in rb_find_rcu; whoever finds the node finds its key and links too.
    if _RELEASE in guards.removed:
        WRITE_ONCE(where, link, node)
    else:
        rcu_assign_pointer(where, link, node)


rb_link_node = rb_link_node_rcu
"""The kernel's rb_link_node publishes with a plain store, for trees nobody searches without the lock; the
stronger one serves both.
"""


def rb_init_node(node: RbNode, parent: RbNode | None) -> None:
    """Make `node` a red leaf under `parent`."""
    node.rb_parent = parent
    node.rb_color = RB_RED
    node.rb_left = None
    node.rb_right = None


def _set_parent_color(node: RbNode, parent: RbNode | None, color: int) -> None:
    node.rb_parent = parent
    node.rb_color = color


def _change_child(old: RbNode, new: RbNode | None, parent: RbNode | None, root: RbRoot) -> None:
    """Let the link that held `old` hold `new`."""
    if parent is None:
        WRITE_ONCE(root, "rb_node", new)
    elif parent.rb_left is old:
        WRITE_ONCE(parent, "rb_left", new)
    else:
        WRITE_ONCE(parent, "rb_right", new)


def _lift(low: RbNode, high: RbNode, side: str, other: str) -> Any:
    """The two child stores of a rotation that lifts `low` above `high`, whose `side` child it is; return the
    subtree that moves over.

    The first store cuts high -> low, the second makes low -> high. The other way round both links would exist
    for a moment, and a reader whose key lies between the two would run in a circle (B5). As it is, `low` and
    what hangs under it cannot be reached from above until _replace() links it in: that is where false
    negatives come from (H03).
    """
    moved = getattr(low, other)
    if _DETACH_FIRST in guards.removed:
        WRITE_ONCE(low, other, high)
        WRITE_ONCE(high, side, moved)
    else:
        WRITE_ONCE(high, side, moved)
        WRITE_ONCE(low, other, high)
    return moved


def _replace(old: RbNode, new: RbNode, root: RbRoot, old_color: int) -> None:
    """End of a rotation: `new` takes the place and colour of `old`, which becomes its child
    with `old_color`.
    """
    parent = old.rb_parent
    _set_parent_color(new, parent, old.rb_color)
    _set_parent_color(old, new, old_color)
    _change_child(old, new, parent, root)


def rb_insert_color(node: RbNode, root: RbRoot) -> None:
    """Restore the colour rules after rb_link_node_rcu."""
    parent = node.rb_parent
    while True:
        if parent is None:  # the root is black
            _set_parent_color(node, None, RB_BLACK)
            return
        if parent.rb_color == RB_BLACK:
            return
        gparent = parent.rb_parent  # exists: a red node is not the root
        side, other = ("rb_left", "rb_right") if gparent.rb_right is not parent else ("rb_right", "rb_left")
        uncle = getattr(gparent, other)
        if uncle is not None and uncle.rb_color == RB_RED:
            # Two red children: push the grandparent's black down to them, go on from there. No link changes.
            _set_parent_color(uncle, gparent, RB_BLACK)
            _set_parent_color(parent, gparent, RB_BLACK)
            node = gparent
            parent = node.rb_parent
            _set_parent_color(node, parent, RB_RED)
            continue
        moved = getattr(parent, other)
        if moved is node:
            # An inner grandchild: turn it outwards. gparent's link is not updated, the next rotation does
            # that.
            moved = _lift(node, parent, other, side)
            if moved is not None:
                _set_parent_color(moved, parent, RB_BLACK)
            _set_parent_color(parent, node, RB_RED)
            parent = node
        moved = _lift(parent, gparent, side, other)
        if moved is not None:
            _set_parent_color(moved, gparent, RB_BLACK)
        _replace(gparent, parent, root, RB_RED)
        return


# ------------------------------------------------------------------------------------------------ removal


def rb_erase(node: RbNode, root: RbRoot) -> None:
    """Unlink `node`. Its own fields stay, so that a reader standing at it finds its way; reuse them only
    after a grace period.
    """
    left, right = node.rb_left, node.rb_right
    parent, color = node.rb_parent, node.rb_color
    short: Any = None  # the parent of a path that lost a black node
    if left is None:
        _change_child(node, right, parent, root)
        if right is not None:
            _set_parent_color(right, parent, color)  # red before, by B3: no path got shorter
        elif color == RB_BLACK:
            short = parent
    elif right is None:
        _set_parent_color(left, parent, color)
        _change_child(node, left, parent, root)
    else:
        short = _erase_inner(node, left, right, root)
    if short is not None:
        _erase_color(short, root)


def _erase_inner(node: RbNode, left: RbNode, right: RbNode, root: RbRoot) -> Any:
    """Let the successor take the place of `node`, which has two children; return the parent of a shortened
    path, if any.
    """
    successor: Any = right
    hole: Any
    if right.rb_left is None:
        hole = successor
        orphan = successor.rb_right
    else:
        while (below := successor.rb_left) is not None:
            hole, successor = successor, below
        orphan = successor.rb_right
        # Cut the successor out first (B5): from `right` one could walk down to it, and its new link leads to
        # `right`.
        WRITE_ONCE(hole, "rb_left", orphan)
        WRITE_ONCE(successor, "rb_right", right)
        right.rb_parent = successor
    WRITE_ONCE(successor, "rb_left", left)
    left.rb_parent = successor
    parent, color = node.rb_parent, node.rb_color
    # Both of its links are in place when it becomes reachable from above.
    _change_child(node, successor, parent, root)
    short = None
    if orphan is not None:
        _set_parent_color(orphan, hole, RB_BLACK)
    elif successor.rb_color == RB_BLACK:
        short = hole
    _set_parent_color(successor, parent, color)
    return short


def _erase_color(parent: Any, root: RbRoot) -> None:
    """Restore B3 below `parent`, one of whose sides lacks a black node."""
    node: Any = None  # the root of the short side; None at first, and then the sibling cannot be None
    while True:
        # The kernel compares with rb_right first: an empty short side may be either, its sibling is never
        # empty.
        side, other = ("rb_left", "rb_right") if parent.rb_right is not node else ("rb_right", "rb_left")
        sibling = getattr(parent, other)
        if sibling.rb_color == RB_RED:
            # Give the short side a black sibling.
            moved = _lift(sibling, parent, other, side)
            _set_parent_color(moved, parent, RB_BLACK)
            _replace(parent, sibling, root, RB_RED)
            sibling = moved
        far = getattr(sibling, other)
        if far is None or far.rb_color == RB_BLACK:
            near = getattr(sibling, side)
            if near is None or near.rb_color == RB_BLACK:
                # Take a black away from the other side too; a red parent makes up for both.
                _set_parent_color(sibling, parent, RB_RED)
                if parent.rb_color == RB_RED:
                    parent.rb_color = RB_BLACK
                    return
                node, parent = parent, parent.rb_parent
                if parent is None:
                    return
                continue
            # Turn the red nephew outwards.
            moved = _lift(near, sibling, side, other)
            WRITE_ONCE(parent, other, near)
            if moved is not None:
                _set_parent_color(moved, sibling, RB_BLACK)
            far, sibling = sibling, near
        moved = _lift(sibling, parent, other, side)
        _set_parent_color(far, sibling, RB_BLACK)
        if moved is not None:
            moved.rb_parent = parent
        _replace(parent, sibling, root, RB_BLACK)
        return


# ------------------------------------------------------------------------------------------------ order


def rb_first(root: RbRoot) -> Any:
    """The first node in order, or None. Needs the tree's lock."""
    node = root.rb_node
    while node is not None and node.rb_left is not None:
        node = node.rb_left
    return node


def rb_last(root: RbRoot) -> Any:
    """The last node in order, or None. Needs the tree's lock."""
    node = root.rb_node
    while node is not None and node.rb_right is not None:
        node = node.rb_right
    return node


def _neighbour(node: RbNode, side: str, other: str) -> Any:
    if RB_EMPTY_NODE(node):
        return None
    below = getattr(node, side)
    if below is not None:
        while (further := getattr(below, other)) is not None:
            below = further
        return below
    here: Any = node
    parent = here.rb_parent
    while parent is not None and getattr(parent, side) is here:
        here, parent = parent, parent.rb_parent
    return parent


def rb_next(node: RbNode) -> Any:
    """The node after `node`, or None. Needs the tree's lock."""
    return _neighbour(node, "rb_right", "rb_left")


def rb_prev(node: RbNode) -> Any:
    """The node before `node`, or None. Needs the tree's lock."""
    return _neighbour(node, "rb_left", "rb_right")


def rb_nodes(root: RbRoot) -> Iterator[Any]:
    """Every node in order. Needs the tree's lock."""
    node = rb_first(root)
    while node is not None:
        yield node
        node = rb_next(node)


# ------------------------------------------------------------------------------------------------ checking


def check_invariants(root: RbRoot, key: Callable[[Any], Any] | None = None) -> int:
    """Assert B1 (when `key` is given) to B4 on a quiet tree; return the number of nodes. The engine does not
    see the reads.
    """

    def walk(node: Any, parent: Any) -> tuple[list[Any], int]:
        if node is None:
            return [], 1
        assert raw_get(node, "rb_parent") is parent, f"B4: {node!r} is under {parent!r}"
        red = raw_get(node, "rb_color") == RB_RED
        assert not (red and (parent is None or raw_get(parent, "rb_color") == RB_RED)), f"B2: {node!r}"
        before, left_black = walk(raw_get(node, "rb_left"), node)
        after, right_black = walk(raw_get(node, "rb_right"), node)
        assert left_black == right_black, f"B3: {left_black} and {right_black} black nodes under {node!r}"
        return [*before, node, *after], left_black + (not red)

    nodes, _black = walk(raw_get(root, "rb_node"), None)
    if key is not None:
        keys = [key(node) for node in nodes]
        assert all(a <= b for a, b in pairwise(keys)), f"B1: {keys}"
    return len(nodes)
