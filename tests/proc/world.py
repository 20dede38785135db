"""Small address spaces that change while they are read, and what a reader must see."""

from kmodel.core import BUG_ON, boot
from kmodel.fs import O_RDONLY, alloc_empty_file, fput, open_file
from kmodel.hazards import scenarios
from kmodel.hazards.maps import BASE, border_space, split_off  # noqa: F401  # tests take them from here
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    brk,
    mm_alloc,
    mmap,
    munmap,
)
from kmodel.mm.from_proc_maps import parse_maps
from kmodel.proc import proc_maps, procmap_query

PAGE = PAGE_SIZE
RW = PROT_READ | PROT_WRITE
ANON = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED


H40 = {
    found.without[0]: (found.setup, found.threads) for found in scenarios().values() if "H40" in found.hazards
}
"""Guard of lock_next_vma() -> the scenario that needs it."""


# ------------------------------------------------------------------------------- the copying reader


class Mapped:
    """A file that only its mapping holds any more."""

    def __init__(self):
        boot()
        self.mm = mm_alloc()
        file = open_file("/a", size=4 * PAGE)
        mmap(self.mm, BASE, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, file)
        fput(file)


def close_and_reuse(space):
    """The mapping and its file go; the memory is at once another file's, which has no inode yet."""
    munmap(space.mm, BASE, 4 * PAGE)
    space.other = alloc_empty_file(O_RDONLY)


def file_reader(space):
    """The mapping is shown with its file, or not at all."""
    lines = parse_maps(proc_maps(space.mm, "snapshot"))
    BUG_ON([line.name for line in lines] not in ([], ["/a"]), f"{lines}")


class Heap:
    """Two pages of heap, and a mapping behind."""

    def __init__(self):
        boot()
        self.mm = mm_alloc()
        self.mm.start_brk = self.mm.brk = BASE
        brk(self.mm, BASE + 2 * PAGE)
        mmap(self.mm, BASE + 8 * PAGE, PAGE, PROT_READ, ANON)


def shrink_heap(space):
    brk(space.mm, BASE)


def heap_reader(variant):
    """What is mapped where the heap is has the heap's name."""

    def reader(space):
        for line in parse_maps(proc_maps(space.mm, variant)):
            BUG_ON(line.start == BASE and line.name != "[heap]", f"the heap has lost its name: {line}")

    return reader


# ------------------------------------------------------------------------------- PROCMAP_QUERY


def query(space):
    """The answer covers what was asked for."""
    answer, _name, _build_id = procmap_query(space.mm, space.at)
    BUG_ON(not answer.vma_start <= space.at < answer.vma_end, f"{space.at:#x} is not in {answer}")
