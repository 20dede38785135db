"""Every scheme does the same: hits, misses, removals, register and unregister, with the same results."""

from collections.abc import Iterator
from typing import Any

import pytest

from kmodel.core import LockingBug, boot, current, is_freed, kernel_warnings
from kmodel.mm import MmStruct, mmap_write_lock, mmap_write_unlock
from kmodel.uprobes import (
    ALL_SCHEMES,
    SCHEMES,
    UPROBE_HANDLER_REMOVE,
    PtRegs,
    Scheme,
    UprobeConsumer,
    forced_signals,
    lifetime,
    protection,
    ref_count,
    references,
    tree,
    treelock,
    uprobe_register,
    uprobe_scheme,
    uprobe_unregister,
    uprobe_unregister_nosync,
    uprobe_unregister_sync,
)
from tests.uprobes.stories import Gate, join, kthread_run
from tests.uprobes.world import TEXT, map_text, new_file, opcode, recorder, registered

INT3 = 0xCC


@pytest.fixture(params=ALL_SCHEMES.values(), ids=lambda scheme: scheme.name)
def scheme(request: pytest.FixtureRequest) -> Iterator[Scheme]:
    """Each scheme in its turn, on a model booted with it."""
    with uprobe_scheme(request.param):
        boot()
        yield request.param
        lifetime.wait_for_frees()


class World:
    """A program mapped at TEXT with a probe at 0x11, a nop."""

    def __init__(self) -> None:
        self.mm = MmStruct()
        current().mm = self.mm
        self.file = new_file()
        map_text(self.mm, self.file)
        self.uc = recorder()
        self.uprobe = registered(self.file, 0x11, self.uc)


def hit(scheme: Scheme, at: int) -> int:
    """Execute the breakpoint at TEXT + at; where the task goes on, from TEXT."""
    regs = PtRegs(ip=TEXT + at + 1)
    scheme.handle_swbp(regs)
    return regs.ip - TEXT


def test_a_hit_runs_the_handler(scheme: Scheme) -> None:
    """One call, the nop emulated, and as many references as before."""
    world = World()

    assert hit(scheme, 0x11) == 0x12
    assert world.uc.calls == [TEXT + 0x11]
    assert references.implementation.users(world.uprobe) == 1


def test_lookups_find_what_is_there(scheme: Scheme) -> None:
    """The uprobe where one is, None elsewhere, in a hole too."""
    world = World()

    assert scheme.lookup(TEXT + 0x11, current()) is world.uprobe
    assert scheme.lookup(TEXT + 0x12, current()) is None
    assert scheme.lookup(0x1000, current()) is None


def test_no_breakpoint_of_ours(scheme: Scheme) -> None:
    """Where an ordinary instruction is the task executes it; nothing is signalled."""
    World()

    assert hit(scheme, 0x20) == 0x20
    assert forced_signals() == []


def test_somebody_elses_breakpoint(scheme: Scheme) -> None:
    """A trap that is in the file and not ours is SIGTRAP."""
    mm = MmStruct()
    current().mm = mm
    map_text(mm, new_file("/bin/traps", b"\xcc" * 0x2000))
    registered(new_file(), 0x11)

    hit(scheme, 0x20)

    assert len(forced_signals()) == 1


def test_two_consumers_share_the_uprobe(scheme: Scheme) -> None:
    """The second registration finds the first's uprobe; the last unregister frees it."""
    world = World()
    second = recorder()
    assert registered(world.file, 0x11, second) is world.uprobe
    assert references.implementation.users(world.uprobe) == 2

    uprobe_unregister(world.uprobe, world.uc)
    hit(scheme, 0x11)
    assert (len(world.uc.calls), len(second.calls)) == (0, 1)
    assert not is_freed(world.uprobe)

    uprobe_unregister(world.uprobe, second)
    lifetime.wait_for_frees()
    assert is_freed(world.uprobe)
    assert opcode(world.mm, TEXT + 0x11) == 0x90
    assert tree.uprobes() == []


def test_register_again_after_unregister(scheme: Scheme) -> None:
    """A place can be probed again at once, while the old uprobe may still be dying."""
    world = World()
    uprobe_unregister_nosync(world.uprobe, world.uc)
    again = recorder()
    registered(world.file, 0x11, again)
    uprobe_unregister_sync()

    hit(scheme, 0x11)

    assert (world.uc.calls, again.calls) == ([], [TEXT + 0x11])
    tree.check_invariants()
    assert len(tree.uprobes()) == 1


