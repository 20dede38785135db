"""A variant: look the uprobe up under the tree's lock, and leave with a reference.

Models:      kernel/events/uprobes.c, find_uprobe, before it was made lockless (6.10); called in
             find_active_uprobe
Guards:      uprobes_treelock for reading
Invariants:  none of its own
Leaves out:  the reference the tree itself held then; the tree of today may hold dying uprobes, hence
             inc-not-zero here
Read next:   uprobes/find_refcount.py, the first attempt without the lock
"""

from typing import Any

from kmodel.rcu import rb_find
from kmodel.sync import read_lock, read_unlock, refcount_inc_not_zero
from kmodel.uprobes import tree
from kmodel.uprobes.tree import uprobe_cmp_key
from kmodel.uprobes.uprobe import Uprobe


def find_uprobe(inode: Any, offset: int) -> Uprobe | None:
    """The uprobe at (inode, offset) with a reference for the caller, or None."""
    read_lock(tree.uprobes_treelock)
    uprobe: Uprobe | None = rb_find((inode, offset), tree.uprobes_tree, uprobe_cmp_key)
    if uprobe is not None and not refcount_inc_not_zero(uprobe, "ref"):
        uprobe = None
    read_unlock(tree.uprobes_treelock)
    return uprobe
