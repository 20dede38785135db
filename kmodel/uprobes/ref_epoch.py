"""References on a uprobe that are added and dropped unconditionally: a count with an epoch beside it.

Models:      "uprobes: revamp uprobe refcounting and lifetime management" (v2 of July 2024, not merged):
             get_uprobe, put_uprobe
Guards:      ref by one atomic addition; the treelock for writing around the decision to destroy; the put is
             an RCU section from its addition to its look at the value
Invariants:  E1 of all who bring the count to zero, one destroys: the last. E2 nobody looks at the count of
             a freed uprobe
Leaves out:  the series freed by call_rcu_tasks_trace() alone; here the uprobe goes through today's chain
             (lifetime.py), which finds it erased already
Read next:   hazards/references.py, what the epoch and the section are for (H73)

    63        62 ............ 32   31 ............ 0
    overflow  epoch                count                get adds 2^32 + 1, put adds 2^32 - 1

Zero does not mean dead: somebody who finds the uprobe under the treelock may take the count from 0 to 1
again. So who comes down to zero takes the treelock for writing, after which nobody can find it, and
destroys only if the whole word is what his own put left: each get and put in between moved the epoch. With
the count alone two tasks could both see zero, and both destroy. What it buys is one unconditional addition
instead of a loop of compare-and-exchange; reviewers answered that the shared word itself is what costs.
"""

from typing import Any, Final

from kmodel.core import atomic_read, atomic_set, cmpxchg, current, guards, rmw
from kmodel.rcu import RB_CLEAR_NODE, rb_erase
from kmodel.sync import write_seqcount_begin, write_seqcount_end
from kmodel.uprobes import protection, tree, treelock
from kmodel.uprobes.uprobe import Uprobe

guards.register("no-epoch-compare", "H73: two tasks that both came down to zero both destroy the uprobe")
guards.register("no-epoch-section", "H73: who came down to zero looks at the count of a freed uprobe")

UPROBE_REFCNT_GET: Final = (1 << 32) + 1
UPROBE_REFCNT_PUT: Final = (1 << 32) - 1
_COUNT: Final = (1 << 32) - 1
_OVERFLOW: Final = 1 << 63


def _add_get(old: int) -> int:
    return (old + UPROBE_REFCNT_GET) & (2 * _OVERFLOW - 1)


def _add_put(old: int) -> int:
    return (old + UPROBE_REFCNT_PUT) & (2 * _OVERFLOW - 1)


def init(uprobe: Uprobe, users: int) -> None:
    """`users` references in epoch 0; nobody else can use the uprobe."""
    atomic_set(uprobe, "ref", users)


def get(uprobe: Uprobe) -> None:
    """One more, by somebody who has one or holds the treelock: from zero too."""
    v = _add_get(rmw(uprobe, "ref", _add_get, "full"))
    if v & _OVERFLOW:  # once in 2^31 operations: start the epochs again
        cmpxchg(uprobe, "ref", v, v & ~_OVERFLOW)


def try_get(uprobe: Uprobe) -> bool:
    """One more, always. Needs the treelock, or a reference: a lockless finder must not use this."""
    get(uprobe)
    return True


def put(uprobe: Uprobe) -> bool:
    """Drop one. True: it was the last, the uprobe is out of the tree, and the caller must free it."""
    # From the addition on the uprobe may be somebody else's to destroy, and we look at it below.
    task = current()
    inside = "no-epoch-section" not in guards.removed
    token: Any = protection.implementation.read_lock(task) if inside else None
    v = _add_put(rmw(uprobe, "ref", _add_put, "full"))
    destroy = False
    if v & _COUNT == 0:
        destroy = _destroy(uprobe, v)
    elif v & _OVERFLOW:
        cmpxchg(uprobe, "ref", v, v & ~_OVERFLOW)
    if inside:
        protection.implementation.read_unlock(task, token)
    return destroy


def _destroy(uprobe: Uprobe, v: int) -> bool:
    """The count is zero, or was: whether the uprobe is ours to free. Then it has left the tree."""
    lock = treelock.implementation
    lock.write_lock(tree.uprobes_treelock)
    now: int = atomic_read(uprobe, "ref")
    # The whole word: nobody got and put it since, so nobody else is on the way here with a later zero.
    destroy = now & _COUNT == 0 if "no-epoch-compare" in guards.removed else now == v
    if destroy and tree.uprobe_is_active(uprobe):
        write_seqcount_begin(tree.uprobes_seqcount)
        rb_erase(uprobe, tree.uprobes_tree)
        write_seqcount_end(tree.uprobes_seqcount)
        RB_CLEAR_NODE(uprobe)
    lock.write_unlock(tree.uprobes_treelock)
    return destroy


def users(uprobe: Uprobe) -> int:
    """How many there are."""
    return int(atomic_read(uprobe, "ref") & _COUNT)


def delete_uprobe(uprobe: Uprobe) -> None:
    """Nothing: the last put takes the uprobe out of the tree."""


def usable(uprobe: Uprobe) -> bool:
    """Always: who has a reference keeps the uprobe in the tree."""
    return True
