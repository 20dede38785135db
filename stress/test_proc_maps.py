"""Readers of /proc/PID/maps and PROCMAP_QUERY against remappers, on real threads.

Run it for longer: KMODEL_STRESS_SECONDS=600 python -m pytest stress/test_proc_maps.py

The address space is laid out in stretches of PAGES pages. In a `permanent` stretch every page is mapped at
every
moment, whatever replaces what; the last page of a `holed` one is never mapped; the rest comes and goes.
"""

import random
import time
from errno import ENOENT
from typing import Any, Final

import attrs
import pytest

from kmodel.core import boot, engine, kernel_warnings, kthread_run
from kmodel.fs import File, flush_delayed_fput, fput, open_file, prune_icache
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    MmStruct,
    mm_alloc,
    mmap,
    mmput,
    mprotect,
    munmap,
)
from kmodel.mm.from_proc_maps import MapsLine, parse_maps
from kmodel.proc import maps_variants, proc_maps, procmap_query
from kmodel.rcu import rcu_barrier
from kmodel.slab import leak_report

BASE: Final = 0x10_0000_0000
PAGES: Final = 16
STRETCHES: Final = 6
PROTS: Final = (PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC)
ANON: Final = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED


def address(stretch: int, page: int) -> int:
    """Of a page of a stretch."""
    return BASE + (stretch * PAGES + page) * PAGE_SIZE


def is_permanent(stretch: int) -> bool:
    """Whether all of it is always mapped."""
    return stretch % 2 == 0


@attrs.define
class Tally:
    """What a reader met."""

    texts: int = 0
    lines: int = 0
    merged: int = 0
    answers: int = 0
    holes: int = 0
    errors: list[str] = attrs.field(factory=list)


def files() -> list[File]:
    """Some to map."""
    return [open_file(f"/lib/{n}", size=64 * PAGE_SIZE, ino=n + 1) for n in range(4)]


def remap(mm: MmStruct, opened: list[File], mine: int, seed: int, deadline: float) -> None:
    """Replace, protect, and where it is allowed unmap, parts of the stretches that are this task's."""
    choose = random.Random(seed)
    stretches = [stretch for stretch in range(STRETCHES) if stretch % 2 == mine % 2]
    while time.monotonic() < deadline:
        stretch = choose.choice(stretches)
        usable = PAGES if is_permanent(stretch) else PAGES - 1
        first = choose.randrange(usable)
        pages = choose.randint(1, usable - first)
        at, length = address(stretch, first), pages * PAGE_SIZE
        what = choose.random()
        if what < 0.4:
            mmap(mm, at, length, choose.choice(PROTS), ANON)
        elif what < 0.6:
            mmap(mm, at, length, PROT_READ, MAP_PRIVATE | MAP_FIXED, choose.choice(opened), first)
        elif is_permanent(stretch):
            mprotect(mm, at, length, choose.choice(PROTS))
        else:
            munmap(mm, at, length)


def read(mm: MmStruct, variant: str, deadline: float, tally: Tally) -> None:
    """Whole texts, over and over."""
    while time.monotonic() < deadline:
        lines = parse_maps(proc_maps(mm, variant))
        tally.texts += 1
        tally.lines += len(lines)
        judge(lines, tally)


