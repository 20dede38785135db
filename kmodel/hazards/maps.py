"""Somebody reads /proc/PID/maps, and sees a hole, or an order, that never was.

Models:      mm/mmap_lock.c, lock_next_vma (7.2), as fs/proc/task_mmu.c uses it; mprotect(2), mmap(2),
             munmap(2)
Guards:      see mm/vma_iter.py; each of lock_next_vma()'s ways to doubt what it found is a guard
Invariants:  what comes next after an address covers it, if at every moment something was mapped there
Leaves out:  the text of the lines
Read next:   proc/show_map.py

vma_lock_init() stores vm_lock_seq plainly into memory that a late reader may look at: a race by the letter,
in the kernel too. The race oracle is off; what is asked for is what the reader sees. Whole system calls
beside a walk are too many executions to exhaust quickly: one preemption, and BOUNDED.
"""

import mmap as prot
from typing import Any

from kmodel.core import BUG_ON, boot
from kmodel.explore import Verdict
from kmodel.hazards.catalogue import Scenario, register
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE_SIZE,
    lock_next_vma,
    mm_alloc,
    mmap,
    mmap_write_lock,
    mmap_write_unlock,
    mprotect,
    munmap,
    vma_end_read,
    vma_iter_init,
    vma_lookup,
    vma_start_write,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

BASE = 0x10_0000_0000
R, RW = prot.PROT_READ, prot.PROT_READ | prot.PROT_WRITE


class Space:
    """Mappings given as (first page, end page, protection), and how far the reader is."""

    def __init__(self, *mappings: tuple[int, int, int], at: int = 0) -> None:
        boot()
        mm = mm_alloc()
        assert mm is not None
        self.mm = mm
        for first, end, protection in mappings:
            self.map(first, end, protection)
        self.at = BASE + at * PAGE_SIZE

    def map(self, first: int, end: int, protection: int) -> None:
        """Map pages [first, end), over whatever is there."""
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
        mmap(self.mm, BASE + first * PAGE_SIZE, (end - first) * PAGE_SIZE, protection, flags)

    def unmap(self, first: int, end: int) -> None:
        """Unmap pages [first, end)."""
        munmap(self.mm, BASE + first * PAGE_SIZE, (end - first) * PAGE_SIZE)


def next_vma(space: Space) -> tuple[int, int] | None:
    """(start, end) of the VMA that a reader of maps at space.at comes to, or None."""
    rcu_read_lock()
    vma: Any = lock_next_vma(space.mm, vma_iter_init(space.mm, space.at), space.at)
    rcu_read_unlock()
    if vma is None:
        return None
    bounds = vma.vm_start, vma.vm_end
    vma_end_read(vma)
    return bounds


def read(space: Space) -> None:
    """What the reader comes to covers its place: there is no hole, at no moment."""
    found = next_vma(space)
    BUG_ON(found is None, "the reader is at the end, where a mapping is")
    assert found is not None
    start, end = found
    BUG_ON(end <= space.at, f"the reader at {space.at:#x} is sent back to {start:#x}-{end:#x}")
    BUG_ON(start > space.at, f"a hole from {space.at:#x} to {start:#x} that never was")


def read_forward(space: Space) -> None:
    """What the reader comes to, if anything, is not behind it: the space ahead may be empty."""
    found = next_vma(space)
    BUG_ON(found is not None and found[1] <= space.at, "the reader is sent back")


def border_space() -> Space:
    """R at [0, 2), RW at [2, 8); the reader has printed the first."""
    return Space((0, 2, R), (2, 8, RW), at=2)


def split_off(space: Space) -> None:
    """The end of the second gets other permissions: a new VMA takes [2, 4), the old one begins at 4."""
    mprotect(space.mm, BASE + 4 * PAGE_SIZE, 4 * PAGE_SIZE, R)


def replaced_space() -> Space:
    """RW at [0, 4), R at [4, 8)."""
    return Space((0, 4, RW), (4, 8, R))


def replace(space: Space) -> None:
    """Something else is mapped over the first, in one step."""
    space.map(0, 4, 0)


def reused_space() -> Space:
    """Nothing but RW at [4, 8), where the reader is."""
    return Space((4, 8, RW), at=4)


def reuse_lower(space: Space) -> None:
    """It is unmapped, and its memory is a mapping further down at once."""
    space.unmap(4, 8)
    space.map(0, 2, RW)


def write_lock_first(space: Space) -> None:
    """The first is write-locked for a while: what any change does first, and no more."""
    mmap_write_lock(space.mm)
    vma_start_write(vma_lookup(space.mm, BASE))
    mmap_write_unlock(space.mm)


def _maps(name: str, guard: str, summary: str, setup: Any, threads: Any, preemptions: int | None = 1) -> None:
    register(
        Scenario(
            name=name,
            hazards="H40",
            summary=summary,
            setup=setup,
            threads=threads,
            without=guard,
            breaks="assertion",
            memory="sc",
            options={"races": False, "preemptions": preemptions},
            expected=Verdict.PASS if preemptions is None else Verdict.BOUNDED,
        )
    )


_maps(
    "maps-gap",
    "no-gap-recheck",
    "A VMA shrinks from below while a reader is on its way to it: a hole, where its other half is.",
    border_space,
    (read, split_off),
)
_maps(
    "maps-replaced",
    "no-next-vma-iter-reset",
    "A VMA is replaced while a reader is at it; the reader goes on behind what took its place.",
    replaced_space,
    (read, replace),
)
_maps(
    "maps-behind",
    "no-next-vma-behind-check",
    "A VMA is freed and used again further down while a reader is on its way to it, who then prints it.",
    reused_space,
    (read_forward, reuse_lower),
)
_maps(
    "maps-busy",
    "no-next-vma-fallback",
    "A VMA is write-locked when a reader comes, who passes it over as if it were not there.",
    replaced_space,
    (read, write_lock_first),
    None,
)
