"""Uprobes on real threads: hits, registrations, remappings at once, judged by what must always hold.

Run it for longer: KMODEL_STRESS_SECONDS=600 python -m pytest stress/test_uprobes_life.py, or as a program:
python -m stress.test_uprobes_life --seconds 600 --seed 7 --threads 6
"""

import argparse
import mmap as prot
import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from kmodel.core import boot, current, engine, is_freed, kernel_struct, kernel_warnings, kthread_run, untraced
from kmodel.fs import PAGE_SIZE, open_file
from kmodel.mm import MmStruct, mmap
from kmodel.slab import kfree, kzalloc
from kmodel.uprobes import (
    PtRegs,
    Uprobe,
    UprobeConsumer,
    forced_signals,
    handle_swbp,
    lifetime,
    tree,
    uprobe_register,
    uprobe_unregister_nosync,
    uprobe_unregister_sync,
)

pytestmark = pytest.mark.stress

TEXT = 0x400000
OFFSETS = tuple(range(0x10, 0x110, 0x10))
MAP_FIXED = 0x10


@kernel_struct
class Watcher(UprobeConsumer):
    """A consumer that knows which place it watches and whether it may still be called."""

    file: Any = untraced(default=None)
    offset: int = untraced(default=0)
    gone: bool = untraced(default=False)


class World:
    """Two programs with probes at the same offsets, one address where now this, now that one is mapped."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.stop = False
        self.wrong: list[str] = []
        self.counts: dict[str, int] = {}
        self.mm = MmStruct()
        self.files = [open_file(f"/bin/prog{n}", contents=b"\x90" * PAGE_SIZE) for n in range(2)]
        self.permanent: dict[tuple[int, int], Uprobe] = {}
        map_program(self.mm, self.files[0])
        for n, file in enumerate(self.files):
            for offset in OFFSETS[::4]:
                self.permanent[n, offset] = register(file, offset)[0]

    def fail(self, what: str) -> None:
        """Record something that must not happen."""
        self.wrong.append(what)
        self.stop = True


def map_program(mm: MmStruct, file: Any) -> None:
    """Replace whatever is at TEXT."""
    mmap(mm, TEXT, PAGE_SIZE, prot.PROT_READ | prot.PROT_EXEC, prot.MAP_PRIVATE | MAP_FIXED, file, 0)


def on_hit(uc: Any, regs: PtRegs, data: Any) -> int:
    """The handler: called at its own place, and not after goodbye."""
    world: World = current().local["world"]
    if uc.gone:
        world.fail("P7: a handler was called after uprobe_unregister_sync()")
    if regs.ip != TEXT + uc.offset:
        world.fail(f"P1: the handler for {uc.offset:#x} was called at {regs.ip:#x}")
    return 0


def register(file: Any, offset: int) -> tuple[Uprobe, Watcher]:
    """Register a consumer of its own."""
    watcher = kzalloc(Watcher)
    assert watcher is not None
    watcher.handler = on_hit
    watcher.file = file
    watcher.offset = offset
    uprobe = uprobe_register(file.f_inode, offset, 0, watcher)
    assert isinstance(uprobe, Uprobe), uprobe
    return uprobe, watcher


def hitter(world: World, rng: random.Random) -> int:
    """Execute breakpoints."""
    current().mm = world.mm
    regs = PtRegs()
    n = 0
    while not world.stop:
        regs.ip = TEXT + rng.choice(OFFSETS) + 1
        handle_swbp(regs)
        n += 1
        if forced_signals():
            world.fail("P10: a breakpoint of ours was taken for somebody else's")
    return n


def remapper(world: World, rng: random.Random) -> int:
    """Map now one program, now the other."""
    n = 0
    while not world.stop:
        map_program(world.mm, rng.choice(world.files))
        n += 1
        time.sleep(0.0005)
    return n


def registrar(world: World, rng: random.Random) -> int:
    """Register and unregister, several unregisters for one sync."""
    leaving: list[Watcher] = []
    n = 0
    while not world.stop:
        uprobe, watcher = register(rng.choice(world.files), rng.choice(OFFSETS))
        uprobe_unregister_nosync(uprobe, watcher)
        leaving.append(watcher)
        n += 1
        if len(leaving) == 4:
            drop(leaving)
    drop(leaving)
    return n


def drop(leaving: list[Watcher]) -> None:
    """One sync for all of them, then free them."""
    uprobe_unregister_sync()
    for watcher in leaving:
        watcher.gone = True
        kfree(watcher)
    leaving.clear()


def descender(world: World, rng: random.Random) -> int:
    """Look permanent probes up while the tree changes."""
    from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace

    keys = list(world.permanent)
    n = 0
    while not world.stop:
        which, offset = key = rng.choice(keys)
        rcu_read_lock_trace()
        found = tree.find_uprobe_rcu(world.files[which].f_inode, offset)
        rcu_read_unlock_trace()
        if found is not world.permanent[key]:
            world.fail(f"P6: the probe {key} is always there, but {found!r} was found")
        n += 1
    return n


def torture(seconds: float, seed: int, threads: int) -> World:
    """Run all of them at once; the world says what happened."""
    boot()
    world = World(seed)
    roles: list[Callable[[World, random.Random], int]] = [hitter, registrar, remapper, descender]

    def body(role: Callable[[World, random.Random], int], n: int) -> None:
        current().local["world"] = world
        try:
            done = role(world, random.Random(seed * 1000 + n))
            world.counts[role.__name__] = world.counts.get(role.__name__, 0) + done
        except BaseException as error:
            world.fail(f"{role.__name__}: {type(error).__name__}: {error}")
            raise

    tasks = [
        kthread_run(
            body, roles[n % len(roles)], n, comm=f"{roles[n % len(roles)].__name__}/{n}", daemon=False
        )
        for n in range(max(threads, len(roles)))
    ]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not world.stop:
        time.sleep(0.05)
    world.stop = True
    for task in tasks:
        try:
            # A task that died may have left with a lock that others wait for: then that is the news.
            assert engine().join(task, 5.0 if world.wrong else 60.0), f"{task!r} does not end"
        except Exception as error:  # noqa: BLE001  # whatever a task died of is what was wrong
            world.wrong.append(f"{task!r}: {error!r}")
    lifetime.wait_for_frees()
    tree.check_invariants()
    return world


def judge(world: World) -> None:
    """Nothing wrong, no warning, the tree holds exactly the permanent probes, and everybody did something."""
    assert world.wrong == []
    assert kernel_warnings() == ()
    assert set(tree.uprobes()) == set(world.permanent.values())
    assert all(uprobe.ref == 1 and not is_freed(uprobe) for uprobe in world.permanent.values())
    assert min(world.counts.values()) > 0, world.counts


def test_uprobes_torture() -> None:
    """Hits, registrations and remappings on real threads break no property."""
    judge(torture(float(os.environ.get("KMODEL_STRESS_SECONDS", "2")), seed=1, threads=4))


def main() -> None:
    """The same for as long as you like."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=4)
    args = parser.parse_args()
    world = torture(args.seconds, args.seed, args.threads)
    print(f"seed {args.seed}: {world.counts}")
    judge(world)


if __name__ == "__main__":
    main()
