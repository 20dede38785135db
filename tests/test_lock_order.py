"""docs/lock-order.md is the order in which the model takes its locks."""

import linecache
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from kmodel.core import boot, current, lockdep
from kmodel.fs import fput, open_file
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    MmStruct,
    brk,
    fork,
    mmap,
    mmput,
    mprotect,
    mremap,
    munmap,
    user_store,
)
from kmodel.sync import flush_scheduled_work
from kmodel.uprobes import (
    PtRegs,
    UprobeConsumer,
    handle_swbp,
    uprobe_register,
    uprobe_unregister_nosync,
    uprobe_unregister_sync,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "lock-order.md"
BASE = 0x400000
RX = PROT_READ | PROT_EXEC
# The last word of what a call locks: down_write(mapping.i_mmap_rwsem), mutex_lock(uprobes_mmap_hash(inode)).
LOCKED = re.compile(r"\b(?!\w*unlock)\w*(?:down|lock)\w*\((?:[\w.]*\.)?(\w+)")
INTERNAL = "a lock inside sync/"
ALIASES = {"uprobes_mmap_hash": "uprobes_mmap_mutex", "rwsem": "anon_vma.rwsem"}


def documented() -> dict[str, int]:
    """Each lock of the document's list and its line there; below means inside."""
    block = re.search(r"(?:^    .*\n)+", DOCUMENT.read_text(), re.MULTILINE)
    assert block is not None
    words = [re.split(r"[ \[]", line.strip())[0] for line in block[0].splitlines()]
    names = ["anon_vma.rwsem" if word.startswith("anon_vma.") else word.split(".")[-1] for word in words]
    return {name: at for at, name in enumerate([*names, INTERNAL])}


def name_of(frame: FrameType | None) -> str:
    """The lock's name, from the line outside sync/ that takes it; INTERNAL if that takes none."""
    while frame is not None:
        where = frame.f_code.co_filename
        if "/kmodel/sync/" not in where and not where.endswith("lockdep.py"):
            found = LOCKED.search(linecache.getline(where, frame.f_lineno))
            return ALIASES.get(found[1], found[1]) if found is not None else INTERNAL
        frame = frame.f_back
    return INTERNAL


@pytest.fixture
def nestings(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Every (held, taken) pair of locks since the fixture began."""
    seen: set[tuple[str, str]] = set()
    names: dict[int, str] = {}
    real = lockdep.lock_acquire

    def lock_acquire(lock: Any, mode: str = "write", *, atomic: bool = False) -> None:
        names[id(lock)] = name = name_of(sys._getframe(1))
        seen.update((names[id(held)], name) for held, _mode in current().held_locks)
        real(lock, mode, atomic=atomic)

    for module in list(sys.modules.values()):
        if module.__name__.startswith("kmodel.") and getattr(module, "lock_acquire", None) is real:
            monkeypatch.setattr(module, "lock_acquire", lock_acquire)
    boot()
    return seen


def busy_process() -> None:
    """Map, split, merge, move, write, fork, probe, hit and undo it all."""
    mm = MmStruct()
    current().mm = mm
    file = open_file("/bin/prog", contents=b"\x90" * 8 * PAGE_SIZE)
    mmap(mm, BASE, 8 * PAGE_SIZE, RX, MAP_PRIVATE | MAP_FIXED, file, 0)
    consumer = UprobeConsumer(handler=lambda _uc, _regs, _data: 0)
    uprobe = uprobe_register(file.f_inode, 0x10, 0, consumer)
    regs = PtRegs()
    regs.ip = BASE + 0x10 + 1
    handle_swbp(regs)
    mprotect(mm, BASE + PAGE_SIZE, PAGE_SIZE, PROT_READ | PROT_WRITE)
    user_store(mm, BASE + PAGE_SIZE, b"x")
    mprotect(mm, BASE + PAGE_SIZE, PAGE_SIZE, RX)
    heap = mmap(mm, 0, 4 * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
    user_store(mm, heap, b"x")
    heap = mremap(mm, heap, 4 * PAGE_SIZE, 64 * PAGE_SIZE, 1)
    munmap(mm, heap + PAGE_SIZE, PAGE_SIZE)
    brk(mm, 0)
    child = fork(mm)
    mmput(child)
    mmap(mm, BASE + 16 * PAGE_SIZE, PAGE_SIZE, RX, MAP_PRIVATE | MAP_FIXED, file, 0)
    uprobe_unregister_nosync(uprobe, consumer)
    uprobe_unregister_sync()
    flush_scheduled_work()
    fput(file)
    mmput(mm)
    current().mm = None


def test_locks_nest_as_the_document_says(nestings: set[tuple[str, str]]) -> None:
    """Whatever a busy process locks while it holds something else stands below it in the list."""
    order = documented()

    busy_process()

    unknown = {name for pair in nestings for name in pair} - set(order)
    assert unknown == set()
    wrong = {(held, taken) for held, taken in nestings if order[held] > order[taken]}
    assert wrong == set()
    # Enough was done for this to mean something.
    assert {("register_rwsem", "dup_mmap_sem"), ("mmap_lock", "i_mmap_rwsem")} <= nestings
    assert ("uprobes_mmap_mutex", "consumer_rwsem") in nestings
