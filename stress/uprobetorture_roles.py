"""The tasks of uprobetorture, and the world they act on. python -m stress.uprobetorture runs them.

Two programs with probes at the same offsets. One address space where now this, now that one is mapped
("hot"); one that maps both for good, with the pages of their reference counters ("still"), and forks. Tasks
hit breakpoints, register and unregister (one sync each, or one for several), ask filters again, remap, split,
move, fork, and look probes up.
"""

import mmap as prot
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from kmodel.core import (
    current,
    is_freed,
    kernel_struct,
    untraced,
)
from kmodel.fs import PAGE_SIZE, File, open_file
from kmodel.mm import (
    MAP_FIXED,
    MmStruct,
    fork,
    mm_alloc,
    mmap,
    mmap_read_lock,
    mmap_read_unlock,
    mmput,
    mprotect,
    mremap,
    munmap,
    vma_lookup,
)
from kmodel.mm.flags import MREMAP_FIXED, MREMAP_MAYMOVE
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.slab import kfree, kzalloc
from kmodel.uprobes import (
    UPROBE_HANDLER_NORMAL,
    UPROBE_HANDLER_REMOVE,
    UPROBE_SWBP_INSN,
    PtRegs,
    Uprobe,
    UprobeConsumer,
    exc_int3,
    fetch_opcode,
    find_uprobe_rcu,
    forced_signals,
    uprobe_apply,
    uprobe_end_dup_mmap,
    uprobe_register,
    uprobe_start_dup_mmap,
    uprobe_unregister,
    uprobe_unregister_nosync,
    uprobe_unregister_sync,
)
from kmodel.uprobes.usermode import finish_step

COUNTERS = 0x800
"""Where in a program's page the reference counters begin; below is code, from here on zeroes."""
OFFSETS = tuple(range(0x10, 0x110, 0x10))
NOP = 0x90
CODE = bytes([NOP]) * COUNTERS + bytes(PAGE_SIZE - COUNTERS)

HOT_TEXT = 0x400000
TEXTS = (0x1000000, 0x2000000)
"""Where the still address space has the programs; the second may be moved up by MOVED and back."""
MOVED = 0x100000
DATA = (0x5000000, 0x6000000)
CHILDREN = 3
"""As many children live to the end, to be judged."""


@kernel_struct
class Watcher(UprobeConsumer):
    """A consumer that knows which place it watches, whether it may be called, and where it is not wanted."""

    offset: int = untraced(default=0)
    gone: bool = untraced(default=False)
    refuses: Any = untraced(default=None)
    answer: int = untraced(default=UPROBE_HANDLER_NORMAL)


class World:
    """Two programs, two address spaces, permanent probes; what went wrong, and how often what happened."""

    def __init__(self, seed: int, bare_mremap: bool = False) -> None:
        self.seed = seed
        self.bare_mremap = bare_mremap
        self.stop = False
        self.wrong: list[str] = []
        self.met: list[Counter[str]] = []
        self.files = [open_file(f"/bin/prog{n}", contents=CODE) for n in range(2)]
        self.hot, self.still = new_mm(), new_mm()
        self.children: list[MmStruct] = []
        map_code(self.hot, self.files[0], HOT_TEXT)
        for n, file in enumerate(self.files):
            map_code(self.still, file, TEXTS[n])
            flags = prot.MAP_PRIVATE | MAP_FIXED
            mmap(self.still, DATA[n], PAGE_SIZE, prot.PROT_READ | prot.PROT_WRITE, flags, file, 0)
        self.permanent: dict[tuple[int, int], Uprobe] = {}
        for n in range(2):
            for offset in OFFSETS[::4]:
                self.permanent[n, offset] = register(self, n, offset, new_watcher(offset))

    def fail(self, what: str) -> None:
        """Record something that must not happen, and end the run."""
        self.wrong.append(what)
        self.stop = True

    def total(self) -> Counter[str]:
        """What all tasks together met."""
        return sum((Counter(dict(met)) for met in self.met), Counter())


