"""Nodes of the maple tree: what they hold, how one is searched, how one dies.

Models:      include/linux/maple_tree.h, struct maple_range_64 / maple_arange_64 / maple_tree;
             lib/maple_tree.c, mte_set_node_dead, ma_free_rcu, ma_dead_node (7.2)
Guards:      writers: the tree's external lock (mmap_lock); readers: RCU
Invariants:  N1 pivots are inclusive maxima, strictly rising up to the node's end, ULONG_MAX behind it
             N2 a published node keeps its end and its children's order; only exact-fit and boundary stores
             change it in place
             N3 a node is marked dead (its parent is itself) after its replacement is published and before its
             memory is reused
Leaves out:  docs/limits.md: parent pointers of live nodes, dense nodes, node types in pointer bits,
             non-RCU mode
Read next:   mm/maple_walk.py (readers), mm/maple_store.py (writers)

A tree over ranges: the entry of slot i covers (pivot[i-1], pivot[i]]; the last slot ends where the node ends.
Leaves hold entries (NULL for a gap), the other nodes hold children and, for each child, the size of the
largest gap below it.
"""

from typing import Any, ClassVar, Final

from kmodel.core import (
    BUG_ON,
    Pooled,
    guards,
    initcall,
    kernel_struct,
    shared_int,
    smp_rmb,
    smp_wmb,
    untraced,
)
from kmodel.rcu import call_rcu
from kmodel.slab import (
    KmemCache,
    kmem_cache_create,
    kmem_cache_free,
    kmem_cache_zalloc,
)

DEAD_CHECK: Final = guards.register(
    "no-maple-dead-check", "H42: a reader believes what it read in a node that had left the tree"
)
_DEAD_WMB: Final = guards.register(
    "no-maple-dead-wmb", "H42: the words of a dead node are reused before its death is visible"
)

ULONG_MAX: Final = 0xFFFF_FFFF_FFFF_FFFF

MAPLE_RANGE64_SLOTS: Final = 16
MAPLE_ARANGE64_SLOTS: Final = 10

# Literal tuples are constants of compiled code: many threads index them without contending
# (kmodel.core.struct.shared_int).
# fmt: off
SLOT: Final = (
    "slot0", "slot1", "slot2", "slot3", "slot4", "slot5", "slot6", "slot7",
    "slot8", "slot9", "slot10", "slot11", "slot12", "slot13", "slot14", "slot15",
)
PIVOT: Final = (
    "pivot0", "pivot1", "pivot2", "pivot3", "pivot4", "pivot5", "pivot6", "pivot7",
    "pivot8", "pivot9", "pivot10", "pivot11", "pivot12", "pivot13", "pivot14",
)
GAP: Final = ("gap0", "gap1", "gap2", "gap3", "gap4", "gap5", "gap6", "gap7", "gap8", "gap9")
# fmt: on

# What struct rcu_head leaves in the words it shares with pivot[0] and pivot[1]: a NULL next and a kernel
# function's address.
_RCU_HEAD_NEXT: Final = 0
_RCU_HEAD_FUNC: Final = 0xFFFF_FFFF_8120_0000


@kernel_struct
class MapleNode(Pooled):
    """A leaf (struct maple_range_64): up to 16 ranges and their entries."""

    # Readers and writers race on pivots and parent by intent: the dead-node check and the callers' range
    # checks judge the result.
    __k_data_racy__: ClassVar[frozenset[str]] = frozenset({"parent", *PIVOT})

    # the node itself once dead, else None
    parent: Any = None
    # offset of the last slot in use; written before the node is published, never after (N2)
    ma_end: int = 0
    # in the kernel the node type is part of every pointer to the node
    is_leaf: bool = untraced(default=True, init=False)

    pivot0: int = ULONG_MAX
    pivot1: int = ULONG_MAX
    pivot2: int = ULONG_MAX
    pivot3: int = ULONG_MAX
    pivot4: int = ULONG_MAX
    pivot5: int = ULONG_MAX
    pivot6: int = ULONG_MAX
    pivot7: int = ULONG_MAX
    pivot8: int = ULONG_MAX
    pivot9: int = ULONG_MAX
    pivot10: int = ULONG_MAX
    pivot11: int = ULONG_MAX
    pivot12: int = ULONG_MAX
    pivot13: int = ULONG_MAX
    pivot14: int = ULONG_MAX

    slot0: Any = None
    slot1: Any = None
    slot2: Any = None
    slot3: Any = None
    slot4: Any = None
    slot5: Any = None
    slot6: Any = None
    slot7: Any = None
    slot8: Any = None
    slot9: Any = None
    slot10: Any = None
    slot11: Any = None
    slot12: Any = None
    slot13: Any = None
    slot14: Any = None
    slot15: Any = None

    __hash__ = object.__hash__


@kernel_struct
class MapleArange64(MapleNode):
    """A node above the leaves (struct maple_arange_64): up to 10 children and the largest gap below each."""

    is_leaf: bool = untraced(default=False, init=False)

    # read and written by holders of the tree's lock only
    gap0: int = 0
    gap1: int = 0
    gap2: int = 0
    gap3: int = 0
    gap4: int = 0
    gap5: int = 0
    gap6: int = 0
    gap7: int = 0
    gap8: int = 0
    gap9: int = 0

    __hash__ = object.__hash__


@kernel_struct
class MapleTree(Pooled):
    """A maple tree (struct maple_tree): NULL, or the root node."""

    ma_root: MapleNode | None = None
    # the lock that serialises writers (MT_FLAGS_LOCK_EXTERN); None leaves that to the caller
    ma_external_lock: Any = untraced(default=None)
    # node capacities; tests shrink them, so that few entries make a deep tree
    leaf_slots: int = untraced(default=MAPLE_RANGE64_SLOTS)
    arange_slots: int = untraced(default=MAPLE_ARANGE64_SLOTS)

    __hash__ = object.__hash__


