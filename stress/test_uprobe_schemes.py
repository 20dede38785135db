"""Every scheme of the uprobe lookup on real threads: hits beside register and unregister, and nothing breaks.

For longer: KMODEL_STRESS_SECONDS=10 python -m pytest stress/test_uprobe_schemes.py (seconds for each scheme).
"""

import mmap as prot
import os
import random
import time
from typing import Any

import pytest

from kmodel.core import boot, current, engine, is_freed, kernel_warnings, kthread_run
from kmodel.fs import PAGE_SIZE, open_file
from kmodel.mm import MmStruct, mmap
from kmodel.uprobes import (
    ALL_SCHEMES,
    PtRegs,
    Scheme,
    Uprobe,
    UprobeConsumer,
    forced_signals,
    lifetime,
    references,
    tree,
    uprobe_register,
    uprobe_scheme,
    uprobe_unregister,
)

pytestmark = pytest.mark.stress

TEXT = 0x400000
PERMANENT, COMING_AND_GOING = 0x10, 0x20
SECONDS = float(os.environ.get("KMODEL_STRESS_SECONDS", "0.3"))


class World:
    """A program with one probe that stays and one that comes and goes; what the tasks counted and
    complained of.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.mm = MmStruct()
        self.file = open_file("/bin/prog", contents=b"\x90" * PAGE_SIZE)
        mmap(self.mm, TEXT, PAGE_SIZE, prot.PROT_READ | prot.PROT_EXEC, prot.MAP_PRIVATE, self.file, 0)
        self.permanent = self.register(PERMANENT, UprobeConsumer(handler=count))
        self.stop = False
        self.wrong: list[str] = []
        self.registered = 0

    def register(self, offset: int, uc: UprobeConsumer) -> Uprobe:
        """uprobe_register() that must succeed."""
        uprobe = uprobe_register(self.file.f_inode, offset, 0, uc)
        assert isinstance(uprobe, Uprobe), uprobe
        return uprobe


def count(uc: Any, regs: PtRegs, data: Any) -> int:
    """Count in a register of the hitting task."""
    regs.gpr[0] += 1
    return 0


def hitter(world: World, seed: int) -> None:
    """Execute both breakpoints; the permanent one's handler is called every time."""
    current().mm = world.mm
    rng = random.Random(seed)
    regs = PtRegs()
    hits = 0
    while not world.stop:
        offset = rng.choice((PERMANENT, COMING_AND_GOING))
        before = regs.gpr[0]
        regs.ip = TEXT + offset + 1
        world.scheme.handle_swbp(regs)
        if offset == PERMANENT and regs.gpr[0] != before + 1:
            world.wrong.append("P6: the permanent probe was not found")
        hits += 1
    if forced_signals():
        world.wrong.append("P10: a breakpoint of ours was taken for a stranger's")
    assert hits


def registrar(world: World) -> None:
    """Register and unregister at one place, and see that no handler is called afterwards."""
    while not world.stop:
        gone = False

        def handler(uc: Any, regs: PtRegs, data: Any) -> int:
            if gone:  # noqa: B023  # this round's, by intention
                world.wrong.append("P7: a handler was called after uprobe_unregister()")
            return 0

        uc = UprobeConsumer(handler=handler)
        uprobe_unregister(world.register(COMING_AND_GOING, uc), uc)
        gone = True
        world.registered += 1


@pytest.mark.parametrize("scheme", ALL_SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_hits_beside_registrations(scheme: Scheme) -> None:
    """Two tasks hit, two register: every permanent hit is handled, nothing warns, every uprobe is freed."""
    with uprobe_scheme(scheme):
        boot()
        world = World(scheme)
        tasks = [kthread_run(hitter, world, seed, comm=f"hitter/{seed}", daemon=False) for seed in range(2)]
        tasks += [kthread_run(registrar, world, comm=f"registrar/{n}", daemon=False) for n in range(2)]
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline or (world.registered < 3 and time.monotonic() < deadline + 20):
            time.sleep(0.02)
        world.stop = True
        for task in tasks:
            assert engine().join(task, 60.0), f"{task!r} does not end"
        lifetime.wait_for_frees()
        tree.check_invariants()
        assert world.wrong == []
        assert kernel_warnings() == ()
        assert tree.uprobes() == [world.permanent]
        assert not is_freed(world.permanent)
        assert references.implementation.users(world.permanent) == 1
        assert world.registered >= 3