def new_mm() -> MmStruct:
    """An address space."""
    mm = mm_alloc()
    assert mm is not None
    return mm


def map_code(mm: MmStruct, file: File, address: int) -> None:
    """Replace whatever is there by the program."""
    mmap(mm, address, PAGE_SIZE, prot.PROT_READ | prot.PROT_EXEC, prot.MAP_PRIVATE | MAP_FIXED, file, 0)


def note(what: str) -> None:
    """This task met something."""
    current().local["met"][what] += 1


# ------------------------------------------------------------------------------------ consumers


def on_hit(uc: Any, regs: PtRegs, data: Any) -> int:
    """The handler: called at its own place, and not after goodbye."""
    world: World = current().local["world"]
    if is_freed(uc) or uc.gone:
        world.fail("P7: a handler was called after uprobe_unregister_sync()")
    if regs.ip % PAGE_SIZE != uc.offset:
        world.fail(f"P1: the handler for {uc.offset:#x} was called at {regs.ip:#x}")
    note("handler")
    return int(uc.answer)


def wants(uc: Any, mm: MmStruct) -> bool:
    """The filter."""
    return uc.refuses is not mm


def new_watcher(offset: int) -> Watcher:
    """A consumer for this place of either program."""
    watcher = kzalloc(Watcher)
    assert watcher is not None
    watcher.handler, watcher.filter = on_hit, wants
    watcher.offset, watcher.gone, watcher.refuses, watcher.answer = offset, False, None, UPROBE_HANDLER_NORMAL
    return watcher


def counter_of(offset: int) -> int:
    """Where the reference counter of a place is: one for every second place, 0 for none."""
    return COUNTERS + offset // 8 if offset // 0x10 % 2 else 0


def register(world: World, n: int, offset: int, watcher: Watcher) -> Uprobe:
    """Register it with program n."""
    uprobe = uprobe_register(world.files[n].f_inode, offset, counter_of(offset), watcher)
    assert isinstance(uprobe, Uprobe), uprobe
    return uprobe


def dismiss(*watchers: Watcher) -> None:
    """They were waited for: from here on no handler of theirs may run."""
    for watcher in watchers:
        watcher.gone = True
        kfree(watcher)


# ------------------------------------------------------------------------------------ what tasks do


def hitter(world: World, rng: random.Random) -> None:
    """Execute breakpoints, or what was one a moment ago, in either address space."""
    regs = PtRegs()
    while not world.stop:
        hot = rng.random() < 0.7
        current().mm = world.hot if hot else world.still
        regs.ip = (HOT_TEXT if hot else rng.choice(TEXTS)) + rng.choice(OFFSETS) + 1
        if fetch_opcode(current().mm, regs.ip - 1) != UPROBE_SWBP_INSN:
            continue
        note("hit")
        exc_int3(regs)
        finish_step(regs)
        if forced_signals():
            world.fail("P10: a breakpoint of ours was taken for somebody else's")


def registrar(world: World, rng: random.Random) -> None:
    """Register and unregister in every way there is."""
    while not world.stop:
        n, offset = rng.randrange(2), rng.choice(OFFSETS)
        watcher = new_watcher(offset)
        watcher.refuses = rng.choice((None, None, world.still, world.hot))
        if offset not in OFFSETS[::4] and not rng.randrange(4):
            watcher.answer = UPROBE_HANDLER_REMOVE
        uprobe = register(world, n, offset, watcher)
        note("register")
        if watcher.refuses is not None:
            note("filter refuses")
            if rng.randrange(2):
                watcher.refuses = None
                if uprobe_apply(uprobe, watcher, True):
                    world.fail("uprobe_apply() does not know a consumer that is registered")
                note("apply")
        uprobe_unregister(uprobe, watcher)
        dismiss(watcher)


