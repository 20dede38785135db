"""The torture on one thread: each kind of task, the journal against the model, the oracle against both."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmodel.core import current
from kmodel.mm import vma_lookup
from kmodel.torture import BadUsage, Config, Torture
from kmodel.torture.build import tear_down
from kmodel.torture.journal import NOTHING, Entry, Picture
from kmodel.torture.oracle import TaskLog, Violated
from kmodel.torture.probes import PAGE_SIZE
from kmodel.torture.readers import Descender, Hitter, MapsReader, RefUser
from kmodel.torture.registrar import Registrar
from kmodel.torture.remap import FileChurner, Remapper
from kmodel.torture.roles import DEFAULT_TASKS, ROLES, roles_of
from kmodel.torture.tasks import Task
from kmodel.torture.watch import lock_sequence
from kmodel.torture.world import Member
from kmodel.uprobes import handle_swbp
from tests.torture.tiny_elf import TEXT_OFFSET, tiny_elf

PAGES = 16


def maps_file(folder: Path) -> Path:
    """The maps of a process with a C library and a program, functions every 64 bytes in both."""
    places = {f"f{n}": (64 * n, 2) for n in range(PAGES * 64)}
    lines = ""
    for n, name in enumerate(("program", "libc.so.6")):
        path = tiny_elf(folder / name, places, b"\x55" * PAGES * PAGE_SIZE)
        start = 0x7F0000000000 + n * 0x1000000
        lines += (
            f"{start:x}-{start + PAGES * PAGE_SIZE:x} r-xp {TEXT_OFFSET:08x} fe:00 {n + 100}      {path}\n"
        )
    (folder / "maps").write_text(lines)
    return folder / "maps"


@pytest.fixture
def torture(tmp_path: Path) -> Iterator[Torture]:
    """A run that is prepared and taken down again, with nothing left over."""
    made = Torture(Config(seed=1, threads=8, seconds=1.0, maps=str(maps_file(tmp_path))))
    made.prepare()
    task = current()
    before = task.mm
    yield made
    task.mm = before
    task.local.pop("torture", None)
    left = tear_down(made.world)
    made._stack.close()
    assert set(left.values()) == {0}, left


def member(torture: Torture) -> Member:
    """This thread as a task of the run."""
    task = current()
    world = torture.world
    log = TaskLog("test/0")
    me = Member(world, world.processes[0], log, task, random.Random(1), lambda _me: None)
    task.mm = me.process.mm
    task.local["torture"] = me
    world.oracle.logs.append(log)
    return me


def work(torture: Torture, kind: type[Task], steps: int) -> tuple[Member, Task]:
    """That many steps of one kind of task."""
    me = member(torture)
    one = kind(me, random.Random(1))
    for _ in range(steps):
        one.step()
    return me, one


def test_the_journal_agrees_with_the_address_space(torture: Torture) -> None:
    """After any remapping each contested address shows what the journal says."""
    work(torture, Remapper, 60)

    for process in torture.world.processes:
        for address, slot in process.slots.items():
            slot.check_invariants()
            entry = slot.newest()
            assert entry.seq <= lock_sequence(process.mm)
            vma = vma_lookup(process.mm, address)
            if entry.picture.inode is None:
                assert vma is None or vma.vm_file is None
            else:
                assert vma.vm_file.f_inode is entry.picture.inode
                assert vma.vm_pgoff * PAGE_SIZE + address - vma.vm_start == entry.picture.offset


def test_hits_reach_the_right_handlers(torture: Torture) -> None:
    """With mappings standing still every hit of a probe calls its handler, at contested addresses too."""
    work(torture, Remapper, 60)
    me, _hitter = work(torture, Hitter, 200)

    assert me.log.counts["hit"] == 200
    assert me.log.counts["speculation_accepted"] > 100
    assert me.log.counts["handler_call"] > 100
    assert torture.world.oracle.violations == []


def test_registrations_come_and_go(torture: Torture) -> None:
    """What a registrar leaves behind is nothing; a descent finds every permanent probe meanwhile."""
    me, registrar = work(torture, Registrar, 30)
    _same, _descender = work(torture, Descender, 5)
    registrar.finish()

    assert me.log.counts["register"] == me.log.counts["unregister"] > 10


@pytest.mark.parametrize("kind", [RefUser, MapsReader, FileChurner])
def test_the_other_kinds_of_task_work(torture: Torture, kind: type[Task]) -> None:
    """Undisturbed they find nothing wrong and leave nothing behind."""
    _me, one = work(torture, kind, 20)
    one.finish()

    assert torture.world.oracle.violations == []


# ------------------------------------------------------------------------------------------------ it can fail


def test_an_answer_that_contradicts_the_journal_is_found(torture: Torture) -> None:
    """Accepted speculations are compared with the journal: where that lies, the truth is a violation."""
    me, remapper = work(torture, Remapper, 1)
    assert isinstance(remapper, Remapper)
    slot = next(iter(me.slots.values()))
    key = next(k for k in slot.keys if k in torture.world.permanent)
    remapper.replace(slot, key, 3)
    seq = lock_sequence(me.process.mm)
    lie = Picture(key.inode, key.offset + 64, "a lie")
    slot.append(Entry(seq, lie, "liar/0", "lied", 0))
    hitter = Hitter(me, random.Random(1))

    with pytest.raises(Violated):
        hitter.hit(slot.address, handle_swbp)

    (violation,) = torture.world.oracle.violations
    assert violation.property.startswith("P1")
    assert key.label in violation.message
    assert any("mmap_lock_speculate_try_begin" in fact for fact in violation.facts)
    assert any("liar/0: lied" in fact for fact in violation.facts)
    slot.append(Entry(seq, NOTHING, "liar/0", "took it back", 0))


def test_a_handler_after_the_sync_is_found(torture: Torture) -> None:
    """A consumer that was unregistered and synced must not be called."""
    me = member(torture)
    address, key = next(iter(me.process.permanent.items()))
    key.consumer.unregistered = True

    with pytest.raises(Violated):
        Hitter(me, random.Random(1)).hit_permanent(address)

    assert torture.world.oracle.violations[0].property.startswith("P7")


def test_a_missed_probe_is_found(torture: Torture) -> None:
    """A hit of a permanent probe that calls no handler is a violation."""
    me = member(torture)
    address, key = next(iter(me.process.permanent.items()))
    key.consumer.handler, handler = (lambda _uc, _regs, _data: 0), key.consumer.handler

    with pytest.raises(Violated):
        Hitter(me, random.Random(1)).hit_permanent(address)

    assert torture.world.oracle.violations[0].property.startswith("P9")
    key.consumer.handler = handler


# ------------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize("count", [2, 3, 5, DEFAULT_TASKS, 20])
def test_every_kind_of_work_is_done_by_somebody(count: int) -> None:
    """However few tasks there are."""
    assert {role for n in range(count) for role in roles_of(n, count)} == set(ROLES)


@pytest.mark.parametrize(
    ("probe", "complaint"),
    [
        ("{}/program:0x99999", "the kernel refuses it: the offset is past the end of the file (EINVAL)"),
        ("{}/program:0x0", "f_at_0"),
    ],
)
def test_what_the_kernel_refuses(tmp_path: Path, probe: str, complaint: str) -> None:
    """uprobe_register's errors reach the user; what no mapping shows as code gets a mapping of its own."""
    config = Config(
        seed=1, threads=8, seconds=1.0, maps=str(maps_file(tmp_path)), probes=(probe.format(tmp_path),)
    )
    made = Torture(config)
    if complaint == "f_at_0":
        made.prepare()
        assert any(key.offset == 0 for key in made.world.processes[0].permanent.values())
        assert set(tear_down(made.world).values()) == {0}
        made._stack.close()
        return

    with pytest.raises(BadUsage) as refused:
        made.prepare()

    assert complaint in str(refused.value)


def test_a_breakpoint_in_the_file_is_refused(tmp_path: Path) -> None:
    """An offset that holds an int3 already."""
    maps = maps_file(tmp_path)
    content = bytearray((tmp_path / "program").read_bytes())
    content[TEXT_OFFSET + 128] = 0xCC
    (tmp_path / "program").write_bytes(content)
    probe = f"p:trap {tmp_path}/program:{TEXT_OFFSET + 128:#x}"

    with pytest.raises(BadUsage, match="a breakpoint already"):
        Torture(Config(seed=1, threads=8, seconds=1.0, maps=str(maps), probes=(probe,))).prepare()
