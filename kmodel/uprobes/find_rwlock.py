"""A variant: look the uprobe up under the tree's lock, of whichever kind, and leave with a reference.

Models:      kernel/events/uprobes.c, find_uprobe, before it was made lockless (6.10); called in
             find_active_uprobe
Guards:      uprobes_treelock for reading (treelock.py)
Invariants:  none of its own
Leaves out:  with ref_count.py the reference the tree itself held then (ref_tree.py has it): the tree may hold
             dying uprobes, hence try_get here
Read next:   uprobes/find_refcount.py, the first attempt without the lock
"""

from typing import Any

from kmodel.rcu import rb_find
from kmodel.uprobes import references, tree, treelock
from kmodel.uprobes.tree import uprobe_cmp_key
from kmodel.uprobes.uprobe import Uprobe


def find_uprobe(inode: Any, offset: int) -> Uprobe | None:
    """The uprobe at (inode, offset) with a reference for the caller, or None."""
    lock = treelock.implementation
    lock.read_lock(tree.uprobes_treelock)
    uprobe: Uprobe | None = rb_find((inode, offset), tree.uprobes_tree, uprobe_cmp_key)
    if uprobe is not None and not references.implementation.try_get(uprobe):
        uprobe = None
    lock.read_unlock(tree.uprobes_treelock)
    return uprobe
