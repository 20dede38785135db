"""Numbers that may make their user pause: how the torture widens race windows without touching the model.

Models:      nothing in Linux; a preemption at a bad moment, made common
Guards:      a number belongs to the task that made it
Invariants:  none: a Wary computes what an int computes
Leaves out:  pauses in code that handles no number of the task's
Read next:   torture/readers.py

A reader hands in an address or an offset. The model computes with it at just the points where an interruption
hurts:
    bp_vaddr - vma.vm_start     the VMA's fields have been read, the file has not
    offset == uprobe.offset     in the middle of a descent, and when it has found its uprobe
There the task goes to sleep now and then, as a preempted one would. Readers of RCU may be preempted.
"""

import time
from typing import Any

from kmodel.torture.world import Member

BETWEEN_VMA_AND_FILE = 0.01
IN_DESCENT = 0.004
AT_THE_FIND = 0.05
LONGEST_SECONDS = 0.0006


class Wary(int):
    """An int of one task."""

    me: Member

    def __sub__(self, other: int) -> "Wary":
        if other != 1:  # but not where the breakpoint's length is subtracted
            pause(self.me, BETWEEN_VMA_AND_FILE)
        return wary(int(self).__sub__(other), self.me)

    def __radd__(self, other: int) -> "Wary":
        return wary(int(self).__add__(other), self.me)

    def __eq__(self, other: object) -> bool:
        equal = int(self) == other
        pause(self.me, AT_THE_FIND if equal else IN_DESCENT)
        return equal

    def __ne__(self, other: object) -> bool:
        return int(self) != other

    __hash__ = int.__hash__


def wary(value: int, me: Member) -> Wary:
    """The number as one of the task's."""
    made = Wary(value)
    made.me = me
    return made


def pause(me: Member, chance: float) -> None:
    """Perhaps sleep a little."""
    rng: Any = me.rng
    if rng.random() < chance:
        time.sleep(rng.random() * LONGEST_SECONDS)