maple_leaf_cache: KmemCache
maple_arange_cache: KmemCache


@initcall
def maple_tree_init() -> None:
    """Create the node caches (the kernel has one: its node types are a union)."""
    global maple_leaf_cache, maple_arange_cache
    maple_leaf_cache = kmem_cache_create("maple_leaf", MapleNode)
    maple_arange_cache = kmem_cache_create("maple_node", MapleArange64)


def mt_offset(node: MapleNode, index: int) -> int:
    """The slot of `node` whose range holds `index`: the first whose pivot is not below it.

    A binary search with its literal fields written out (35 ns a step where a loop over names takes 110).
    Pivots behind the node's end are ULONG_MAX, so it needs no end. A concurrent boundary store may move one
    pivot while we look.
    """
    if index <= node.pivot7:
        if index <= node.pivot3:
            if index <= node.pivot1:
                return 0 if index <= node.pivot0 else 1
            return 2 if index <= node.pivot2 else 3
        if index <= node.pivot5:
            return 4 if index <= node.pivot4 else 5
        return 6 if index <= node.pivot6 else 7
    if index <= node.pivot11:
        if index <= node.pivot9:
            return 8 if index <= node.pivot8 else 9
        return 10 if index <= node.pivot10 else 11
    if index <= node.pivot13:
        return 12 if index <= node.pivot12 else 13
    return 14 if index <= node.pivot14 else 15


def ma_dead_node(node: MapleNode) -> bool:
    """Whether `node` left the tree, so that what was just read from it may be anything.

    RMB: pairs with WMB in mte_set_node_dead(). Whoever read a word written after the node's death sees it
    dead here.
    """
    smp_rmb()
    return node.parent is node and not (guards.any_removed and DEAD_CHECK in guards.removed)


def mte_set_node_dead(node: MapleNode) -> None:
    """Tell readers that are inside `node` to start again. The writer lock is held and the replacement is
    published.
    """
    node.parent = node
    if _DEAD_WMB in guards.removed:
        return
    smp_wmb()  # WMB: pairs with RMB in ma_dead_node(); the node's words may be reused from here on


def ma_free_rcu(node: MapleNode) -> None:
    """Free a dead node after a grace period."""
    BUG_ON(node.parent is not node, "a maple node is freed that is not marked dead")
    # struct rcu_head shares its words with the first two pivots: readers that are still here now go to wrong
    # slots.
    node.pivot0 = _RCU_HEAD_NEXT
    node.pivot1 = _RCU_HEAD_FUNC
    call_rcu(node, mt_free_rcu)


def mt_free_rcu(node: MapleNode) -> None:
    """The grace period is over (RCU callback)."""
    mt_free_one(node)


def mt_free_one(node: MapleNode) -> None:
    """Free a node that no reader can be in."""
    kmem_cache_free(maple_leaf_cache if node.is_leaf else maple_arange_cache, node)


# ------------------------------------------------------------------------ reading and building under the lock

type LeafItem = tuple[int, Any]  # (last index, entry)
type Child = tuple[int, MapleNode, int]  # (last index, node, largest gap below it)


def leaf_items(node: MapleNode, node_max: int) -> list[LeafItem]:
    """What a leaf ending at `node_max` holds. Writer lock held."""
    end = node.ma_end
    items = [(getattr(node, PIVOT[i]), getattr(node, SLOT[i])) for i in range(end)]
    items.append((node_max, getattr(node, SLOT[end])))
    return items


def children(node: MapleNode, node_max: int) -> list[Child]:
    """What a node above the leaves, ending at `node_max`, holds. Writer lock held."""
    end = node.ma_end
    found = [(getattr(node, PIVOT[i]), getattr(node, SLOT[i]), getattr(node, GAP[i])) for i in range(end)]
    found.append((node_max, getattr(node, SLOT[end]), getattr(node, GAP[end])))
    return found


def new_leaf(node_min: int, items: list[LeafItem]) -> Child | None:
    """A leaf with these ranges, not yet visible to anybody; None without memory."""
    node: MapleNode | None = kmem_cache_zalloc(maple_leaf_cache)
    if node is None:
        return None
    end = len(items) - 1
    node.ma_end = end
    largest = 0
    low = node_min
    for i, (last, entry) in enumerate(items):
        if i < end:
            setattr(node, PIVOT[i], shared_int(last))
        setattr(node, SLOT[i], entry)
        if entry is None and last - low + 1 > largest:
            largest = last - low + 1
        low = last + 1
    return (items[end][0], node, largest)


def new_arange(members: list[Child]) -> Child | None:
    """A node with these children, not yet visible to anybody; None without memory."""
    node: MapleArange64 | None = kmem_cache_zalloc(maple_arange_cache)
    if node is None:
        return None
    end = len(members) - 1
    node.ma_end = end
    largest = 0
    for i, (last, child, gap) in enumerate(members):
        if i < end:
            setattr(node, PIVOT[i], shared_int(last))
        setattr(node, SLOT[i], child)
        setattr(node, GAP[i], gap)
        largest = max(largest, gap)
    return (members[end][0], node, largest)


def max_gap(node: MapleNode, node_min: int, node_max: int) -> int:
    """The size of the largest gap in or below `node`. Writer lock held."""
    if not node.is_leaf:
        return max(int(getattr(node, GAP[i])) for i in range(node.ma_end + 1))
    largest = 0
    low = node_min
    for last, entry in leaf_items(node, node_max):
        if entry is None and last - low + 1 > largest:
            largest = last - low + 1
        low = last + 1
    return largest
