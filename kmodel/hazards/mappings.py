"""Rules of the VMA lock that callers have to keep: no waiting for mmap_lock, no bit left behind, RCU once.

Models:      mm/memory.c, __vmf_anon_prepare (7.2); mm/mmap_lock.c, vma_start_write_killable, vma_start_read
Guards:      see mm/memory.py and mm/vma_refcnt.py
Invariants:  L2 nobody waits for mmap_lock who holds a VMA lock; a killed writer leaves vm_refcnt as it was
             RCU is left exactly once, by vma_start_read() if it fails
Leaves out:  what a fault brings in
Read next:   hazards/vma_locks.py
"""

from errno import EINTR
from typing import Any

from kmodel.core import boot, current, kill, raw_get
from kmodel.hazards.catalogue import Scenario, register
from kmodel.hazards.vma_lives import attached_vma
from kmodel.hazards.vma_locks import State
from kmodel.mm import (
    MmStruct,
    mmap_write_lock,
    mmap_write_unlock,
    user_store,
    vma_end_read,
    vma_start_read,
    vma_start_write,
    vma_start_write_killable,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

ADDRESS = 0x100000

# ------------------------------------------------------------------------------- H38: two locks, two orders


def store(state: State) -> None:
    """The first store to a mapping: the fault needs an anon_vma, and for that mmap_lock."""
    user_store(state.mm, ADDRESS, b"1")


def write_lock(state: State) -> None:
    """What any change does: mmap_lock, then the VMA."""
    mmap_write_lock(state.mm)
    vma_start_write(state.vma)
    mmap_write_unlock(state.mm)


register(
    Scenario(
        name="fault-mmap-trylock",
        hazards="H38",
        summary="A fault that holds a VMA lock waits for mmap_lock, whose holder waits for that VMA lock.",
        setup=State,
        threads=(store, write_lock),
        without="no-anon-prepare-trylock",
        breaks="lost-wakeup",
        memory="sc",
        options={"races": False},
    )
)

# ------------------------------------------------------------------------------- H39: the writer is killed


class Attached:
    """A VMA that somebody has found; in no tree."""

    def __init__(self) -> None:
        boot()
        self.mm = MmStruct()
        self.vma = attached_vma(self.mm)


def read(state: Attached) -> None:
    """A reader comes and goes, or is refused."""
    rcu_read_lock()
    vma: Any = vma_start_read(state.mm, state.vma)
    if vma is state.vma:
        rcu_read_unlock()
        vma_end_read(vma)


def write_and_die(state: Attached) -> None:
    """A writer with a fatal signal: if it would have to wait, it goes."""
    mmap_write_lock(state.mm)
    kill(current())
    error = vma_start_write_killable(state.vma)
    assert error in (0, -EINTR)
    mmap_write_unlock(state.mm)


def readers_may_come(state: Attached) -> None:
    """The VMA is attached and nobody is at it."""
    count = raw_get(state.vma, "vm_refcnt")
    assert count == 1, f"vm_refcnt stays {count:#x}: no reader will ever get in again"


register(
    Scenario(
        name="vma-killed-writer",
        hazards="H39",
        summary="A writer is killed while it waits for a reader, and leaves the bit that keeps readers out.",
        setup=Attached,
        threads=(read, write_and_die),
        final=readers_may_come,
        without="no-vma-killed-cleanup",
        breaks="assertion",
        memory="sc",
    )
)

# ------------------------------------------------------------------------------- H41: who leaves RCU


def read_and_leave_anyway(state: Attached) -> None:
    """A caller that thinks it is still inside RCU when the VMA could not be locked."""
    rcu_read_lock()
    vma: Any = vma_start_read(state.mm, state.vma)
    rcu_read_unlock()
    if vma is state.vma:
        vma_end_read(vma)


def change(state: Attached) -> None:
    """Somebody write-locks the VMA for a while."""
    mmap_write_lock(state.mm)
    vma_start_write(state.vma)
    mmap_write_unlock(state.mm)


register(
    Scenario(
        name="vma-start-read-rcu",
        hazards="H41",
        summary="A caller leaves RCU after a failed vma_start_read(), which has left it already.",
        setup=Attached,
        threads=(read, change),
        broken_threads=(read_and_leave_anyway, change),
        breaks="locking",
        memory="sc",
    )
)
