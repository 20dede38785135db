"""Tasks that change address spaces: mappings of contested addresses replaced, files and VMAs recycled.

Models:      nothing in Linux
Guards:      the journal of a slot is written under its mm's mmap_lock, at the end of the write section
Invariants:  J3 what an address will show is announced before the system call that makes it so
Leaves out:  mremap, mprotect
Read next:   torture/registrar.py
"""

import mmap as mm_constants
import random
import time
from typing import Any

import attrs

from kmodel.core import current, generation
from kmodel.fs import fput
from kmodel.mm import mmap, munmap, vma_lookup
from kmodel.torture.journal import NOTHING, SLOT_PAGES, Entry, Picture, Slot
from kmodel.torture.oracle import name_of
from kmodel.torture.probes import PAGE_SIZE
from kmodel.torture.tasks import Task
from kmodel.torture.watch import lock_sequence
from kmodel.torture.world import Key, Member

PROT_RX = mm_constants.PROT_READ | mm_constants.PROT_EXEC
MAP_FIXED = 0x10
MAP_PRIVATE = mm_constants.MAP_PRIVATE
MAP_ANONYMOUS = mm_constants.MAP_ANONYMOUS

FILES_HELD = 3
CHURN_PAGES = 8
"""So many pages from Process.scratch on are for anybody to map and unmap."""


@attrs.define(eq=False)
class Intent:
    """What an address is about to show."""

    slot: Slot
    picture: Picture
    operation: str


def write_section_ends(mm: Any) -> None:
    """mmap_lock's write section of current is about to end: journal what it did (mm/mmap_lock.py's observer).

    The next even sequence value, the first that a reader can sample afterwards, is one more than the odd one
    now.
    """
    me: Member | None = current().local.get("torture")
    if me is None or me.intent is None:
        return
    intent: Intent = me.intent
    if intent.slot.mm is not mm:
        return
    me.intent = None
    slot, picture = intent.slot, intent.picture
    vma = vma_lookup(mm, slot.address)
    if vma is not None:
        file = vma.vm_file
        picture = attrs.evolve(
            picture,
            file=file,
            file_generation=generation(file) if file is not None else 0,
            vma=vma,
            vma_generation=generation(vma),
        )
    seq = lock_sequence(mm) + 1
    slot.append(Entry(seq, picture, me.log.name, intent.operation, time.monotonic_ns()))
    me.log.note("{} at {:#x}: from seq {} it shows {}", intent.operation, slot.address, seq, picture.label)


class Remapper(Task):
    """Replaces what is mapped at contested addresses: other files, other offsets, nothing, anonymous
    memory.
    """

    name = "remap"

    def __init__(self, me: Member, rng: random.Random) -> None:
        super().__init__(me, rng)
        self.processes = [list(process.slots.values()) for process in me.world.processes]
        self.turn = 0

    def step(self) -> None:
        if self.rng.random() < 0.1:
            self.turn = self.rng.randrange(len(self.processes[0]))
            self.world.focus.slot = self.turn
        slot = self.rng.choice(self.processes)[self.turn]
        chance = self.rng.random()
        self.log.count("remap")
        if chance < 0.55:
            self.replace(slot, self.rng.choice(slot.keys), SLOT_PAGES)
        elif chance < 0.75:
            self.replace(slot, self.rng.choice(slot.keys), 1)
        elif chance < 0.85:
            self.unmap(slot)
            self.replace(slot, self.rng.choice(slot.keys), SLOT_PAGES)
        elif chance < 0.95:
            self.trim(slot)
        else:
            self.anonymous(slot)

    def replace(self, slot: Slot, key: Key, pages: int) -> None:
        """mmap(MAP_FIXED) of a file so that the contested address shows `key`, through a struct file of its
        own.
        """
        world = self.world
        file = world.open(key.inode)
        first = (slot.address & -PAGE_SIZE) - (pages // 2) * PAGE_SIZE
        pgoff = key.offset // PAGE_SIZE - pages // 2
        what = f"mmap({pages} pages of {name_of(key.inode)}, {name_of(file)})"
        self.me.intent = Intent(slot, Picture(key.inode, key.offset, key.label), what)
        mmap(slot.mm, first, pages * PAGE_SIZE, PROT_RX, MAP_PRIVATE | MAP_FIXED, file, pgoff)
        fput(file)  # the mapping has its own reference: the next one over it frees the file

    def unmap(self, slot: Slot) -> None:
        """munmap() of the whole slot."""
        self.me.intent = Intent(slot, NOTHING, "munmap")
        munmap(slot.mm, slot.first, SLOT_PAGES * PAGE_SIZE)

    def trim(self, slot: Slot) -> None:
        """munmap() of the page before or behind: the VMA shrinks or is split, the contested page stays."""
        first = slot.first if self.rng.random() < 0.5 else slot.first + (SLOT_PAGES - 1) * PAGE_SIZE
        munmap(slot.mm, first, PAGE_SIZE)

    def anonymous(self, slot: Slot) -> None:
        """mmap() of anonymous memory over the slot."""
        self.me.intent = Intent(slot, NOTHING, "mmap(anonymous)")
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
        mmap(slot.mm, slot.first, SLOT_PAGES * PAGE_SIZE, PROT_RX, flags)


class FileChurner(Task):
    """Opens and closes files and maps and unmaps memory elsewhere, so that both are recycled at once."""

    name = "files"
    rest = 0.0003

    def __init__(self, me: Member, rng: random.Random) -> None:
        super().__init__(me, rng)
        self.inodes = list(me.world.inodes.values())
        self.held: list[Any] = []
        self.page = me.process.scratch + rng.randrange(CHURN_PAGES) * PAGE_SIZE

    def step(self) -> None:
        self.held.append(self.world.open(self.rng.choice(self.inodes)))
        if len(self.held) > self.rng.randrange(FILES_HELD + 1):
            for file in self.held:
                fput(file)
                self.log.count("file_churn")
            self.held = []
        if self.rng.random() < 0.1:
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
            mmap(self.mm, self.page, PAGE_SIZE, mm_constants.PROT_READ, flags)
            munmap(self.mm, self.page, PAGE_SIZE)
            self.log.count("vma_churn")

    def finish(self) -> None:
        for file in self.held:
            fput(file)
        self.held = []