def batcher(world: World, rng: random.Random) -> None:
    """Several unregisters for one sync."""
    while not world.stop:
        offsets = rng.sample(OFFSETS, 4)
        leaving = [(register(world, rng.randrange(2), o, w), w) for o in offsets for w in [new_watcher(o)]]
        for uprobe, watcher in leaving:
            uprobe_unregister_nosync(uprobe, watcher)
        uprobe_unregister_sync()
        dismiss(*(watcher for _uprobe, watcher in leaving))
        note("batch")


def remapper(world: World, rng: random.Random) -> None:
    """The hot address space: another program in place of this one, nothing there for a moment, a split."""
    while not world.stop:
        choice = rng.randrange(3)
        if choice == 0:
            munmap(world.hot, HOT_TEXT, PAGE_SIZE)
            note("unmap")
        elif choice == 1 and vma_lookup_locked(world.hot, HOT_TEXT):
            mprotect(world.hot, HOT_TEXT, PAGE_SIZE, prot.PROT_READ)
            mprotect(world.hot, HOT_TEXT, PAGE_SIZE, prot.PROT_READ | prot.PROT_EXEC)
            note("protect")
        map_code(world.hot, rng.choice(world.files), HOT_TEXT)
        note("remap")
        time.sleep(0.0005)


def vma_lookup_locked(mm: MmStruct, address: int) -> bool:
    """Whether something is mapped there, at this moment."""
    mmap_read_lock(mm)
    found = vma_lookup(mm, address) is not None
    mmap_read_unlock(mm)
    return found


def mover(world: World, rng: random.Random) -> None:
    """The still address space: its second program moves up and back, with its breakpoints.

    Not beside a registration, which would miss it, as in Linux (docs/findings/register-mremap.md).
    """
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    here, there = TEXTS[1], TEXTS[1] + MOVED
    while not world.stop:
        for source, target in ((here, there), (there, here)):
            if not world.bare_mremap:
                uprobe_start_dup_mmap()
            moved_to = mremap(world.still, source, PAGE_SIZE, PAGE_SIZE, flags, target)
            if not world.bare_mremap:
                uprobe_end_dup_mmap()
            if moved_to != target:
                world.fail("mremap() did not move the program")
            note("move")
            time.sleep(rng.random() * 0.002)


def forker(world: World, rng: random.Random) -> None:
    """Children of the still address space: most hit something and end, some stay."""
    regs = PtRegs()
    while not world.stop:
        child = fork(world.still)
        note("fork")
        current().mm = child
        regs.ip = TEXTS[0] + rng.choice(OFFSETS) + 1
        if fetch_opcode(child, regs.ip - 1) == UPROBE_SWBP_INSN:
            note("hit in a child")
            exc_int3(regs)
            finish_step(regs)
            if forced_signals():
                world.fail("P10: a child's breakpoint was taken for somebody else's")
        current().mm = None
        if len(world.children) < CHILDREN:
            world.children.append(child)
        else:
            mmput(child)
        time.sleep(rng.random() * 0.005)


def finder(world: World, rng: random.Random) -> None:
    """Look permanent probes up while the tree changes."""
    keys = list(world.permanent)
    while not world.stop:
        n, offset = key = rng.choice(keys)
        rcu_read_lock_trace()
        found = find_uprobe_rcu(world.files[n].f_inode, offset)
        rcu_read_unlock_trace()
        if found is not world.permanent[key]:
            world.fail(f"P6: the probe {key} is always there, but {found!r} was found")
        note("find")


ROLES: tuple[Callable[[World, random.Random], None], ...] = (
    hitter,
    registrar,
    batcher,
    remapper,
    mover,
    forker,
    finder,
)
REQUIRED = (
    "handler",
    "register",
    "filter refuses",
    "apply",
    "batch",
    "remap",
    "unmap",
    "protect",
    "move",
    "fork",
    "find",
)
"""A run that did not meet one of these has shown nothing about it."""
