"""The number of the VMA's last write lock comes back: who takes the VMA for locked, and who is inside.

Models:      mm/mmap_lock.c, vma_start_write's early-out, vma_start_read (7.2), with a mm_lock_seq of two bits
Guards:      the width of mm_lock_seq, and nothing else
Invariants:  V1 nobody changes a VMA under its reader
Leaves out:  2^31 - 2 write sections of mmap_lock, which are one here
Read next:   mm/mmap_lock.py; docs/findings/H21-vma-lock-seq-wrap.md

A VMA is write-locked while its vm_lock_seq equals mm_lock_seq, and keeps the number afterwards. With two
bits, its last write lock has the number 1 or 3, and every second write section has the same.
"""

import mmap as prot
from typing import Any

from kmodel.explore import Verdict
from kmodel.hazards.catalogue import Scenario, register
from kmodel.hazards.vma_locks import (
    ADDRESS,
    State,
    change,
    fault,
    fault_looks_twice,
    unmap,
)
from kmodel.mm import (
    PAGE_SIZE,
    lock_vma_under_rcu,
    mmap_write_lock,
    mmap_write_unlock,
    mprotect,
    vma_end_read,
)

_SC: dict[str, Any] = {"memory": "sc", "options": {"races": False}}


class OneRoundLess(State):
    """A VMA that was write-locked when it was mapped, and nearly a whole round of the number ago."""

    def __init__(self) -> None:
        super().__init__()
        other_work(self)


def other_work(state: State) -> None:
    """mmap_lock is taken for something else: 2^31 - 1 times in Linux, once here."""
    mmap_write_lock(state.mm)
    mmap_write_unlock(state.mm)


register(
    Scenario(
        name="vma-seq-wrap-short-reader",
        hazards="H21",
        summary="The round is nearly over when the reader comes, who has to stay for one write lock only.",
        setup=OneRoundLess,
        threads=(fault_looks_twice, change),
        without="no-wide-mm-seq",
        breaks="assertion",
        **_SC,
    )
)


def protect(state: State) -> None:
    """mprotect(2), whole."""
    mprotect(state.mm, ADDRESS, PAGE_SIZE, prot.PROT_READ)


def fault_for_write(state: State) -> None:
    """The middle of a write fault: it may write, it looks, and enters a page that may be written."""
    vma: Any = lock_vma_under_rcu(state.mm, ADDRESS)
    if vma is not None:
        checked, entered = vma.vm_flags, vma.vm_flags
        assert checked == entered, "the fault was allowed by flags that are not those of the page it enters"
        vma_end_read(vma)


register(
    Scenario(
        name="vma-seq-wrap-mprotect",
        hazards="H21",
        summary="mprotect(2) takes the VMA for locked, and changes its permissions under a page fault.",
        setup=OneRoundLess,
        threads=(fault_for_write, protect),
        without="no-wide-mm-seq",
        breaks="assertion",
        **_SC,
    )
)

# What is not broken by it: a detach waits for readers by the count alone.
register(
    Scenario(
        name="vma-seq-wrap-munmap",
        hazards="H21",
        summary="munmap(2) takes the VMA for locked; but its detach waits for whoever holds a count.",
        setup=OneRoundLess,
        threads=(fault, unmap),
        without="no-wide-mm-seq",
        expected_broken=Verdict.PASS,
        **_SC,
    )
)

# And what would end it: no number survives the wrap.
register(
    Scenario(
        name="vma-seq-wrap-swept",
        hazards="H21",
        summary="The number wraps, and every VMA forgets its own: the early-out believes no old one.",
        setup=OneRoundLess,
        threads=(fault_looks_twice, change),
        without=("no-wide-mm-seq", "no-mm-seq-sweep"),
        expected_broken=Verdict.PASS,
        **_SC,
    )
)
