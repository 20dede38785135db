"""Sleepers that nobody wakes, readers that a writer does not see, references from nothing.

Models:      include/linux/rcuwait.h, include/linux/refcount.h, kernel/locking/percpu-rwsem.c (7.2)
Guards:      barriers, in pairs: each side stores, executes one, and looks for the other's store
Invariants:  who waits is woken; a writer inside has no reader beside it; nobody revives what is gone
Leaves out:  the fast path of percpu readers, which needs no barrier because its writer pays a grace period
Read next:   sync/rcuwait.py, sync/percpu_rwsem.py

Most are store buffering: two tasks that each store first and then read what the other stores. Without a full
barrier between on either side both may read the old value. x86 does this too: try --memory tso.
"""

from typing import Any

from kmodel.core import READ_ONCE, WRITE_ONCE, Struct, atomic, boot, embedded, kernel_struct
from kmodel.hazards.catalogue import Scenario, register
from kmodel.sync import (
    PercpuRwSemaphore,
    Rcuwait,
    percpu_down_read_trylock,
    percpu_down_write,
    percpu_rwsem,
    percpu_up_read,
    percpu_up_write,
    rcuwait_wait_event,
    rcuwait_wake_up,
    refcount_dec_and_test,
    refcount_inc_not_zero_acquire,
)
from kmodel.sync.rcu_sync import rcu_sync_enter

# ------------------------------------------------------------------------- rcuwait


@kernel_struct
class Event(Struct):
    """Something that happens, and who waits for it."""

    happened: int = 0
    wait: Rcuwait = embedded(factory=Rcuwait)


def event() -> Event:
    """It has not happened."""
    boot()
    return Event()


def waiter(e: Event) -> None:
    """Sleep until it has."""
    rcuwait_wait_event(e.wait, lambda: READ_ONCE(e, "happened") == 1)


def waker(e: Event) -> None:
    """It happens."""
    WRITE_ONCE(e, "happened", 1)
    rcuwait_wake_up(e.wait)


def _rcuwait(name: str, guard: str, summary: str) -> None:
    register(
        Scenario(
            name=name,
            hazards="H29",
            summary=summary,
            setup=event,
            threads=(waiter, waker),
            without=guard,
            breaks="lost-wakeup",
        )
    )


_rcuwait(
    "rcuwait-waiter-mb",
    "no-rcuwait-waiter-mb",
    "The waiter looks at its condition before its sleep is visible, and sleeps for ever.",
)
_rcuwait(
    "rcuwait-waker-mb",
    "no-rcuwait-waker-mb",
    "The waker looks for a sleeper before what it did is visible, and finds none.",
)


# ------------------------------------------------------------------------- percpu_rw_semaphore


@kernel_struct
class Guarded(Struct):
    """Something that readers change and put back, so that a writer inside must find it at 0."""

    used: int = 0
    sem: PercpuRwSemaphore = embedded(factory=PercpuRwSemaphore)


def guarded() -> Guarded:
    """Another writer is near, so readers take the slow way, where the barriers are."""
    boot()
    g = Guarded()
    rcu_sync_enter(g.sem.rss)
    return g


def percpu_reader(g: Guarded) -> None:
    """One read section, if no writer is in the way."""
    if percpu_down_read_trylock(g.sem):
        WRITE_ONCE(g, "used", 1)
        WRITE_ONCE(g, "used", 0)
        percpu_up_read(g.sem)


def percpu_writer(g: Guarded) -> None:
    """One write section."""
    percpu_down_write(g.sem)
    assert READ_ONCE(g, "used") == 0, "the writer is inside, and so is a reader"
    percpu_up_write(g.sem)


def percpu_trywriter(g: Guarded) -> None:
    """Two steps of percpu_down_write(), without what it does between: barrier A of rcuwait would do for D."""
    if percpu_rwsem._down_write_trylock(g.sem) and percpu_rwsem._readers_active_check(g.sem):
        assert READ_ONCE(g, "used") == 0, "the writer is inside, and so is a reader"


def _percpu(name: str, guard: str, summary: str, writer: Any, *hazards: str) -> None:
    register(
        Scenario(
            name=name,
            hazards=hazards,
            summary=summary,
            setup=guarded,
            threads=(percpu_reader, writer),
            without=guard,
            breaks="assertion",
        )
    )


_percpu(
    "percpu-rwsem-mb-a",
    "no-percpu-rwsem-mb-a",
    "The reader looks at `block` before its count is visible; the writer sees no count.",
    percpu_writer,
    "H71",
)
_percpu(
    "percpu-rwsem-mb-d",
    "no-percpu-rwsem-mb-d",
    "The writer sums the counts before its `block` is visible; the reader sees no block.",
    percpu_trywriter,
    "H71",
)
_percpu(
    "percpu-rwsem-mb-b",
    "no-percpu-rwsem-mb-b",
    "The reader's count is gone before all that it did is visible.",
    percpu_writer,
)
_percpu(
    "percpu-rwsem-mb-c",
    "no-percpu-rwsem-mb-c",
    "The writer sees the count gone, and yet not all that the reader did.",
    percpu_writer,
)


# ------------------------------------------------------------------------- refcount_t


@kernel_struct
class Object(Struct):
    """Something with one reference."""

    ref: int = atomic(default=1)
    used: int = 0


def one_reference() -> Object:
    """The remover's."""
    boot()
    return Object()


def remover(obj: Object) -> None:
    """Drop it; who dropped the last one owns the object, and writes to it without any lock."""
    if refcount_dec_and_test(obj, "ref"):
        obj.used = -1


def finder(obj: Object) -> None:
    """Found it in some table: take a reference, unless it is gone."""
    if refcount_inc_not_zero_acquire(obj, "ref"):
        obj.used = 1
        remover(obj)


register(
    Scenario(
        name="refcount-zero-test",
        hazards=("H01", "H72"),
        summary="Somebody takes a reference to an object that has none left, and two tasks own it.",
        setup=one_reference,
        threads=(remover, finder),
        without="no-refcount-zero-test",
        breaks="data-race",
    )
)
