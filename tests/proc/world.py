"""Small address spaces that change while they are read, and what a reader must see."""

from kmodel.core import BUG_ON, boot
from kmodel.fs import O_RDONLY, alloc_empty_file, fput, open_file
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    brk,
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
from kmodel.mm.from_proc_maps import parse_maps
from kmodel.proc import proc_maps, procmap_query
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

BASE = 0x10_0000_0000
PAGE = PAGE_SIZE
RW = PROT_READ | PROT_WRITE
ANON = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED


class Space:
    """Mappings given as (first page, end page, protection), and where the reader is."""

    def __init__(self, *mappings, at=0):
        boot()
        self.mm = mm_alloc()
        for first, end, prot in mappings:
            self.map(first, end, prot)
        self.at = BASE + at * PAGE
        self.end = BASE + max((end for _first, end, _prot in mappings), default=0) * PAGE

    def map(self, first, end, prot):
        mmap(self.mm, BASE + first * PAGE, (end - first) * PAGE, prot, ANON)

    def unmap(self, first, end):
        munmap(self.mm, BASE + first * PAGE, (end - first) * PAGE)

    def write_lock(self, page):
        """What any change does first, and no more."""
        mmap_write_lock(self.mm)
        vma_start_write(vma_lookup(self.mm, BASE + page * PAGE))
        mmap_write_unlock(self.mm)


def next_vma(space):
    """(start, end) of the VMA that a reader of maps at space.at comes to, or None."""
    rcu_read_lock()
    vma = lock_next_vma(space.mm, vma_iter_init(space.mm, space.at), space.at)
    rcu_read_unlock()
    if vma is None:
        return None
    bounds = vma.vm_start, vma.vm_end
    vma_end_read(vma)
    return bounds


def reader(space):
    """What the reader comes to covers its place: there is no hole, at no moment."""
    found = next_vma(space)
    BUG_ON(found is None, "the reader is at the end, where a mapping is")
    start, end = found
    BUG_ON(end <= space.at, f"the reader at {space.at:#x} is sent back to {start:#x}-{end:#x}")
    BUG_ON(start > space.at, f"a hole from {space.at:#x} to {start:#x} that never was")


def reader_not_sent_back(space):
    """What the reader comes to, if anything, is not behind it: the space ahead may be empty."""
    found = next_vma(space)
    BUG_ON(found is not None and found[1] <= space.at, "the reader is sent back")


# ------------------------------------------------------------------------------- H40 in four forms


def border_space():
    """R at [0, 2), RW at [2, 8); the reader has printed the first."""
    return Space((0, 2, PROT_READ), (2, 8, RW), at=2)


def split_off(space):
    """The end of the second gets other permissions: a new VMA takes [2, 4), the old one begins at 4."""
    mprotect(space.mm, BASE + 4 * PAGE, 4 * PAGE, PROT_READ)


def replaced_space():
    """RW at [0, 4), R at [4, 8)."""
    return Space((0, 4, RW), (4, 8, PROT_READ))


def replace(space):
    """Something else is mapped over the first, in one step."""
    space.map(0, 4, 0)


def reused_space():
    """Nothing but RW at [4, 8), where the reader is."""
    return Space((4, 8, RW), at=4)


def reuse_lower(space):
    """It is unmapped, and its memory is a mapping further down at once."""
    space.unmap(4, 8)
    space.map(0, 2, RW)


def write_lock_first(space):
    """The first is write-locked for a while."""
    space.write_lock(0)


H40 = {
    "no-gap-recheck": (border_space, (reader, split_off)),
    "no-next-vma-iter-reset": (replaced_space, (reader, replace)),
    "no-next-vma-behind-check": (reused_space, (reader_not_sent_back, reuse_lower)),
    "no-next-vma-fallback": (replaced_space, (reader, write_lock_first)),
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
