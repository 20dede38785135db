"""Threads that map memory and fault it in, all in one address space: who waits for whom?

    python -m stress.spf_test [THREADS [VMAS [PAGES]]]

Does what spf_test.c does on a kernel, with its parameters (100, 2, 10) and its output: each thread maps VMAS
times PAGES pages of anonymous memory and writes one byte into each page; nothing is unmapped. Under pytest a
small run is judged: every page reads back, every fault is in the VMA_LOCK counters, nothing is left at exit.
"""

import sys
import time
from collections.abc import Sequence

import attrs

from kmodel.core import boot, engine, gil_was_reenabled, kernel_warnings, kthread_run
from kmodel.fs import page as page_module
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    MmStruct,
    fork,
    get_mm_rss,
    mm_alloc,
    mmap,
    mmput,
    user_load,
    user_store,
    vma_lock_statistics,
    vma_lookup,
)
from kmodel.mm.page_table import check_invariants
from kmodel.rcu import rcu_barrier

THREADS, VMAS, PAGES = 100, 2, 10


@attrs.define(eq=False)
class ThreadInfo:
    """What one thread did."""

    duration: int = 0
    mapped: list[int] = attrs.field(factory=list)
    error: BaseException | None = None


def thread_main(mm: MmStruct, vmas: int, pages: int, tinfo: ThreadInfo) -> None:
    """Map and touch."""
    try:
        start = time.perf_counter_ns()
        for _ in range(vmas):
            address = mmap(mm, 0, pages * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
            tinfo.mapped.append(address)
            for page in range(pages):
                user_store(mm, address + page * PAGE_SIZE, bytes([page & 0xFF]))
        tinfo.duration = time.perf_counter_ns() - start
    except BaseException as error:  # noqa: BLE001  # raised again by run()
        tinfo.error = error


def run(mm: MmStruct, threads: int, vmas: int, pages: int) -> list[ThreadInfo]:
    """All threads from beginning to end."""
    infos = [ThreadInfo() for _ in range(threads)]
    tasks = [
        kthread_run(thread_main, mm, vmas, pages, tinfo, comm=f"spf_test-{n}", daemon=False)
        for n, tinfo in enumerate(infos)
    ]
    for task, tinfo in zip(tasks, infos, strict=True):
        assert engine().join(task, timeout=600), f"{task!r} does not end"
        if tinfo.error is not None:
            raise tinfo.error
    return infos


def judge(mm: MmStruct, infos: list[ThreadInfo], vmas: int, pages: int) -> dict[str, int]:
    """The address space after the run is what the program made of it; the counters."""
    counts = vma_lock_statistics()
    touched = len(infos) * vmas * pages
    for tinfo in infos:
        for address in tinfo.mapped:
            assert vma_lookup(mm, address).vm_refcnt == 1, "a VMA is left locked"
            for page in range(pages):
                assert user_load(mm, address + page * PAGE_SIZE) == bytes([page & 0xFF])
    assert get_mm_rss(mm) == touched
    tried = counts["vma_lock_success"] + counts["vma_lock_abort"] + counts["vma_lock_retry"]
    assert tried == touched, f"{counts} for {touched} faults"
    check_invariants(mm)
    return counts


def test_spf_test() -> None:
    """8 threads: pages, counters, reference counts; a child has it all, and nothing is left at exit."""
    boot()
    mm = mm_alloc()
    assert mm is not None
    infos = run(mm, 8, VMAS, PAGES)
    print(judge(mm, infos, VMAS, PAGES))
    child = fork(mm)
    mmput(mm)
    for tinfo in infos:
        assert user_load(child, tinfo.mapped[0] + PAGE_SIZE) == b"\1"
    mmput(child)
    rcu_barrier()
    assert page_module.page_cachep.statistics().live == 0
    assert kernel_warnings() == ()


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    numbers = [int(word) for word in (sys.argv[1:] if argv is None else argv)]
    threads, vmas, pages = (*numbers, *(THREADS, VMAS, PAGES)[len(numbers) :])
    if gil_was_reenabled():
        print("spf_test: the GIL was switched back on", file=sys.stderr)
        return 2
    print(f"Spawning {threads} threads each allocating {vmas} vmas of {pages} pages!")
    boot()
    mm = mm_alloc()
    assert mm is not None
    infos = run(mm, threads, vmas, pages)
    total = sum(tinfo.duration for tinfo in infos)
    print(f"Total:\t{total}ns")
    print(f"Avg:\t{total // threads}ns")
    judge(mm, infos, vmas, pages)
    return 0


if __name__ == "__main__":
    sys.exit(main())