def test_a_handler_can_ask_for_removal(scheme: Scheme) -> None:
    """UPROBE_HANDLER_REMOVE takes the breakpoint out of this mm."""
    mm = MmStruct()
    current().mm = mm
    file = new_file()
    map_text(mm, file)
    wanted = [True]

    def filter_it(uc: Any, mm: Any) -> bool:
        return wanted[0]

    def handler(uc: Any, regs: PtRegs, data: Any) -> int:
        wanted[0] = False
        return UPROBE_HANDLER_REMOVE

    uprobe_register(file.f_inode, 0x11, 0, UprobeConsumer(handler=handler, filter=filter_it))
    assert opcode(mm, TEXT + 0x11) == INT3

    hit(scheme, 0x11)

    assert opcode(mm, TEXT + 0x11) == 0x90


def test_new_mappings_get_the_breakpoint(scheme: Scheme) -> None:
    """uprobe_mmap() walks the tree by the scheme's lock, and puts what it took."""
    world = World()
    other = MmStruct()
    map_text(other, world.file)

    assert opcode(other, TEXT + 0x11) == INT3
    assert references.implementation.users(world.uprobe) == 1


def test_unregister_waits_for_a_handler(scheme: Scheme) -> None:
    """uprobe_unregister() does not return while a handler of the consumer runs (P7)."""
    gate = Gate()
    world = World()
    world.uc.then = lambda uc, regs: gate.stop()

    def hitter() -> None:
        current().mm = world.mm
        hit(scheme, 0x11)

    done = []

    def unregisterer() -> None:
        gate.wait()
        uprobe_unregister_nosync(world.uprobe, world.uc)
        opener = kthread_run(lambda: (done.append("handler"), gate.open()), comm="opener", daemon=False)
        uprobe_unregister_sync()
        done.append("sync")
        join(opener)

    tasks = [
        kthread_run(hitter, comm="hitter", daemon=False),
        kthread_run(unregisterer, comm="u", daemon=False),
    ]
    for task in tasks:
        join(task)
    assert done == ["handler", "sync"]


def test_the_block_puts_everything_back() -> None:
    """After the block the model's own treelock, references and protection are there again."""
    for scheme in ALL_SCHEMES.values():
        with uprobe_scheme(scheme):
            pass
    assert treelock.implementation is treelock.RWLOCK
    assert references.implementation is ref_count
    assert protection.implementation is protection.TASKS_TRACE


def test_uprobes_outlive_a_change_of_scheme() -> None:
    """Uprobes that are registered go on, hit for hit, with their references counted anew."""
    world = World()
    second = recorder()
    registered(world.file, 0x11, second)
    for scheme in ALL_SCHEMES.values():
        with uprobe_scheme(scheme):
            hit(scheme, 0x11)
            assert references.implementation.users(world.uprobe) == 2
    assert len(world.uc.calls) == len(second.calls) == len(ALL_SCHEMES)
    uprobe_unregister(world.uprobe, second)
    uprobe_unregister(world.uprobe, world.uc)
    lifetime.wait_for_frees()
    assert is_freed(world.uprobe)


def test_the_vma_lock_leaves_mmap_lock_alone() -> None:
    """With the per-VMA lock a hit gets by while mmap_lock is write-locked; with mmap_lock it could not."""
    world = World()
    mmap_write_lock(world.mm)

    assert ALL_SCHEMES["RCU tree + VMA lock"].lookup(TEXT + 0x11, current()) is world.uprobe
    with pytest.raises(LockingBug):
        SCHEMES["RCU tree + refcount + mmap_lock"].lookup(TEXT + 0x11, current())

    mmap_write_unlock(world.mm)


def test_plain_schemes_are_the_default_ones() -> None:
    """SCHEMES are those of ALL_SCHEMES that need no block."""
    assert set(SCHEMES) < set(ALL_SCHEMES)
    assert "full speculation" in SCHEMES
    assert "full speculation + SRCU" not in SCHEMES
    assert kernel_warnings() == ()
