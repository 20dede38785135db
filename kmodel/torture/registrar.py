"""Tasks that register and unregister probes, the same ones again and again.

Models:      nothing in Linux
Guards:      each task has consumers of its own; the keys are shared between tasks
Invariants:  none
Leaves out:  filters, uprobe_apply
Read next:   torture/run.py
"""

import random
import time
from typing import Any

from kmodel.slab import kfree, kzalloc
from kmodel.sync import refcount_read
from kmodel.torture.tasks import Task
from kmodel.torture.watch import on_hit
from kmodel.torture.world import Key, Member, TortureConsumer
from kmodel.uprobes import uprobe_register, uprobe_unregister_nosync, uprobe_unregister_sync

UNSYNCED_AT_MOST = 4


class Registrar(Task):
    """Registers and unregisters probes, the same ones again and again: neighbours of those that must be
    found.
    """

    name = "register"

    def __init__(self, me: Member, rng: random.Random) -> None:
        super().__init__(me, rng)
        self.regions = list(me.world.regions)
        in_regions = {key for region in self.regions for key in region.churned}
        self.others = [key for key in me.world.churned if key not in in_regions]
        self.turn = self.at = 0
        self.mine: dict[Key, tuple[Any, TortureConsumer]] = {}
        self.unsynced: list[TortureConsumer] = []

    def step(self) -> None:
        if not self.regions:
            time.sleep(0.001)
            return
        if self.others and self.rng.random() < 0.2:
            self.toggle(self.rng.choice(self.others))
        else:
            # In the order of the tree, which makes it rotate most; there and back, then somewhere else.
            churned = self.regions[self.turn].churned
            self.world.focus.key = (self.at + 1) % len(
                churned
            )  # let handlers of the next one be running by then
            self.toggle(churned[self.at % len(churned)])
            self.at += 1
            if self.at >= 2 * len(churned):
                self.at = 0
                self.turn = self.rng.randrange(len(self.regions))
                self.world.focus.region = self.turn
        if len(self.unsynced) >= UNSYNCED_AT_MOST:
            self.sync()

    def toggle(self, key: Key) -> None:
        """Register the key if this task has not, else unregister it."""
        if key not in self.mine:
            self.register(key)
            return
        self.unregister(key)
        chance = self.rng.random()
        if chance < 0.4:
            self.sync()  # at once: its handlers may be running this moment
        elif chance < 0.6:
            self.register(key)  # at once: the old uprobe may still be in the tree, dying

    def register(self, key: Key) -> None:
        """uprobe_register() with a consumer of its own."""
        consumer = new_consumer(key)
        uprobe = uprobe_register(key.inode, key.offset, 0, consumer)
        if isinstance(uprobe, int):
            self.me.oracle.violate(self.log, "uprobe_register", f"{key.probe}: errno {-uprobe}")
        self.mine[key] = (uprobe, consumer)
        self.log.count("register")
        self.log.note("uprobe_register({}) -> {}", key.probe, uprobe)

    def unregister(self, key: Key) -> None:
        """uprobe_unregister_nosync(): handlers may go on for a while."""
        uprobe, consumer = self.mine.pop(key)
        ref = refcount_read(uprobe, "ref")
        self.log.note("uprobe_unregister_nosync({}, {}) begins, ref is {}", key.probe, uprobe, ref)
        uprobe_unregister_nosync(uprobe, consumer)
        self.log.note("uprobe_unregister_nosync({}) done", key.probe)
        self.log.count("unregister")
        self.unsynced.append(consumer)

    def sync(self) -> None:
        """uprobe_unregister_sync() once for several, then free their consumers."""
        uprobe_unregister_sync()
        for consumer in self.unsynced:
            consumer.unregistered = True
            kfree(consumer)
        self.log.note("uprobe_unregister_sync() returned, {} consumers freed", len(self.unsynced))
        self.unsynced = []

    def finish(self) -> None:
        for key in list(self.mine):
            self.unregister(key)
        self.sync()


def new_consumer(key: Key) -> TortureConsumer:
    """A consumer for one place, from the slab."""
    consumer = kzalloc(TortureConsumer)
    if consumer is None:
        raise MemoryError
    consumer.handler = on_hit
    consumer.place = key.place
    consumer.label = key.label
    return consumer
