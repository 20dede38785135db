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

from kmodel.torture.world import Member

LONGEST_SECONDS = 0.0008


class Wary(int):
    """An int of one task, which pauses with probability `chance` at each use, `at_end` where the uprobe is
    found.
    """

    me: Member
    chance: float
    at_end: float

    def __sub__(self, other: int) -> "Wary":
        if other != 1:  # not where the length of the breakpoint is subtracted
            pause(self.me, self.chance)
        return wary(int(self).__sub__(other), self.me, self.chance, self.at_end)

    def __radd__(self, other: int) -> "Wary":
        return wary(int(self).__add__(other), self.me, self.chance, self.at_end)

    def __eq__(self, other: object) -> bool:
        equal = int(self) == other
        if equal:
            pause(self.me, self.at_end)
        return equal

    def __ne__(self, other: object) -> bool:
        return int(self) != other

    def __lt__(self, other: int) -> bool:
        pause(self.me, self.chance)
        return int(self) < other

    def __le__(self, other: int) -> bool:
        pause(self.me, self.chance)
        return int(self) <= other

    def __gt__(self, other: int) -> bool:
        pause(self.me, self.chance)
        return int(self) > other

    def __ge__(self, other: int) -> bool:
        pause(self.me, self.chance)
        return int(self) >= other

    __hash__ = int.__hash__


def wary(value: int, me: Member, chance: float, at_end: float) -> Wary:
    """The number as one of the task's."""
    made = Wary(value)
    made.me = me
    made.chance = chance
    made.at_end = at_end
    return made


def pause(me: Member, chance: float) -> None:
    """Perhaps sleep a little."""
    rng = me.rng
    if rng.random() < chance:
        time.sleep(rng.random() * LONGEST_SECONDS)
