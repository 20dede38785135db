"""References on a uprobe, one of which is the tree's own.

Models:      kernel/events/uprobes.c, delete_uprobe and the two first references of alloc_uprobe, up to 6.10;
             with the change that Oleg Nesterov proposed in July 2024: the tree's is dropped by call_srcu()
Guards:      the treelock for the erase; register_rwsem around "no consumer is left" and around its other
             side, a register that found the uprobe before it was erased
Invariants:  T1 ref is above zero for whoever finds the uprobe in the tree, until that reader's section ends
             T2 a consumer is never added to a uprobe that left the tree
Leaves out:  the proposal had one SRCU domain; here the drop waits for return probes' and for handlers'
             readers, as today's chain does
Read next:   hazards/references.py, why a plain get is enough here and not in find_refcount.py (H01)

The last consumer takes the uprobe out of the tree; a grace period later the tree's reference goes, and
with the last reference of all the memory, at once: nobody can be left who found it without one. The price
is on the other side: a register may find a uprobe that leaves the tree before it has register_rwsem, and
must start over.
"""

from kmodel.core import atomic_dec, atomic_inc, guards
from kmodel.rcu import RB_CLEAR_NODE, call_srcu, list_empty
from kmodel.slab import kfree
from kmodel.sync import (
    mutex_lock,
    mutex_unlock,
    refcount_dec_and_test,
    refcount_inc,
    refcount_read,
    refcount_set,
)
from kmodel.uprobes import delayed, lifetime, protection, tree
from kmodel.uprobes.uprobe import Uprobe

guards.register("no-active-recheck", "T2: a consumer is added to a uprobe that no hit can find any more")
guards.register(
    "no-tree-reference", "H01: a lookup's plain get revives a uprobe whose free is queued already"
)


def _trees() -> int:
    return 0 if "no-tree-reference" in guards.removed else 1


def init(uprobe: Uprobe, users: int) -> None:
    """`users` references and the tree's; nobody else can use the uprobe."""
    refcount_set(uprobe, "ref", users + _trees())


def get(uprobe: Uprobe) -> None:
    """One more, by somebody who has one."""
    refcount_inc(uprobe, "ref")


def try_get(uprobe: Uprobe) -> bool:
    """One more, always: the tree's is there as long as a reader's section that found the uprobe (T1)."""
    refcount_inc(uprobe, "ref")
    return True


def put(uprobe: Uprobe) -> bool:
    """Drop one, and free the uprobe with the last. True only without the tree's: others do not free at
    once.
    """
    if not refcount_dec_and_test(uprobe, "ref"):
        return False
    if not _trees():
        return True
    kfree(uprobe)
    atomic_dec(lifetime.ledger, "dying")
    return False


def users(uprobe: Uprobe) -> int:
    """How many there are without the tree's."""
    return refcount_read(uprobe, "ref") - (_trees() if tree.uprobe_is_active(uprobe) else 0)


def delete_uprobe(uprobe: Uprobe) -> None:
    """No consumer is left: out of the tree. Needs register_rwsem held for writing."""
    if not list_empty(uprobe.consumers) or not tree.uprobe_is_active(uprobe):
        return
    if not _trees():
        return  # who puts the last reference goes the way of ref_count.py
    atomic_inc(lifetime.ledger, "dying")
    lifetime.erase_uprobe(uprobe)
    RB_CLEAR_NODE(uprobe)  # uprobe_is_active() is what a register asks that found it before
    mutex_lock(delayed.delayed_uprobe_lock)
    delayed.delayed_uprobe_remove(uprobe, None)
    mutex_unlock(delayed.delayed_uprobe_lock)
    call_srcu(lifetime.uretprobes_srcu, uprobe, _after_leases)


def _after_leases(uprobe: Uprobe) -> None:
    protection.implementation.call(uprobe, _drop_trees)


def _drop_trees(uprobe: Uprobe) -> None:
    """Nobody is left who found the uprobe in the tree and has no reference."""
    put(uprobe)


def usable(uprobe: Uprobe) -> bool:
    """Whether the uprobe is in the tree still, and a consumer may be added (T2). Needs register_rwsem."""
    return "no-active-recheck" in guards.removed or tree.uprobe_is_active(uprobe)
