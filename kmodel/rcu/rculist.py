"""Doubly linked lists that RCU readers may walk while a writer changes them.

Models:      include/linux/list.h, include/linux/rculist.h (7.2)
Guards:      writers: the owner's lock; readers: that lock, or RCU, and then only `next`
Invariants:  L1 entry.next.prev is entry for every entry of the list, L2 a removed entry still leads back into
             the list
Leaves out:  hlists; container_of() is the identity, so an object is on as many lists as it has ListHead bases
             or members
Read next:   uprobes/consumer.py

An entry is a kernel_struct derived from ListHead (or with one embedded); the head is a ListHead of its own.
"""

from collections.abc import Iterator
from typing import Any, Final

from kmodel.core import (
    POISON,
    READ_ONCE,
    WRITE_ONCE,
    KernelBug,
    Pooled,
    guards,
    kernel_struct,
    raw_get,
    rcu_assign_pointer,
    rcu_dereference,
)

LIST_POISON2: Final[Any] = POISON
"""The prev of a removed entry: readers must not walk backwards, and nobody may remove it again."""

_INIT_FIRST = guards.register(
    "list-init-before-publish", "H05: an entry's links are set before readers can reach it"
)
_KEEP_NEXT = guards.register("list-del-keeps-next", "L2: list_del_rcu leaves the removed entry's next alone")


@kernel_struct
class ListHead(Pooled):
    """struct list_head; a new one is an empty list."""

    # write: the list's lock, the publishing one with release; read: that lock, or rcu_dereference under RCU
    next: Any = None
    # write, read: the list's lock
    prev: Any = None

    def __attrs_post_init__(self) -> None:
        self.next = self
        self.prev = self


def INIT_LIST_HEAD(head: ListHead) -> None:
    """Make `head` an empty list."""
    WRITE_ONCE(head, "next", head)
    WRITE_ONCE(head, "prev", head)


# ------------------------------------------------------------------------------------------------ adding


def _list_add_rcu(new: ListHead, prev: ListHead, following: ListHead) -> None:
    if following.prev is not prev:
        raise KernelBug(f"list_add corruption: {following!r}.prev is {following.prev!r}, not {prev!r}")
    if _INIT_FIRST not in guards.removed:
        new.next = following
        new.prev = prev
    # RELEASE: pairs with rcu_dereference in list_for_each_entry_rcu(); who finds the entry finds it
    # initialised.
    rcu_assign_pointer(prev, "next", new)
    if _INIT_FIRST in guards.removed:
        new.next = following
        new.prev = prev
    following.prev = new


def list_add_rcu(new: ListHead, head: ListHead) -> None:
    """Add `new` at the front. Readers may be walking."""
    _list_add_rcu(new, head, head.next)


def list_add_tail_rcu(new: ListHead, head: ListHead) -> None:
    """Add `new` at the end. Readers may be walking."""
    _list_add_rcu(new, head.prev, head)


list_add = list_add_rcu
"""The kernel's list_add publishes with WRITE_ONCE; the release serves lists without lockless
readers as well.
"""
list_add_tail = list_add_tail_rcu


# ------------------------------------------------------------------------------------------------ removing


def _list_del(entry: ListHead) -> None:
    prev, following = entry.prev, entry.next
    if prev is LIST_POISON2:
        raise KernelBug(f"list_del corruption: {entry!r} was removed before")
    if prev.next is not entry or following.prev is not entry:
        raise KernelBug(f"list_del corruption: the neighbours of {entry!r} do not know it")
    following.prev = prev
    WRITE_ONCE(prev, "next", following)


def list_del_rcu(entry: ListHead) -> None:
    """Remove `entry`. Readers that stand at it go on along its next (L2); free or reuse it only after a grace
    period.
    """
    _list_del(entry)
    entry.prev = LIST_POISON2
    if _KEEP_NEXT in guards.removed:
        entry.next = LIST_POISON2


def list_del(entry: ListHead) -> None:
    """Remove `entry` from a list that no lockless reader walks."""
    _list_del(entry)
    entry.next = LIST_POISON2
    entry.prev = LIST_POISON2


def list_del_init(entry: ListHead) -> None:
    """Remove `entry` and make it an empty list of its own; for lists that no lockless reader walks."""
    _list_del(entry)
    INIT_LIST_HEAD(entry)


def list_replace_rcu(old: ListHead, new: ListHead) -> None:
    """Put `new` in the place of `old`; a walking reader meets one of them."""
    new.next = old.next
    new.prev = old.prev
    rcu_assign_pointer(new.prev, "next", new)
    new.next.prev = new
    old.prev = LIST_POISON2


# ------------------------------------------------------------------------------------------------ looking


def list_empty(head: ListHead) -> bool:
    """Whether the list is empty; without its lock, whether it was."""
    return READ_ONCE(head, "next") is head


def list_is_singular(head: ListHead) -> bool:
    """Whether the list has one entry. Needs the list's lock."""
    return not list_empty(head) and head.next is head.prev


def list_first_or_null_rcu(head: ListHead) -> Any:
    """The first entry or None. Reads head.next once: testing list_empty() first could see another entry than
    it returns.
    """
    first = READ_ONCE(head, "next")
    return None if first is head else first


def list_for_each_entry_rcu(head: ListHead) -> Iterator[Any]:
    """Every entry, in order, for a reader: one that is added or removed meanwhile may be met or not."""
    entry = rcu_dereference(head, "next")
    while entry is not head:
        yield entry
        entry = rcu_dereference(entry, "next")


def list_for_each_entry(head: ListHead) -> Iterator[Any]:
    """Every entry, in order. Needs the list's lock. The one just yielded may be removed."""
    entry = head.next
    while entry is not head:
        following = entry.next
        yield entry
        entry = following


def check_invariants(head: ListHead) -> int:
    """Assert L1 on a quiet list, return its length. The engine does not see the reads."""
    count = 0
    entry = head
    while True:
        following = raw_get(entry, "next")
        assert raw_get(following, "prev") is entry, f"L1: {following!r} follows {entry!r}"
        entry = following
        if entry is head:
            return count
        count += 1
