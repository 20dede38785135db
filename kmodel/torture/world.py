"""The scene of a run: address spaces, files, probes, contested slots.

Models:      nothing in Linux
Guards:      built before any task starts; constant afterwards, except each slot's journal
Invariants:  O1 a permanent target is mapped and registered from before the first task starts until after the
             last
             has ended
Leaves out:  nothing
Read next:   torture/watch.py
"""

import random
from collections.abc import Callable
from typing import Any

import attrs

from kmodel.core import TaskStruct, kernel_struct, untraced
from kmodel.fs import open_file
from kmodel.torture.journal import Slot
from kmodel.torture.oracle import Oracle, TaskLog, name_of
from kmodel.torture.probes import Probe
from kmodel.uprobes import UprobeConsumer


@attrs.frozen
class Config:
    """What the user asked for."""

    seed: int
    threads: int
    seconds: float
    pid: int | None = None
    maps: str | None = None
    probes: tuple[str, ...] = ()
    removed_guards: tuple[str, ...] = ()


@kernel_struct
class TortureConsumer(UprobeConsumer):
    """A consumer that knows which place it was registered for, and whether it may still be called."""

    place: Any = untraced(default=None, init=False)
    label: str = untraced(default="", init=False)
    # set after uprobe_unregister_sync() returned, before the consumer is freed
    unregistered: bool = untraced(default=False, init=False)


@attrs.define(eq=False)
class Key:
    """A place to probe, in the model: an inode and an offset."""

    probe: Probe
    inode: Any
    offset: int
    label: str
    # of permanent keys: the registration
    uprobe: Any = None
    consumer: Any = None

    @property
    def place(self) -> tuple[Any, int]:
        """What a lookup must come to."""
        return (self.inode, self.offset)


@attrs.define(eq=False)
class Process:
    """One address space under torture, and which of its addresses are what."""

    name: str
    mm: Any
    # address -> key, for addresses whose mapping never changes
    permanent: dict[int, Key] = attrs.field(factory=dict)
    churned: dict[int, Key] = attrs.field(factory=dict)
    # address -> history, for those whose mapping does
    slots: dict[int, Slot] = attrs.field(factory=dict)
    # the lowest of the pages that tasks may map and unmap as they like
    scratch: int = 0


@attrs.define(eq=False)
class Region:
    """A cluster of probes in the tree: those that stay are what readers look for while the others come and
    go.
    """

    permanent: list[Key]
    churned: list[Key]


class Focus:
    """Where the action is now, as small numbers: writers announce it and readers go there."""

    def __init__(self) -> None:
        self.slot = 0
        self.region = 0
        # of the region's probes that come and go: the one that is about to go
        self.key = 0


@attrs.define(eq=False)
class World:
    """Everything the tasks share."""

    oracle: Oracle
    processes: list[Process] = attrs.field(factory=list)
    permanent: list[Key] = attrs.field(factory=list)
    contested: list[list[Key]] = attrs.field(factory=list)
    churned: list[Key] = attrs.field(factory=list)
    regions: list[Region] = attrs.field(factory=list)
    focus: Focus = attrs.field(factory=Focus)
    # files with probes, held open; path -> inode, and names of places for showing
    opened: list[Any] = attrs.field(factory=list)
    inodes: dict[str, Any] = attrs.field(factory=dict)
    labels: dict[Any, str] = attrs.field(factory=dict)

    def open(self, inode: Any) -> Any:
        """A struct file of its own for the inode."""
        return open_file(inode.path, size=inode.i_size)

    def label(self, inode: Any, offset: int) -> str:
        """A place in words."""
        known = self.labels.get((inode, offset))
        return known if known is not None else f"{name_of(inode)}+{offset:#x}"


class Member:
    """What one task of the torture has at hand: `current().local["torture"]`. Made by the task itself."""

    def __init__(
        self,
        world: World,
        process: Process,
        log: TaskLog,
        task: TaskStruct,
        rng: random.Random,
        pause: Callable[["Member"], None],
    ) -> None:
        self.world = world
        self.process = process
        # Copies: free-threaded Python makes threads that look a number up in one dict wait for each other.
        self.slots = dict(process.slots)
        self.fixed = {**process.churned, **process.permanent}
        self.oracle = world.oracle
        self.log = log
        self.task = task
        self.rng = rng
        # called inside handlers, which may sleep
        self.pause = pause
        # the hit being handled: set before it, read by the handlers it reaches
        self.hit_address = 0
        self.hit_seq = 0
        self.hit_calls = 0
        self.hit_was_fast = False
        self.hit_lingers = False
        # what the system call being made will do to a contested address
        self.intent: Any = None
