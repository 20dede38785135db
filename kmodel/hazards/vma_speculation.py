"""Speculation on one VMA's own sequence number, and each of the four orders it needs.

Models:      the proposal of August 2024 that mm/vma_lock_seq.py is
Guards:      see mm/vma_lock_seq.py
Invariants:  a reader that is not told to retry saw the VMA before a change, or after it
Leaves out:  the tree: the VMA has been found
Read next:   mm/vma_lock_seq.py; hazards/speculation.py for what was merged
"""

from typing import Any

from kmodel.core import boot
from kmodel.hazards.catalogue import Scenario, register
from kmodel.mm import MmStruct, mmap_write_lock, mmap_write_unlock, vm_area_alloc
from kmodel.mm.vma_lock_seq import (
    vma_lock_alloc,
    vma_speculate_retry,
    vma_speculate_try_begin,
    vma_start_write,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock


class State:
    """A VMA with the lock of 6.4, and two fields that belong together."""

    def __init__(self) -> None:
        boot()
        self.mm = MmStruct()
        vma: Any = vm_area_alloc(self.mm)
        vma_lock_alloc(vma)
        vma.vm_file, vma.vm_pgoff = "file 0", 0
        self.vma = vma


def change(state: State, number: int = 1) -> None:
    """Another file, at another offset: under the write lock, by plain stores."""
    mmap_write_lock(state.mm)
    vma_start_write(state.vma)
    state.vma.vm_file = f"file {number}"
    state.vma.vm_pgoff = number
    mmap_write_unlock(state.mm)


def change_twice(state: State) -> None:
    """Two changes, each under its own hold of mmap_lock."""
    change(state, 1)
    change(state, 2)


def look(state: State) -> None:
    """Look at the VMA with no lock, and ask whether that was right."""
    rcu_read_lock()
    free, sample = vma_speculate_try_begin(state.mm, state.vma)
    file, pgoff = state.vma.vm_file, state.vma.vm_pgoff
    retry = vma_speculate_retry(state.vma, sample)
    rcu_read_unlock()
    if free and not retry:
        assert file == f"file {pgoff}", f"the reader accepts {file} with the offset in file {pgoff}"


def _speculation(name: str, summary: str, *hazards: str, **more: Any) -> None:
    settings: dict[str, Any] = {
        "name": f"vma-{name}",
        "hazards": hazards,
        "summary": summary,
        "setup": State,
        "threads": (look, change),
        "without": f"no-vma-{name}",
        "breaks": "assertion",
        "memory": "lkmm",
        # The fields are read beside their writer, which is what the retry is for.
        "options": {"races": False},
    }
    register(Scenario(**settings | more))


_speculation(
    "speculate-wmb",
    "The writer's up_write() lets its changes of the VMA pass, and they are seen before the mark.",
    "H17",
)
_speculation(
    "speculate-rmb",
    "The reader looks at the VMA's number again before it has read the fields.",
    "H18",
)
_speculation(
    "speculate-order",
    "With mm_lock_seq read first, a VMA that is locked meanwhile does not look like it.",
    "H19",
    memory="sc",
)
_speculation(
    "speculate-vm-acquire",
    "The two samples are taken in the order that the program does not say.",
    "H19",
)
_speculation(
    "speculate-mm-acquire",
    "Fields are read beside a writer who is gone when the reader asks whether there is one.",
    "H19",
)
_speculation(
    "speculate-retry",
    "A reader that does not look at the VMA's number again takes half of a change.",
    "H10",
    memory="sc",
)
_speculation(
    "speculate-wrap",
    "Between a reader's two looks a narrow number goes round once, and stands where it stood.",
    "H20",
    threads=(look, change_twice),
    without="no-wide-mm-seq",
    memory="sc",
)
