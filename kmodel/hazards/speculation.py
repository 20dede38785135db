"""A lookup that takes no lock, beside a task that changes the mapping it looks at.

Models:      kernel/events/uprobes.c, find_active_uprobe_speculative; munmap(2) and mmap(2), whole (7.2)
Guards:      RCU keeps the memory of VMAs and files what it is; mm_lock_seq says whether any of it changed
Invariants:  P1 the uprobe that the lookup accepts belongs to a byte that was mapped at the address
Leaves out:  the locked lookup after a failed speculation
Read next:   uprobes/lookup.py, which is thirty lines; mm/mmap_lock.py

The race oracle is off: the lookup reads, by plain accesses, what a writer may be writing. That is its idea,
and
why the recheck at its end is everything.
"""

import mmap as prot
from typing import Any

from kmodel.core import boot, current
from kmodel.fs import O_RDONLY, PAGE_SIZE, File, alloc_empty_file, filp_close, open_file
from kmodel.hazards.catalogue import Scenario, register
from kmodel.mm import MAP_FIXED, MmStruct, mmap, mprotect, munmap
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.uprobes import Uprobe, find_active_uprobe_speculative
from kmodel.uprobes.register import alloc_uprobe

TEXT = 0x400000
TEXT2 = TEXT + PAGE_SIZE


class State:
    """A program of two pages, mapped at TEXT, and probes at the same place in both of its pages."""

    def __init__(self) -> None:
        boot()
        self.mm = MmStruct()
        self.prog = open_file("/bin/prog", size=2 * PAGE_SIZE)
        self.first = probe(self.prog, 0x10)
        self.second = probe(self.prog, PAGE_SIZE + 0x10)


def probe(file: File, offset: int) -> Uprobe:
    """A uprobe in the tree."""
    uprobe = alloc_uprobe(file.f_inode, offset, 0)
    assert isinstance(uprobe, Uprobe)
    return uprobe


def map_text(mm: MmStruct, file: File, *, pages: int, pgoff: int = 0) -> None:
    """Map part of a file at TEXT, as a program loader does."""
    mmap(
        mm,
        TEXT,
        pages * PAGE_SIZE,
        prot.PROT_READ | prot.PROT_EXEC,
        prot.MAP_PRIVATE | MAP_FIXED,
        file,
        pgoff,
    )


def lookup(state: State, address: int) -> Uprobe | None:
    """What a task that hit a breakpoint at this address finds without taking a lock."""
    current().mm = state.mm
    rcu_read_lock_trace()
    uprobe = find_active_uprobe_speculative(address)
    rcu_read_unlock_trace()
    return uprobe


def _speculation(
    name: str, hazards: str, summary: str, setup: Any, threads: Any, guard: str, **more: Any
) -> None:
    more = {"memory": "sc", "breaks": "assertion", **more}
    options = {"races": False, **more.pop("options", {})}
    register(
        Scenario(
            name=name,
            hazards=hazards,
            summary=summary,
            setup=setup,
            threads=threads,
            without=guard,
            options=options,
            **more,
        )
    )


# ------------------------------------------------------------------------- H10: a VMA that is split


def both_pages_mapped() -> State:
    """Pages 0 and 1 of the program at TEXT and TEXT2, in one VMA."""
    state = State()
    map_text(state.mm, state.prog, pages=2)
    return state


def protect_second_page(state: State) -> None:
    """The VMA is split at TEXT2. It becomes its own upper half: vm_start and vm_pgoff move up, one after
    the other.
    """
    mprotect(state.mm, TEXT2, PAGE_SIZE, prot.PROT_READ)


def hit_second_page(state: State) -> None:
    """What is at TEXT2 does not change: it is page 1 of the program."""
    found = lookup(state, TEXT2 + 0x10)
    assert found in (None, state.second), "the probe of page 0 was found where page 1 is mapped"


