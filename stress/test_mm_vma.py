"""Mappings made and taken away in parallel, under readers that lock VMAs or look without locks.

Run it for longer: KMODEL_STRESS_SECONDS=600 python -m pytest stress/test_mm_vma.py
"""

import os
import random
import time
from itertools import pairwise
from typing import Any

import attrs

from kmodel.core import boot, engine, is_freed, kernel_warnings, kthread_run, variables
from kmodel.fs import File, open_file
from kmodel.mm import (
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_EXEC,
    PROT_READ,
    VM_REFCNT_EXCLUDE_READERS_FLAG,
    MmStruct,
    lock_vma_under_rcu,
    mm_alloc,
    mmap,
    mmap_lock_speculate_retry,
    mmap_lock_speculate_try_begin,
    mmap_read_lock,
    mmap_read_unlock,
    mmput,
    munmap,
    vma_end_read,
    vma_lock_statistics,
    vma_lookup,
)
from kmodel.mm.from_proc_maps import parse_maps
from kmodel.mm.maple_tree import check_invariants
from kmodel.proc import proc_maps
from kmodel.rcu import rcu_barrier, rcu_read_lock, rcu_read_unlock

SECONDS = float(os.environ.get("KMODEL_STRESS_SECONDS", "2"))
SEED = int(os.environ.get("KMODEL_STRESS_SEED", "1"))
BASE = 0x10_0000_0000
SLOTS = 24
SLOT_PAGES = 4


@attrs.define(eq=False)
class Tally:
    """What one task met."""

    done: int = 0
    accepted: int = 0
    refused: int = 0


class Stress:
    """Address spaces whose slots hold pieces of files; a slot's offset tells which slot and file it is."""

    def __init__(self) -> None:
        boot()
        self.stop = variables(now=0)
        self.mms: list[MmStruct] = []
        for _ in range(2):
            mm = mm_alloc()
            assert mm is not None
            self.mms.append(mm)
        self.files: list[File] = [open_file(f"/lib/{i}", size=1 << 30) for i in range(3)]

    def place(self, slot: int) -> int:
        return BASE + slot * SLOT_PAGES * PAGE_SIZE

    def right(self, vma: Any, address: int) -> bool:
        """Whether the VMA's file page is what any mapping of this address would have."""
        page = (address - BASE) // PAGE_SIZE
        return bool(vma.vm_pgoff + ((address - vma.vm_start) >> 12) == page)


def remapper(stress: Stress, seed: int, tally: Tally) -> None:
    """Maps, replaces and unmaps runs of slots."""
    choose = random.Random(seed)
    while not stress.stop.now:
        mm = choose.choice(stress.mms)
        slot = choose.randrange(SLOTS)
        pages = choose.randrange(1, 3 * SLOT_PAGES)
        start = stress.place(slot)
        if choose.random() < 0.3:
            munmap(mm, start, pages * PAGE_SIZE)
        else:
            prot = choose.choice((PROT_READ, PROT_READ | PROT_EXEC))
            file = choose.choice(stress.files)
            mmap(
                mm, start, pages * PAGE_SIZE, prot, MAP_PRIVATE | MAP_FIXED, file, (start - BASE) // PAGE_SIZE
            )
        tally.done += 1


def faulter(stress: Stress, seed: int, tally: Tally) -> None:
    """Read-locks VMAs by address, and checks that they stay what they are meanwhile."""
    choose = random.Random(seed)
    while not stress.stop.now:
        mm = choose.choice(stress.mms)
        address = stress.place(choose.randrange(SLOTS)) + choose.randrange(SLOT_PAGES) * PAGE_SIZE
        vma = lock_vma_under_rcu(mm, address)
        tally.done += 1
        if vma is None:
            tally.refused += 1
            continue
        for _ in range(3):
            assert not is_freed(vma), "a locked VMA was freed"
            assert vma.vm_mm is mm, "a locked VMA belongs to another mm"
            assert 2 <= vma.vm_refcnt < 2 * VM_REFCNT_EXCLUDE_READERS_FLAG, f"vm_refcnt {vma.vm_refcnt}"
            assert vma.vm_start <= address < vma.vm_end, "a locked VMA moved"
            assert stress.right(vma, address), "a locked VMA's offset moved"
        tally.accepted += 1
        vma_end_read(vma)


def speculator(stress: Stress, seed: int, tally: Tally) -> None:
    """Looks without any lock, and believes what mm_lock_seq vouches for."""
    choose = random.Random(seed)
    while not stress.stop.now:
        mm = choose.choice(stress.mms)
        address = stress.place(choose.randrange(SLOTS))
        rcu_read_lock()
        began, seq = mmap_lock_speculate_try_begin(mm)
        vma = vma_lookup(mm, address) if began else None
        if vma is not None:
            start, pgoff = vma.vm_start, vma.vm_pgoff
            if mmap_lock_speculate_retry(mm, seq):
                tally.refused += 1
            else:
                tally.accepted += 1
                page = (address - BASE) // PAGE_SIZE
                assert pgoff + ((address - start) >> 12) == page, "an accepted speculation was a mixture"
        rcu_read_unlock()
        tally.done += 1


def maps_reader(stress: Stress, seed: int, tally: Tally) -> None:
    """Reads /proc/PID/maps: it goes on, whatever changes."""
    choose = random.Random(seed)
    while not stress.stop.now:
        lines = parse_maps(proc_maps(choose.choice(stress.mms)))
        for a, b in pairwise(lines):
            assert a.end < b.end, f"{b} after {a}"  # b may have replaced more than a's neighbour meanwhile
        tally.done += 1


def test_parallel_mapping_under_readers() -> None:
    """Every reader's checks hold, every path was met, every object comes back."""
    stress = Stress()
    jobs = [remapper, remapper, faulter, faulter, speculator, maps_reader]
    tallies = [Tally() for _ in jobs]
    print(f"seed {SEED}: it fixes what tasks decide, not how the system schedules them")
    tasks = [
        kthread_run(job, stress, SEED * 100 + i, tally, comm=job.__name__, daemon=False)
        for i, (job, tally) in enumerate(zip(jobs, tallies, strict=True))
    ]
    time.sleep(SECONDS)
    stress.stop.now = 1
    for task in tasks:
        assert engine().join(task, timeout=60), f"{task!r} does not end"
    assert kernel_warnings() == ()
    counts = {job.__name__: tally for job, tally in zip(jobs, tallies, strict=True)}
    print(counts, vma_lock_statistics())
    assert all(tally.done for tally in tallies)
    assert counts["faulter"].accepted
    assert counts["speculator"].accepted
    for mm in stress.mms:
        mmap_read_lock(mm)
        check_invariants(mm.mm_mt)
        mmap_read_unlock(mm)
        mmput(mm)
    rcu_barrier()
    from kmodel.mm import vma as vma_module

    assert vma_module.vm_area_cachep.statistics().live == 0