def judge(lines: list[MapsLine], tally: Tally) -> None:
    """The oracle: what is always mapped is covered, what never is is not, places only go up, names fit."""
    covered = BASE
    for line in lines:
        if line.end <= covered:
            tally.errors.append(f"back to {line} from {covered:#x}")
        if line.start > covered:
            page, behind = divmod(covered - BASE, PAGE_SIZE)[0], (line.start - BASE) // PAGE_SIZE
            lost = [n for n in range(page, behind) if is_permanent(n // PAGES)]
            if lost:
                tally.errors.append(f"a hole from {covered:#x} to {line.start:#x}, which always is mapped")
        tally.merged += line.start < covered
        covered = line.end
        for page in range((line.start - BASE) // PAGE_SIZE, (line.end - BASE) // PAGE_SIZE):
            if page % PAGES == PAGES - 1 and not is_permanent(page // PAGES):
                tally.errors.append(f"{line} covers a page that never is mapped")
        if line.is_file and line.name != f"/lib/{line.ino - 1}":
            tally.errors.append(f"{line} has the name of another file")
    if is_permanent(STRETCHES - 1) and covered != address(STRETCHES, 0):
        tally.errors.append(f"the text ends at {covered:#x}")


def query(mm: MmStruct, seed: int, deadline: float, tally: Tally) -> None:
    """Single questions: the answer covers the address, and a permanent one always has one."""
    choose = random.Random(seed)
    while time.monotonic() < deadline:
        page = choose.randrange(STRETCHES * PAGES)
        addr = BASE + page * PAGE_SIZE
        try:
            answer, name, _build_id = procmap_query(mm, addr)
        except OSError as error:
            tally.holes += 1
            if error.errno != ENOENT or is_permanent(page // PAGES):
                tally.errors.append(f"{addr:#x}: {error}")
            continue
        tally.answers += 1
        if not answer.vma_start <= addr < answer.vma_end:
            tally.errors.append(f"{addr:#x} is answered with {answer}")
        if name != (b"/lib/%d" % (answer.inode - 1) if answer.inode else b""):
            tally.errors.append(f"{answer} has the name {name!r}")


def start(mm: MmStruct) -> None:
    """Everything that is mapped always."""
    for stretch in filter(is_permanent, range(STRETCHES)):
        mmap(mm, address(stretch, 0), PAGES * PAGE_SIZE, PROT_READ, ANON)


@pytest.mark.parametrize("variant", tuple(maps_variants()))
def test_what_always_is_mapped_is_always_shown(variant: str, seconds: float, seed: int) -> None:
    """No hole that never was, no stranger's name, no warning, no leak; and the readers did meet change."""
    boot()
    mm: Any = mm_alloc()
    start(mm)
    opened = files()
    deadline = time.monotonic() + seconds
    tallies = [Tally() for _ in range(3)]
    tasks = [kthread_run(remap, mm, opened, n, seed + n, deadline, daemon=False) for n in range(2)]
    tasks += [kthread_run(read, mm, variant, deadline, tally, daemon=False) for tally in tallies[:2]]
    tasks.append(kthread_run(query, mm, seed + 9, deadline, tallies[2], daemon=False))
    for task in tasks:
        assert engine().join(task, timeout=seconds + 60)

    print(variant, *tallies)
    assert [error for tally in tallies for error in tally.errors] == []
    assert kernel_warnings() == ()
    judge(parse_maps(proc_maps(mm, variant)), tallies[0])
    assert tallies[0].errors == []
    mmput(mm)
    for file in opened:
        fput(file)
    flush_delayed_fput()
    prune_icache()
    rcu_barrier()
    assert leak_report() == ""
    assert all(tally.texts for tally in tallies[:2])
    assert tallies[2].answers > 0
    assert tallies[2].holes > 0


def test_the_oracle_can_fail() -> None:
    """A text with a hole, one that goes back, and one with another file's name are found out."""
    whole = [
        MapsLine(address(n, 0), address(n, PAGES), "r--p", 0, (0, 0), 0, "") for n in range(0, STRETCHES, 2)
    ]
    tally = Tally()
    judge(whole, tally)
    assert tally.errors == []
    for broken in (
        whole[:1] + whole[2:],
        [whole[0], whole[0], *whole[1:]],
        [attrs.evolve(whole[0], ino=3, name="/lib/1"), *whole[1:]],
        [attrs.evolve(whole[0], end=address(1, PAGES)), *whole[1:]],
    ):
        tally = Tally()
        judge(broken, tally)
        assert len(tally.errors) == 1
