"""The uprobes tree, searched without a lock while an insertion rotates it.

Models:      kernel/events/uprobes.c, find_uprobe_rcu and insert_uprobe, over lib/rbtree.c (7.2)
Guards:      uprobes_treelock for the insertion; RCU tasks trace and uprobes_seqcount for the search
Invariants:  a uprobe that is in the tree all the time is found
Leaves out:  removal: hazards/lifetimes.py; how a node becomes visible: hazards/publication.py
Read next:   rcu/rbtree.py, _lift(), for why a rotation hides nodes; then hazards/lifetimes.py

The tree has 1 at its root and 2 to the right of that. Inserting 3 to the right of 2 makes three in a row, so
2 is
lifted over 1. For the length of some stores 2 hangs from nowhere:

    root -> 1 -> 2 -> 3        the new node is linked
    root -> 1                  rb_right of 1 is cut; whoever is at 1 finds nothing to the right of it
            2 -> 3
    root -> 2 -> 1, 3          rb_left of 2 and the root are set; whoever starts now finds all
"""

from typing import Any

from kmodel.core import boot
from kmodel.fs import Inode, iget_path
from kmodel.hazards.catalogue import Scenario, register
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.slab import kzalloc
from kmodel.sync import refcount_set
from kmodel.uprobes import Uprobe, find_uprobe_rcu
from kmodel.uprobes.tree import check_invariants, insert_uprobe
from kmodel.uprobes.uprobe import init_uprobe


class Tree:
    """A file, and its uprobes by offset."""

    def __init__(self) -> None:
        boot()
        inode = iget_path("/bin/prog", size=100)
        assert inode is not None
        self.inode: Inode = inode
        self.one, self.two, self.three = (uprobe_at(inode, offset) for offset in (1, 2, 3))


def uprobe_at(inode: Inode, offset: int) -> Uprobe:
    """What alloc_uprobe() makes and does not insert yet."""
    uprobe: Any = kzalloc(Uprobe)
    init_uprobe(uprobe, inode, offset, 0)
    refcount_set(uprobe, "ref", 1)
    return uprobe  # type: ignore[no-any-return]


def setup() -> Tree:
    """1 above 2, so that 3 makes a rotation."""
    tree = Tree()
    insert_uprobe(tree.one)
    insert_uprobe(tree.two)
    return tree


def insert_3(tree: Tree) -> None:
    """A third uprobe, behind the two."""
    insert_uprobe(tree.three)


def find_2(tree: Tree) -> None:
    """It was there before, and stays."""
    rcu_read_lock_trace()
    found = find_uprobe_rcu(tree.inode, 2)
    rcu_read_unlock_trace()
    assert found is tree.two, "uprobe 2 is in the tree, and the search says it is not"


def final(tree: Tree) -> None:
    """The tree is in order again."""
    check_invariants()


register(
    Scenario(
        name="tree-miss-retry",
        hazards="H03",
        summary="A search meets a rotation, misses a uprobe that is there, and is believed.",
        setup=setup,
        threads=(find_2, insert_3),
        final=final,
        without="no-seqcount-retry",
        breaks="assertion",
        memory="sc",
    )
)
register(
    Scenario(
        name="tree-miss-odd",
        hazards="H04",
        summary="A search begins and ends inside one insertion: the count is odd, but it did not move.",
        setup=setup,
        threads=(find_2, insert_3),
        final=final,
        without="no-seqcount-even",
        breaks="assertion",
        memory="sc",
    )
)
register(
    Scenario(
        name="tree-miss-rmb",
        hazards=("H04", "H18"),
        summary="A search looks at the count before it has read the link that was cut.",
        setup=setup,
        threads=(find_2, insert_3),
        final=final,
        without="no-seqcount-rmb",
        breaks="assertion",
        memory="lkmm",
    )
)
