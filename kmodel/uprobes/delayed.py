"""delayed_uprobe_list: reference counters that could not be incremented yet.

Models:      kernel/events/uprobes.c, struct delayed_uprobe, delayed_uprobe_add / _remove / _delete (7.2)
Guards:      delayed_uprobe_lock for the list and its entries
Invariants:  D1 (uprobe, mm) is on the list once, D2 an entry never outlives its uprobe or its mm: it holds no
             reference on either
Leaves out:  the kernel's list_head; the list is only ever walked under its mutex, so an ordinary one does
Read next:   uprobes/ref_ctr.py, which adds and applies entries
"""

from typing import Any

from kmodel.core import Struct, guards, initcall, kernel_struct, lockdep_assert_held
from kmodel.sync import Mutex

guards.register("no-delayed-purge", "H53: the delayed list keeps a pointer to a freed uprobe")


@kernel_struct
class DelayedUprobe(Struct):
    """One increment that waits for `mm` to map the counter. Raw pointers: D2 is kept by purging."""

    uprobe: Any = None
    mm: Any = None


delayed_uprobe_lock: Mutex
delayed_uprobe_list: list[DelayedUprobe]


@initcall
def delayed_uprobes_init() -> None:
    """Start with an empty list."""
    global delayed_uprobe_lock, delayed_uprobe_list
    delayed_uprobe_lock = Mutex()
    delayed_uprobe_list = []


def delayed_uprobe_check(uprobe: Any, mm: Any) -> bool:
    """Whether (uprobe, mm) is on the list. Needs delayed_uprobe_lock."""
    return any(du.uprobe is uprobe and du.mm is mm for du in delayed_uprobe_list)


def delayed_uprobe_add(uprobe: Any, mm: Any) -> int:
    """Put (uprobe, mm) on the list unless it is there; 0. Needs delayed_uprobe_lock."""
    lockdep_assert_held(delayed_uprobe_lock)
    if not delayed_uprobe_check(uprobe, mm):
        delayed_uprobe_list.append(DelayedUprobe(uprobe=uprobe, mm=mm))
    return 0


def delayed_uprobe_remove(uprobe: Any, mm: Any) -> None:
    """Drop the entries of `uprobe` and `mm`; None stands for any, but not for both. Needs
    delayed_uprobe_lock.
    """
    lockdep_assert_held(delayed_uprobe_lock)
    if uprobe is None and mm is None:
        return
    if mm is None and "no-delayed-purge" in guards.removed:
        return
    delayed_uprobe_list[:] = [
        du
        for du in delayed_uprobe_list
        if (uprobe is not None and du.uprobe is not uprobe) or (mm is not None and du.mm is not mm)
    ]
