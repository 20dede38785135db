"""will-it-scale's page_fault1 to page_fault4: how many faults a second, with how many threads?

    python -m stress.page_fault 1 [-t THREADS] [-s ITERATIONS] [--memsize BYTES] [--mmap-lock]

Threads of one address space map memory, touch each page and unmap, for ever. 1: anonymous memory, written;
2: a private file mapping, written; 3: a shared file mapping, written; 4: a private file mapping, read. The
options and the lines are will-it-scale's: one a second (five of warm-up first) with the fewest and most
faults of a thread and the sum. `--memsize` (128 MiB there), `--warmup` and `--interval` are added, because a
fault here takes some 30 microseconds; so is `--mmap-lock`, which does without VMA locks. Small runs of all
four are judged by stress/test_page_fault.py.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

import attrs

from kmodel.core import boot, engine, gil_was_reenabled, kthread_run, variables
from kmodel.fs import File, fput, open_file, unlink
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    MmStruct,
    mm_alloc,
    mmap,
    mmap_lock_only,
    munmap,
    user_load,
    user_store,
)

MEMSIZE = 128 << 20
WARMUP_ITERATIONS = 5


@attrs.frozen
class Program:
    """One of the four programs."""

    description: str
    flags: int
    file: bool
    write: bool


PROGRAMS = {
    1: Program("Anonymous memory page fault", MAP_PRIVATE | MAP_ANONYMOUS, False, True),
    2: Program("Separate file private mapping page fault", MAP_PRIVATE, True, True),
    3: Program("Separate file shared mapping page fault", MAP_SHARED, True, True),
    4: Program("Separate file private mapping page read fault", MAP_PRIVATE, True, False),
}


class Run:
    """The threads of one run, and what they have counted."""

    def __init__(self, number: int, threads: int, memsize: int) -> None:
        self.testcase = PROGRAMS[number]
        self.memsize = memsize
        mm = mm_alloc()
        assert mm is not None
        self.mm: MmStruct = mm
        self.stop = variables(now=0)
        self.results = [[0] for _ in range(threads)]  # each is written by its own thread only
        self.errors: list[BaseException] = []
        self.tasks = [
            kthread_run(self.thread, n, comm=f"page_fault-{n}", daemon=False) for n in range(threads)
        ]

    def thread(self, nr: int) -> None:
        """A thread from the beginning until it is told to stop, which it does between two rounds."""
        try:
            file = open_file(f"/tmp/willitscale.{nr}", size=self.memsize) if self.testcase.file else None
            if file is not None:
                unlink(f"/tmp/willitscale.{nr}")
            while not self.stop.now:
                self.round(file, self.results[nr])
            if file is not None:
                fput(file)
        except BaseException as error:  # noqa: BLE001  # raised again by end()
            self.errors.append(error)

    def round(self, file: File | None, iterations: list[int]) -> None:
        """Map, touch every page, unmap."""
        mm, write = self.mm, self.testcase.write
        address = mmap(mm, 0, self.memsize, PROT_READ | PROT_WRITE, self.testcase.flags, file)
        for at in range(address, address + self.memsize, PAGE_SIZE):
            if write:
                user_store(mm, at, b"\0")
            else:
                user_load(mm, at)
            iterations[0] += 1
        munmap(mm, address, self.memsize)

    def end(self) -> None:
        """Stop the threads and wait for them."""
        self.stop.now = 1
        for task in self.tasks:
            assert engine().join(task, timeout=600), f"{task!r} does not end"
        if self.errors:
            raise self.errors[0]


def measure(run: Run, iterations: int, warmup: int, interval: float) -> int:
    """Print a line an interval; the average."""
    previous, total, done = [0] * len(run.results), 0, 0
    while True:
        time.sleep(interval)
        now = [result[0] for result in run.results]
        diffs = [new - old for new, old in zip(now, previous, strict=True)]
        previous = now
        print(f"min:{min(diffs)} max:{max(diffs)} total:{sum(diffs)}", flush=True)
        if done == warmup:
            print("measurement", flush=True)
        if done > warmup:
            total += sum(diffs)
        done += 1
        if run.errors or (iterations and done > iterations + warmup):
            break
    return total // max(iterations, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="page_fault", description="will-it-scale's page_fault1 to 4.")
    parser.add_argument("number", type=int, choices=PROGRAMS, help="which of the four")
    parser.add_argument("-t", dest="tasks", type=int, default=1, help="threads (default 1)")
    parser.add_argument("-s", dest="iterations", type=int, default=0, help="seconds (default: for ever)")
    parser.add_argument(
        "--memsize", type=int, default=MEMSIZE, help="bytes each thread maps (default 128 MiB)"
    )
    parser.add_argument("--warmup", type=int, default=WARMUP_ITERATIONS, help="lines before (default 5)")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between lines (default 1)")
    parser.add_argument("--mmap-lock", action="store_true", help="no VMA locks: every fault takes mmap_lock")
    args = parser.parse_args(argv)
    if gil_was_reenabled():
        print("page_fault: the GIL was switched back on", file=sys.stderr)
        return 2
    boot()
    with mmap_lock_only() if args.mmap_lock else nullcontext():
        run = Run(args.number, args.tasks, args.memsize)
        print(f"testcase:{run.testcase.description}")
        print("warmup", flush=True)
        try:
            average = measure(run, args.iterations, args.warmup, args.interval)
            print(f"average:{average}")
        except KeyboardInterrupt:
            pass
        finally:
            run.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
