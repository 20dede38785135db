"""uprobes_tree: from (inode, offset) to the uprobe, walked without locks.

Models:      kernel/events/uprobes.c, find_uprobe_rcu, __insert_uprobe, find_node_in_range (7.2)
Guards:      uprobes_treelock for every change and for walks over ranges; uprobes_seqcount says to lockless
             descents that one was made
Invariants:  R1 a key is in the tree once, R2 what a descent finds is right at once, R3 what it does not find
             is right only if uprobes_seqcount did not move, R4 a uprobe found may be dying (ref 0) but is
             readable until the reader ends
Leaves out:  the variants the threads argued over are in uprobes/find_refcount.py, uprobes/find_rwlock.py and,
             for the lock, uprobes/treelock.py
Read next:   rcu/rbtree.py for why a descent may miss, uprobes/lookup.py for the user

The keys are the inode's address and the byte offset in the file. The inode is never followed here: the lookup
that calls may hold a pointer that it read from a recycled struct file.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from kmodel.core import guards, initcall, ptr
from kmodel.rcu import (
    RB_CLEAR_NODE,
    RB_EMPTY_NODE,
    RB_EMPTY_ROOT,
    RbRoot,
    rb_erase,
    rb_find_add_rcu,
    rb_find_rcu,
    rb_next,
    rb_nodes,
    rb_prev,
)
from kmodel.rcu.rbtree import check_invariants as check_rbtree
from kmodel.sync import (
    SeqcountRwlock,
    read_seqcount_begin,
    read_seqcount_retry,
    refcount_inc,
    write_seqcount_begin,
    write_seqcount_end,
)
from kmodel.uprobes import references, treelock
from kmodel.uprobes.uprobe import Uprobe

guards.register(
    "no-seqcount-retry", "H03, H04: a descent that a rotation led astray is believed, and a probe is missed"
)
guards.register(
    "no-dead-twin", "H06: a dying uprobe of the same key is taken as alive, and its refcount rises from 0"
)

observer: Callable[[Uprobe], None] | None = None
"""For oracles: called with every dying uprobe that an insertion met and took out of the tree."""

uprobes_tree: RbRoot
uprobes_treelock: Any
uprobes_seqcount: SeqcountRwlock


@initcall
def uprobes_tree_init() -> None:
    """Start with no uprobe at all."""
    global uprobes_tree, uprobes_treelock, uprobes_seqcount
    uprobes_tree = RbRoot()
    uprobes_treelock = treelock.implementation.make()
    uprobes_seqcount = SeqcountRwlock(lock=uprobes_treelock)


def no_uprobe_events() -> bool:
    """Whether no uprobe exists. Lockless and therefore only a hint: mm hooks that see it pair with register's
    scan (H49).
    """
    return RB_EMPTY_ROOT(uprobes_tree)


# -------------------------------------------------------------------------- order of the keys


def uprobe_cmp_key(key: tuple[Any, int], b: Uprobe) -> int:
    """Which comes first, for searching (__uprobe_cmp_key). Runs for every level of every hit."""
    inode, offset = key  # those of b are constant while readers can see it, so plain reads do
    b_inode = b.inode
    if inode is not b_inode:
        return -1 if ptr(inode) < ptr(b_inode) else 1
    b_offset = b.offset
    if offset == b_offset:
        return 0
    return -1 if offset < b_offset else 1


def uprobe_cmp(a: Uprobe, b: Uprobe) -> int:
    """Which comes first, for adding (__uprobe_cmp)."""
    return uprobe_cmp_key((a.inode, a.offset), b)


# -------------------------------------------------------------------------- lockless lookup


def find_uprobe_rcu(inode: Any, offset: int) -> Uprobe | None:
    """The uprobe at (inode, offset), without taking a reference. The caller is an RCU tasks trace reader.

    `inode` may be any pointer, also a stale one or NULL: it is compared, not followed.
    """
    key = (inode, offset)
    while True:
        # ACQUIRE, spins while odd: pairs with write_seqcount_begin/end in insert_uprobe and
        # uprobe_free_deferred
        seq = read_seqcount_begin(uprobes_seqcount)
        node: Uprobe | None = rb_find_rcu(key, uprobes_tree, uprobe_cmp_key)
        # Found is found: keys do not change while readers can see the node, and a rotation invents nothing
        # (R2).
        if node is not None:
            return node
        # Not found may be a rotation's doing: believe it only if no writer was about (R3).
        if not read_seqcount_retry(uprobes_seqcount, seq):
            return None
        if "no-seqcount-retry" in guards.removed:
            return None


# -------------------------------------------------------------------------- changes


def uprobe_is_active(uprobe: Uprobe) -> bool:
    """Whether the uprobe is in the tree. Needs uprobes_treelock, or an answer that may be stale has to do."""
    return not RB_EMPTY_NODE(uprobe)


def __insert_uprobe(uprobe: Uprobe) -> Uprobe:
    """Insert, or find who is there and take a reference on it. Needs uprobes_treelock held for writing.

    A uprobe found with ref 0 is on its way out (its deferred free waits for the lock we hold): it cannot be
    revived, so it is taken out here in its place. RB_CLEAR_NODE tells uprobe_free_deferred that this was done
    (H07).
    """
    while True:
        found: Uprobe | None = rb_find_add_rcu(uprobe, uprobes_tree, uprobe_cmp)
        if found is None:
            return uprobe
        if "no-dead-twin" in guards.removed:
            refcount_inc(found, "ref")
            return found
        if references.implementation.try_get(found):
            return found
        rb_erase(found, uprobes_tree)
        RB_CLEAR_NODE(found)
        if observer is not None:
            observer(found)


def insert_uprobe(uprobe: Uprobe) -> Uprobe:
    """Put a new uprobe into the tree; return it, or with a reference the live one that has the same key."""
    return insert_uprobes([uprobe])[0]


def insert_uprobes(new: Sequence[Uprobe]) -> list[Uprobe]:
    """insert_uprobe() for each, in one hold of the lock."""
    treelock.implementation.write_lock(uprobes_treelock)
    write_seqcount_begin(uprobes_seqcount)
    found = [__insert_uprobe(uprobe) for uprobe in new]
    write_seqcount_end(uprobes_seqcount)
    treelock.implementation.write_unlock(uprobes_treelock)
    return found


# -------------------------------------------------------------------------- ranges, under the lock


def find_node_in_range(inode: Any, low: int, high: int) -> Uprobe | None:
    """Any uprobe of `inode` with low <= offset <= high. Needs uprobes_treelock."""
    node: Uprobe | None = uprobes_tree.rb_node
    while node is not None:
        if inode is not node.inode:
            node = node.rb_left if ptr(inode) < ptr(node.inode) else node.rb_right
        elif high < node.offset:
            node = node.rb_left
        elif low > node.offset:
            node = node.rb_right
        else:
            break
    return node


def build_probe_list(inode: Any, low: int, high: int) -> list[Uprobe]:
    """Every live uprobe of `inode` with low <= offset <= high, each with a reference; dying ones are
    skipped.
    """
    probes: list[Uprobe] = []
    treelock.implementation.read_lock(uprobes_treelock)
    start = find_node_in_range(inode, low, high)
    node = start
    while node is not None and node.inode is inode and node.offset >= low:
        if references.implementation.try_get(node):
            probes.append(node)
        node = rb_prev(node)
    node = rb_next(start) if start is not None else None
    while node is not None and node.inode is inode and node.offset <= high:
        if references.implementation.try_get(node):
            probes.append(node)
        node = rb_next(node)
    treelock.implementation.read_unlock(uprobes_treelock)
    return probes


def range_has_uprobes(inode: Any, low: int, high: int) -> bool:
    """Whether any uprobe of `inode`, live or dying, has low <= offset <= high."""
    treelock.implementation.read_lock(uprobes_treelock)
    found = find_node_in_range(inode, low, high)
    treelock.implementation.read_unlock(uprobes_treelock)
    return found is not None


# -------------------------------------------------------------------------- for tests


def uprobes() -> list[Uprobe]:
    """Every uprobe in the tree, in the order of the keys. Needs the treelock, or that nothing runs."""
    return list(rb_nodes(uprobes_tree))


def check_invariants() -> None:
    """Assert R1 and the rules of red-black trees. Needs the treelock, or that nothing runs."""
    found = uprobes()
    check_rbtree(uprobes_tree)
    for left, right in pairwise(found):
        assert uprobe_cmp(left, right) < 0, f"R1: keys rise strictly: {left!r} is before {right!r}"
    for u in found:
        assert uprobe_is_active(u), f"R1: {u!r} is in the tree and knows it"
    assert uprobes_seqcount.sequence % 2 == 0, "R3: no writer is inside"
