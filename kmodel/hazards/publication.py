"""A new node in a tree that is searched without a lock: when is it fit to be seen?

Models:      users of include/linux/rbtree.h, rb_find_rcu and rb_find_add_rcu, other than uprobes
Guards:      a spinlock for insertions; RCU for searches
Invariants:  who reaches a node sees its key and its links
Leaves out:  rotations (one node is no reason for one)
Read next:   rcu/rbtree.py, rb_link_node_rcu()

The uprobes tree could do without the release: insert_uprobe() raises uprobes_seqcount after the key is stored
and
before the node is linked, and the smp_wmb() in that orders them. This tree has no seqcount.
"""

from kmodel.core import Struct, boot, embedded, kernel_struct
from kmodel.hazards.catalogue import Scenario, register
from kmodel.rcu import RbNode, RbRoot, rb_find_add_rcu, rb_find_rcu, rcu_read_lock, rcu_read_unlock
from kmodel.sync import SpinLock, spin_lock, spin_unlock


@kernel_struct
class Keyed(RbNode):
    """A node with a key."""

    key: int = 0


def by_key(key: int, node: Keyed) -> int:
    """For searches."""
    return key - node.key


def by_node(new: Keyed, node: Keyed) -> int:
    """For insertions."""
    return new.key - node.key


@kernel_struct
class Tree(Struct):
    """A tree and its lock."""

    root: RbRoot = embedded(factory=RbRoot)
    lock: SpinLock = embedded(factory=SpinLock)


def setup() -> Tree:
    """An empty tree."""
    boot()
    return Tree()


def insert_7(tree: Tree) -> None:
    """Make a node, then publish it."""
    node = Keyed()
    node.key = 7
    spin_lock(tree.lock)
    rb_find_add_rcu(node, tree.root, by_node)
    spin_unlock(tree.lock)


def find_7(tree: Tree) -> None:
    """Perhaps it is there; if so, its key is."""
    rcu_read_lock()
    found = rb_find_rcu(7, tree.root, by_key)
    assert found is None or found.key == 7
    rcu_read_unlock()


def find_9(tree: Tree) -> None:
    """It is not there, which takes a look at the links of 7."""
    rcu_read_lock()
    assert rb_find_rcu(9, tree.root, by_key) is None
    rcu_read_unlock()


register(
    Scenario(
        name="tree-publish-release",
        hazards="H05",
        summary="A search reaches a new node whose key was not stored yet, as far as it can see.",
        setup=setup,
        threads=(insert_7, find_7),
        without="rb-publish-release",
        breaks="data-race",
        memory="lkmm",
    )
)
register(
    Scenario(
        name="tree-publish-order",
        hazards="H05",
        summary="A node is linked before its own links are set, and a search follows what was in them.",
        setup=setup,
        threads=(insert_7, find_9),
        without="rb-init-before-publish",
        breaks="data-race",
        memory="sc",
    )
)
