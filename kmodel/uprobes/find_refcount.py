"""A variant: look the uprobe up without the tree's lock, and leave with a reference.

Models:      "[PATCH 04/10] perf/uprobe: RCU-ify find_uprobe()" (July 2024), with the review's correction; it
             was never merged so
Guards:      a reader section around the descent and the increment; uprobes_seqcount for misses
Invariants:  U1 ref never goes from 0 to 1
Leaves out:  the patch used RCU and call_rcu(); here the section is RCU tasks trace, because that is what
             today's free chain waits for
Read next:   uprobes/lookup.py, where the question went away: no reference is taken at all

What the review found (H01): the descent may find a uprobe whose last reference goes at this moment. A plain
increment takes it from 0 to 1, its free is queued already, and the caller plays with soon to be freed memory.
The seqcount is no help: found is found.
"""

from typing import Any

from kmodel.core import current, guards
from kmodel.rcu import rb_find_rcu
from kmodel.sync import read_seqcount_begin, read_seqcount_retry, refcount_inc
from kmodel.uprobes import protection, references, tree
from kmodel.uprobes.tree import uprobe_cmp_key
from kmodel.uprobes.uprobe import Uprobe

guards.register("plain-get", "H01: a lookup revives a uprobe whose free is queued already")


def find_uprobe(inode: Any, offset: int) -> Uprobe | None:
    """The uprobe at (inode, offset) with a reference for the caller, or None if there is none or only a dying
    one.
    """
    task = current()
    token = protection.implementation.read_lock(task)
    try:
        while True:
            seq = read_seqcount_begin(tree.uprobes_seqcount)
            uprobe: Uprobe | None = rb_find_rcu((inode, offset), tree.uprobes_tree, uprobe_cmp_key)
            if uprobe is not None:
                if "plain-get" in guards.removed:
                    refcount_inc(uprobe, "ref")
                    return uprobe
                return uprobe if references.implementation.try_get(uprobe) else None
            if not read_seqcount_retry(tree.uprobes_seqcount, seq):
                return None
    finally:
        protection.implementation.read_unlock(task, token)
