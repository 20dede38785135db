"""Searching and adding by comparison, under the tree's lock or without it.

Models:      include/linux/rbtree.h: rb_find, rb_find_rcu, rb_find_first, rb_next_match, rb_find_add,
             rb_find_add_rcu, rb_add (7.2)
Guards:      rb_find_rcu: an RCU reader of the flavour that protects the nodes; all others: the tree's lock
Invariants:  D1 what rb_find_rcu returns has the key, D2 its None proves nothing while a writer may be active
             (H03)
Leaves out:  rb_add_cached and rb_find_add_cached
Read next:   uprobes/tree.py, which adds the seqcount that D2 asks for

Comparison functions have the kernel's arguments: `cmp(key, node)` for searches and `cmp(new_node, node)` for
adding, negative to go left, positive to go right, 0 for equal; `less(a, b)` for rb_add. They are called for
every level, so make them module-level functions.
"""

from collections.abc import Callable
from typing import Any

from kmodel.core import access
from kmodel.core.access import rcu_dereference
from kmodel.rcu.rbtree import RbNode, RbRoot, rb_insert_color, rb_link_node_rcu, rb_next

type Cmp[K] = Callable[[K, Any], int]


def rb_find_rcu[K](key: K, root: RbRoot, cmp: Cmp[K]) -> Any:
    """Some node with `key`, or None, which may be wrong while a writer rotates (D2): repeat the search if the
    seqcount moved.
    """
    if access._tracer is None:
        # Real threads: every load is single already and ordered by its address, so this is the plain search.
        return rb_find(key, root, cmp)
    node = rcu_dereference(root, "rb_node")
    while node is not None:
        c = cmp(key, node)
        if c < 0:
            node = rcu_dereference(node, "rb_left")
        elif c > 0:
            node = rcu_dereference(node, "rb_right")
        else:
            return node
    return None


def rb_find[K](key: K, root: RbRoot, cmp: Cmp[K]) -> Any:
    """Some node with `key`, or None. Needs the tree's lock."""
    node = root.rb_node
    while node is not None:
        c = cmp(key, node)
        if c < 0:
            node = node.rb_left
        elif c > 0:
            node = node.rb_right
        else:
            return node
    return None


def rb_find_first[K](key: K, root: RbRoot, cmp: Cmp[K]) -> Any:
    """The first node in order with `key`, or None. Needs the tree's lock."""
    node = root.rb_node
    match = None
    while node is not None:
        c = cmp(key, node)
        if c <= 0:
            if c == 0:
                match = node
            node = node.rb_left
        else:
            node = node.rb_right
    return match


def rb_next_match[K](key: K, node: RbNode, cmp: Cmp[K]) -> Any:
    """The node after `node` if it has `key` too, else None. Needs the tree's lock."""
    following = rb_next(node)
    if following is not None and cmp(key, following) != 0:
        return None
    return following


def rb_find_add_rcu(node: RbNode, root: RbRoot, cmp: Callable[[Any, Any], int]) -> Any:
    """Return the node that is equal to `node`, or add `node` where lockless readers may be searching and
    return None.

    Needs the tree's lock for writing. Everything that cmp reads in `node` must have been set before.
    """
    parent: Any = None
    link = "rb_node"
    at = root.rb_node
    while at is not None:
        parent = at
        c = cmp(node, parent)
        if c < 0:
            link = "rb_left"
            at = parent.rb_left
        elif c > 0:
            link = "rb_right"
            at = parent.rb_right
        else:
            return parent
    rb_link_node_rcu(node, parent, root, link)
    rb_insert_color(node, root)
    return None


rb_find_add = rb_find_add_rcu
"""Differs in the kernel only in how the link is stored; see rb_link_node."""


def rb_add(node: RbNode, root: RbRoot, less: Callable[[Any, Any], bool]) -> None:
    """Add `node` after all that are equal to it. Needs the tree's lock for writing."""
    parent: Any = None
    link = "rb_node"
    at = root.rb_node
    while at is not None:
        parent = at
        if less(node, parent):
            link = "rb_left"
            at = parent.rb_left
        else:
            link = "rb_right"
            at = parent.rb_right
    rb_link_node_rcu(node, parent, root, link)
    rb_insert_color(node, root)
