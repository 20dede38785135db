"""Numbers that may make their user pause: how the torture widens race windows without touching the model.

Models:      nothing in Linux; a preemption at a bad moment, made common
Guards:      a number belongs to the task that made it
Invariants:  none: a Wary computes what an int computes
Leaves out:  pauses in code that handles no number of the task's
Read next:   torture/readers.py

A reader hands in an address or an offset. The model computes with it at just the points where an interruption
hurts most:
    bp_vaddr <= pivot           walking the maple tree; after the last of these the VMA is read
    bp_vaddr - vma.vm_start     the VMA's fields have been read, f_inode has not
    offset < uprobe.offset      in the middle of a descent, with a node in hand that a rotation may move
    offset == uprobe.offset     when the descent has found its uprobe
There the task goes to sleep now and then, as a preempted one would; readers of RCU may be preempted.
"""

import time

import attrs

from kmodel.torture.world import Member

LONGEST_SECONDS = 0.0008


@attrs.frozen
class Pauses:
    """How likely a pause is at each use (with numbers within `reach` only), and where the uprobe is found."""

    chance: float
    at_end: float = 0.0
    reach: int | None = None


class Wary(int):
    """An int of one task, which pauses now and then when it is used."""

    me: Member
    pauses: Pauses

    def __sub__(self, other: int) -> "Wary":
        if other != 1:  # not where the length of the breakpoint is subtracted
            self.perhaps(other)
        return wary(int(self).__sub__(other), self.me, self.pauses)

    def __radd__(self, other: int) -> "Wary":
        return wary(int(self).__add__(other), self.me, self.pauses)

    def __eq__(self, other: object) -> bool:
        equal = int(self) == other
        if equal and self.me.rng.random() < self.pauses.at_end:
            pause(self.me)
        return equal

    def __ne__(self, other: object) -> bool:
        return int(self) != other

    def __lt__(self, other: int) -> bool:
        self.perhaps(other)
        return int(self) < other

    def __le__(self, other: int) -> bool:
        self.perhaps(other)
        return int(self) <= other

    def __gt__(self, other: int) -> bool:
        self.perhaps(other)
        return int(self) > other

    def __ge__(self, other: int) -> bool:
        self.perhaps(other)
        return int(self) >= other

    __hash__ = int.__hash__

    def perhaps(self, other: int) -> None:
        """Pause with the chance of a use together with that number."""
        pauses = self.pauses
        if self.me.rng.random() < pauses.chance:
            if pauses.reach is None or abs(int(self) - int(other)) <= pauses.reach:
                pause(self.me)


def wary(value: int, me: Member, pauses: Pauses) -> Wary:
    """The number as one of the task's."""
    made = Wary(value)
    made.me = me
    made.pauses = pauses
    return made


def pause(me: Member) -> None:
    """Sleep a little."""
    time.sleep(me.rng.random() * LONGEST_SECONDS)
