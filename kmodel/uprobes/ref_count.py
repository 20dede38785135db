"""References on a uprobe as the kernel counts them: refcount_t, and a tree that may hold dying uprobes.

Models:      kernel/events/uprobes.c, uprobe->ref, get_uprobe, try_get_uprobe, put_uprobe (7.2)
Guards:      ref by refcount_t's operations
Invariants:  U1 ref never goes from 0 to 1
Leaves out:  nothing
Read next:   uprobes/lifetime.py, what the last put starts
"""

from kmodel.sync import (
    refcount_dec_and_test,
    refcount_inc,
    refcount_inc_not_zero,
    refcount_read,
    refcount_set,
)
from kmodel.uprobes.uprobe import Uprobe


def init(uprobe: Uprobe, users: int) -> None:
    """`users` references; nobody else can use the uprobe."""
    refcount_set(uprobe, "ref", users)


def get(uprobe: Uprobe) -> None:
    """One more, by somebody who has one."""
    refcount_inc(uprobe, "ref")


def try_get(uprobe: Uprobe) -> bool:
    """One more, unless there is none left: then the uprobe is dying, and nothing may revive it (U1)."""
    return refcount_inc_not_zero(uprobe, "ref")


def put(uprobe: Uprobe) -> bool:
    """Drop one; whether it was the last."""
    return refcount_dec_and_test(uprobe, "ref")


def users(uprobe: Uprobe) -> int:
    """How many there are."""
    return refcount_read(uprobe, "ref")


def delete_uprobe(uprobe: Uprobe) -> None:
    """Nothing: the last put takes the uprobe out of the tree."""


def usable(uprobe: Uprobe) -> bool:
    """Always: who has a reference keeps the uprobe in the tree."""
    return True
