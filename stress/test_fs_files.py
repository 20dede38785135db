"""Files closed and reused under readers that take references without a lock, on real threads.

Run it for longer: KMODEL_STRESS_SECONDS=600 python -m pytest stress/test_fs_files.py
"""

import random
import time
from typing import Any

import attrs

from kmodel.core import (
    Struct,
    boot,
    engine,
    kernel_struct,
    kernel_warnings,
    kthread_run,
    rcu_assign_pointer,
    rcu_dereference,
)
from kmodel.fs import (
    File,
    backing_file_open,
    file_ref_read,
    flush_delayed_fput,
    fput,
    fput_close,
    get_file,
    get_file_active,
    get_file_rcu,
    open_file,
    prune_icache,
    unlink,
)
from kmodel.fs import inode as inode_table
from kmodel.rcu import rcu_barrier, rcu_read_lock, rcu_read_unlock
from kmodel.slab import leak_report

SLOTS = 3
PATHS = 4


@kernel_struct
class Slot(Struct):
    """A published pointer to a file whose path begins with the slot's number."""

    file: Any = None


@attrs.define
class Tally:
    """What a reader met."""

    taken: int = 0
    refused: int = 0
    errors: list[str] = attrs.field(factory=list)


def open_for(slot: int, choose: random.Random) -> File:
    """One of the slot's files, now and then through a stacking filesystem."""
    path = f"{slot}/{choose.randrange(PATHS)}"
    if choose.random() < 0.3:
        return backing_file_open(f"user/{path}", path, size=4096)
    return open_file(path, size=4096)


def swap(slots: list[Slot], mine: int, seed: int, deadline: float) -> None:
    """Close the own slot's file, open another; sometimes unlink what was open."""
    choose = random.Random(seed)
    slot = slots[mine]
    while time.monotonic() < deadline:
        old = slot.file
        if choose.random() < 0.3:
            rcu_assign_pointer(slot, "file", None)  # close, then open: the same memory comes back at once
            close(old, choose)
            rcu_assign_pointer(slot, "file", open_for(mine, choose))
        else:
            rcu_assign_pointer(slot, "file", open_for(mine, choose))
            close(old, choose)


def close(file: File, choose: random.Random) -> None:
    """Let go of a file in one of the ways there are."""
    if choose.random() < 0.1:
        unlink(file.f_path)
    (fput_close if choose.random() < 0.5 else fput)(file)


def read(slots: list[Slot], seed: int, deadline: float, tally: Tally) -> None:
    """Take references both ways; what was taken belongs to the slot it was taken from."""
    choose = random.Random(seed)
    while time.monotonic() < deadline:
        number = choose.randrange(SLOTS)
        if choose.random() < 0.5:
            file = get_file_active(slots[number], "file")
        else:
            rcu_read_lock()
            there = rcu_dereference(slots[number], "file")
            file = None if there is None else get_file_rcu(slots[number], "file")
            rcu_read_unlock()
        if file is None:
            tally.refused += 1
            continue
        inode = file.f_inode
        if inode is None or inode.path != file.f_path or not file.f_path.startswith(f"{number}/"):
            tally.errors.append(f"slot {number}: {file!r} with {inode!r}")
        tally.taken += 1
        if choose.random() < 0.2:
            fput(get_file(file))
        fput(file)


def test_references_are_to_the_slot_s_own_file(seconds: float, seed: int) -> None:
    """No stranger's file, no warning, no leak: files, inodes and their counts balance at the end."""
    boot()
    choose = random.Random(seed)
    slots = [Slot(file=open_for(n, choose)) for n in range(SLOTS)]
    deadline = time.monotonic() + seconds
    tallies = [Tally() for _ in range(3)]
    tasks = [kthread_run(swap, slots, n, seed + n, deadline, daemon=False) for n in range(SLOTS)]
    tasks += [
        kthread_run(read, slots, seed + 100 + n, deadline, tally, daemon=False)
        for n, tally in enumerate(tallies)
    ]
    for task in tasks:
        assert engine().join(task, timeout=seconds + 30)

    assert [error for tally in tallies for error in tally.errors] == []
    assert kernel_warnings() == ()
    inode_table.check_invariants()
    for slot in slots:
        assert file_ref_read(slot.file, "f_ref") == 1
        fput(slot.file)
    flush_delayed_fput()
    prune_icache()
    rcu_barrier()
    assert leak_report() == ""
    print(*tallies)
    assert sum(tally.taken for tally in tallies) > 0
    assert sum(tally.refused for tally in tallies) > 0, "no reader came while a file was going away"
