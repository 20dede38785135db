"""Waiting for readers that keep their nesting in their own task: what RCU and the older RCU Tasks Trace have
in common.

Models:      kernel/rcu/tree_plugin.h, the list of blocked readers; kernel/rcu/tasks.h, the holdout list (both
             in what they achieve)
Guards:      a task's words are written by that task only
Invariants:  W1 a section that was open when the wait began has ended when it is over, W2 no later section is
             waited for
Leaves out:  how the kernel finds its readers (quiescent states of CPUs, interprocessor interrupts):
             docs/limits.md
Read next:   rcu/rcu.py

A reader has two words. `nesting` is 0 outside sections. `sections` counts ended ones, modulo 256, and is
stored after nesting became 0. A grace period reads `sections`, then `nesting`; if that is not 0 the section
it saw is over as soon as `sections` has moved, be the reader inside a new one or not (W2). In the other order
it could read the nesting of one section and the count after it, and wait for a section that may never begin.
Whoever misses exactly 256 sections between two looks only waits for one more.
"""

from collections.abc import Callable
from typing import Final

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    LockingBug,
    TaskStruct,
    access,
    engine,
    guards,
    smp_cond_load_acquire,
    smp_load_acquire,
    smp_mb,
    smp_store_release,
)
from kmodel.rcu.stall import Stall

WAIT: Final = guards.register(
    "rcu-wait", "H08: a grace period waits for the readers that were there when it began"
)
NESTING: Final = guards.register("rcu-nesting", "W1: only the outermost unlock ends a section")
ORDER: Final = guards.register(
    "rcu-sections-first", "W1: a grace period reads the count of sections before the nesting"
)

SECTIONS_MASK: Final = 0xFF


class SectionEnded:
    """The condition "`sections` has moved"; on real threads it also looks at the clock."""

    __slots__ = ("seen", "stall", "task")

    def __init__(self, task: TaskStruct, seen: int, stall: Stall | None) -> None:
        self.task = task
        self.seen = seen
        self.stall = stall

    def __call__(self, sections: int) -> bool:
        if sections != self.seen:
            return True
        if self.stall is not None:
            self.stall.check()
        return False


def wait_for_readers(nesting: str, sections: str, make_stall: Callable[[], Stall]) -> int:
    """Wait until every section open now, in any task, has ended; return how many there were. Full barriers on
    both sides.
    """
    # Everything the caller did before is visible to sections that this wait does not wait for. Pairs with the
    # barrier in enter(): either that section sees the caller's stores or the loads below see its nesting.
    smp_mb()
    holdouts: dict[TaskStruct, int] = {}
    if WAIT not in guards.removed:
        for task in engine().tasks():
            if ORDER in guards.removed:
                inside = smp_load_acquire(task, nesting)
                seen = smp_load_acquire(task, sections)
            else:
                seen = smp_load_acquire(task, sections)
                # ACQUIRE, both: pair with the releases in leave(); what the ended section did is before what
                # the caller does next.
                inside = smp_load_acquire(task, nesting)
            if inside:
                holdouts[task] = seen
    found = len(holdouts)
    if holdouts:
        # A traced engine evaluates conditions when it likes and reports a reader that never ends as a
        # deadlock.
        stall = make_stall() if access._tracer is None else None
        if stall is not None:
            stall.holdouts = holdouts
        for task, seen in list(holdouts.items()):
            smp_cond_load_acquire(task, sections, SectionEnded(task, seen, stall))
            del holdouts[task]
    smp_mb()
    return found


def enter(task: TaskStruct, nesting: str) -> None:
    """The read side's lock on a traced engine."""
    depth = READ_ONCE(task, nesting)
    WRITE_ONCE(task, nesting, depth + 1)
    if depth == 0:
        # Changed from the kernel, whose readers have no barrier because its grace periods make every CPU
        # execute one.
        smp_mb()


def leave(task: TaskStruct, nesting: str, sections: str) -> None:
    """The read side's unlock on a traced engine."""
    depth = READ_ONCE(task, nesting)
    if depth <= 0:
        raise LockingBug(f"{task!r} leaves a read-side critical section that it is not in")
    # RELEASE, both: pair with the acquires in wait_for_readers(). In this order: see the module's text.
    smp_store_release(task, nesting, depth - 1)
    if depth == 1 or NESTING in guards.removed:
        smp_store_release(task, sections, (READ_ONCE(task, sections) + 1) & SECTIONS_MASK)