_speculation(
    "speculation-split",
    "H10",
    "A lookup mixes vm_pgoff from before a change and vm_start from after it: the wrong handler runs.",
    both_pages_mapped,
    (hit_second_page, protect_second_page),
    "no-final-retry",
)
_speculation(
    "speculation-no-begin-bump",
    "H16",
    "mm_lock_seq moves at unlock only: a lookup begins and ends beside a writer, and sees it stand still.",
    both_pages_mapped,
    (hit_second_page, protect_second_page),
    "no-mm-seq-begin",
)


_speculation(
    "speculation-rmb",
    "H18",
    "A lookup rechecks mm_lock_seq before it has read all of the VMA.",
    both_pages_mapped,
    (hit_second_page, protect_second_page),
    "no-seqcount-rmb",
    memory="lkmm",
)

# ------------------------------------------------------------------------- H10: a VMA that is reused


def first_page_mapped() -> State:
    """Page 0 of the program at TEXT; and another file."""
    state = State()
    state.other = open_file("/bin/other", size=2 * PAGE_SIZE)  # type: ignore[attr-defined]
    map_text(state.mm, state.prog, pages=1)
    return state


def remap(state: Any) -> None:
    """The second page of another file takes the place; its VMA is the memory of the first."""
    munmap(state.mm, TEXT, PAGE_SIZE)
    map_text(state.mm, state.other, pages=1, pgoff=1)


def hit_first_page(state: State) -> None:
    """At TEXT there is page 0 of the program, or nothing, or page 1 of another file, which has no probe."""
    found = lookup(state, TEXT + 0x10)
    assert found in (None, state.first), "a probe was found that was never mapped here"


_speculation(
    "speculation-remap",
    "H10",
    "A lookup holds a VMA that is unmapped and used again for another mapping, and mixes the two.",
    first_page_mapped,
    (hit_first_page, remap),
    "no-final-retry",
)


# ------------------------------------------------------------------------- H11: a file that is reused


def last_reference_is_the_mapping() -> State:
    """Page 0 of the program at TEXT; nobody but the mapping holds the file. Another file exists, with a
    probe.
    """
    state = State()
    map_text(state.mm, state.prog, pages=1)
    inode = open_file("/bin/other", size=PAGE_SIZE)
    state.wrong = probe(inode, 0x10)  # type: ignore[attr-defined]
    filp_close(state.prog)
    return state


def unmap_and_open(state: State) -> None:
    """The last reference to the file goes, and the next file that is opened gets its memory."""
    munmap(state.mm, TEXT, PAGE_SIZE)
    state.opened = open_file("/bin/other", size=PAGE_SIZE)  # type: ignore[attr-defined]


_speculation(
    "speculation-file-reuse",
    "H11",
    "A lookup holds a vm_file that is closed and becomes another open file, and takes that one's inode.",
    last_reference_is_the_mapping,
    (hit_first_page, unmap_and_open),
    "no-final-retry",
)


# ------------------------------------------------------------------------- H12, H14: pointers


def unmap_and_begin_to_open(state: State) -> None:
    """The last reference goes, and somebody begins to open a file in its memory: it has no inode yet."""
    munmap(state.mm, TEXT, PAGE_SIZE)
    state.opened = alloc_empty_file(O_RDONLY)  # type: ignore[attr-defined]


_speculation(
    "speculation-inode-key",
    "H12",
    "A lookup follows the inode of a file that is just being opened: there is none.",
    last_reference_is_the_mapping,
    (hit_first_page, unmap_and_begin_to_open),
    "no-inode-as-key",
    breaks="error",
)


def unmap_and_map_anonymous(state: State) -> None:
    """The VMA's memory becomes an anonymous mapping, which has no file."""
    munmap(state.mm, TEXT, PAGE_SIZE)
    flags = prot.MAP_PRIVATE | prot.MAP_ANONYMOUS | MAP_FIXED
    mmap(state.mm, TEXT2, PAGE_SIZE, prot.PROT_READ, flags)


_speculation(
    "speculation-file-once",
    "H14",
    "vm_file is tested, and loaded again where it is used: NULL by then.",
    first_page_mapped,
    (hit_first_page, unmap_and_map_anonymous),
    "no-vm-file-once",
    breaks="error",
)
