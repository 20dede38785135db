"""uprobes_treelock, whichever kind of lock it is.

Models:      kernel/events/uprobes.c, uprobes_treelock: a spinlock up to 6.9, an rwlock since 6.10 (7.2 too),
             a percpu_rw_semaphore in a series of July 2024 that was not merged
Guards:      see the lock that is chosen
Invariants:  K1 the kind changes only while nobody holds the lock
Leaves out:  rules of contexts: a percpu_rw_semaphore sleeps, so with it no uprobe may be put from a timer
Read next:   uprobes/tree.py, whose changes and range walks are under it

What the choice is about: every hit used to take the lock for reading. A spinlock lets one hit in at a
time; an rwlock lets all in, but they meet at one word; a percpu_rw_semaphore's readers meet nowhere, and
its writers wait for a grace period each, in register and unregister. With a lockless descent
(uprobes_seqcount and RCU) a hit does not take it at all, and the argument was over.
"""

from collections.abc import Callable
from typing import Any

import attrs

from kmodel.sync import (
    PercpuRwSemaphore,
    RwLock,
    SpinLock,
    percpu_down_read,
    percpu_down_write,
    percpu_up_read,
    percpu_up_write,
    read_lock,
    read_unlock,
    spin_lock,
    spin_unlock,
    write_lock,
    write_unlock,
)


@attrs.frozen
class Treelock:
    """A kind of lock: how one is made, and its four operations, which take it."""

    name: str
    make: Callable[[], Any]
    read_lock: Callable[[Any], None]
    read_unlock: Callable[[Any], None]
    write_lock: Callable[[Any], None]
    write_unlock: Callable[[Any], None]


SPINLOCK = Treelock("spinlock", SpinLock, spin_lock, spin_unlock, spin_lock, spin_unlock)
RWLOCK = Treelock("rwlock", RwLock, read_lock, read_unlock, write_lock, write_unlock)
PERCPU_RWSEM = Treelock(
    "percpu_rw_semaphore",
    PercpuRwSemaphore,
    percpu_down_read,
    percpu_up_read,
    percpu_down_write,
    percpu_up_write,
)

implementation: Treelock = RWLOCK
