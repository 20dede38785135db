"""What all tasks of a run have in common, and which kinds there are.

Models:      nothing in Linux
Guards:      each task has its own log, random numbers and registrations; what they share is the model's
Invariants:  none
Leaves out:  forks and exits of the tortured processes
Read next:   torture/readers.py, torture/remap.py, torture/registrar.py
"""

import random
import time

from kmodel.torture.world import Member


class Task:
    """One kind of work; made in the task that does it."""

    name = "task"
    rest = 0.0
    """How long to sleep between turns: work that never waits leaves the processors to work that does."""

    def __init__(self, me: Member, rng: random.Random) -> None:
        self.me = me
        self.log = me.log
        self.rng = rng
        self.world = me.world
        self.mm = me.process.mm

    def step(self) -> None:
        """Do it once."""
        raise NotImplementedError

    def finish(self) -> None:
        """Give back what is held, when the run is over."""


def pause_in_handler(me: Member) -> None:
    """A handler may sleep: mostly it does not, now and then it gives way, rarely it sleeps; long where its
    consumer is about to be unregistered.
    """
    chance = me.rng.random()
    if chance < 0.02:
        time.sleep(me.rng.random() * 0.001)
    elif me.hit_lingers and chance < 0.1:
        time.sleep(me.rng.random() * 0.03)
    elif chance < 0.1:
        time.sleep(0)
