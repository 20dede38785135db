"""What every contested address had at every value of mm_lock_seq: the truth that lookups are judged by.

Models:      nothing in Linux
Guards:      a slot's writers hold mmap_lock for writing; readers of the journal hold nothing
Invariants:  J1 the picture for an even sequence value is complete before any task can sample that value,
             J2 entries are in the order of their sequence values
Leaves out:  entries older than the newest few thousand of a slot
Read next:   torture/oracle.py

The journal is written from what the writers *intend*, not from what the model's tree then says, so that it
can
contradict the model. A writer announces what its next system call will do; the end of the write section
publishes a
new sequence value, and the journal's hook runs just before that, still under the lock.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import attrs

from kmodel.torture.probes import PAGE_SIZE

KEEP = 1000
SLOT_PAGES = 3
"""The contested address is in the middle page, so that neighbours can be split off and that page replaced
alone.
"""


@attrs.frozen
class Picture:
    """What one address shows: a place in a file, or nothing that could hold a probe."""

    inode: Any
    offset: int
    label: str
    # which struct file and VMA stood for it, and in which of their lives
    file: Any = None
    file_generation: int = 0
    vma: Any = None
    vma_generation: int = 0

    @property
    def place(self) -> tuple[Any, int]:
        """The key that a lookup must come to."""
        return (self.inode, self.offset)

    def __str__(self) -> str:
        return self.label


NOTHING = Picture(None, 0, "nothing (a hole or anonymous memory)")


@attrs.frozen
class Entry:
    """From this sequence value on, the address shows this picture."""

    seq: int
    picture: Picture
    writer: str
    operation: str
    at: int


class Slot:
    """One contested address of one mm and its history."""

    def __init__(
        self, mm: Any, address: int, picture: Picture, seq: int, at: int, keys: Sequence[Any] = ()
    ) -> None:
        self.mm = mm
        self.address = address
        self.first = (address & -PAGE_SIZE) - SLOT_PAGES // 2 * PAGE_SIZE
        # the places that this address may show
        self.keys = keys
        # Parallel lists, replaced when they get long, appended to otherwise: a reader takes both
        # references once.
        self._history: tuple[list[int], list[Entry]] = ([seq], [Entry(seq, picture, "setup", "mapped", at)])

    def append(self, entry: Entry) -> None:
        """Add what holds from entry.seq on. Needs the mm's mmap_lock held for writing."""
        seqs, entries = self._history
        if len(seqs) >= 2 * KEEP:
            seqs, entries = seqs[-KEEP:], entries[-KEEP:]
            self._history = (seqs, entries)
        # A reader bisects `seqs`, so the entry must be there first.
        entries.append(entry)
        seqs.append(entry.seq)

    def at(self, seq: int) -> Entry | None:
        """What the address had at an even sequence value; None if that is too long ago to be known."""
        seqs, entries = self._history
        n = bisect_right(seqs, seq)
        return entries[n - 1] if n else None

    def between(self, first: int, last: int) -> list[Entry] | None:
        """Every entry that held at some sequence value of [first, last]; None if some are forgotten."""
        seqs, entries = self._history
        n = bisect_right(seqs, first)
        return entries[n - 1 : bisect_right(seqs, last)] if n else None

    def around(self, seq: int, count: int) -> list[Entry]:
        """The entries next to a sequence value, for showing."""
        seqs, entries = self._history
        n = bisect_right(seqs, seq)
        return entries[max(0, n - count) : n + count]

    def newest(self) -> Entry:
        """The newest entry; exact only under the mm's mmap_lock."""
        return self._history[1][-1]

    def check_invariants(self) -> None:
        """Assert J2. Call it with the mm's mmap_lock held, or with nothing running."""
        seqs, entries = self._history
        assert len(seqs) == len(entries), "both lists tell the same story"
        assert seqs == sorted(seqs), f"J2: sequence values only grow: {seqs}"
        assert seqs == [entry.seq for entry in entries], "both lists tell the same story"
