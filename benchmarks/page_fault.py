"""What does a page fault cost, and does it scale? With VMA locks, and with mmap_lock only (before 6.4).

    python -m benchmarks.page_fault [--threads 1,2] [--passes 7] [--rounds]

All threads share one address space; each stores into the pages of its own mapping, again and again: after
the last page its entries are zapped, under mmap_lock for reading, as MADV_DONTNEED does. With --rounds the
mapping is made anew instead, as will-it-scale's page_fault1 does: then mmap_lock is taken for writing, too.
Ratios are formed within one pass.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from statistics import median

import attrs
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.harness import Table, allowed_cpus, machine, measure
from kmodel.core import boot, gil_was_reenabled
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    MmStruct,
    fault,
    mm_alloc,
    mmap,
    mmap_read_lock,
    mmap_read_unlock,
    munmap,
    user_store,
)
from kmodel.mm.page_table import zap_page_range

VMA_LOCK = "VMA lock"
MMAP_LOCK = "mmap_lock only"
FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
PAGES = 64
PLACES = itertools.count(1)
PLACE = 0x10_0000_0000
PMD_SIZE = 2 << 20


@attrs.define
class Faults:
    """Stores that fault."""

    name: str
    per_vma_lock: bool
    rounds: bool
    mm: MmStruct

    def prepare(self) -> list[int]:
        """This thread's mapping, in a page table (2 MiB) of its own."""
        fault.per_vma_lock = self.per_vma_lock
        address = PLACE + next(PLACES) * PMD_SIZE
        mmap(self.mm, address, PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, FLAGS)
        return [address]

    def loop(self, prepared: list[int], n: int) -> None:
        """n faults."""
        mm, length = self.mm, PAGES * PAGE_SIZE
        done = 0
        while done < n:
            address, count = prepared[0], min(PAGES, n - done)
            for at in range(address, address + count * PAGE_SIZE, PAGE_SIZE):
                user_store(mm, at, b"\0")
            done += count
            if self.rounds:
                munmap(mm, address, length)
                mmap(mm, address, length, PROT_READ | PROT_WRITE, FLAGS)
            else:
                mmap_read_lock(mm)
                zap_page_range(mm, address, address + length)
                mmap_read_unlock(mm)


def spread(values: list[float]) -> str:
    """Median and range of a list of ratios."""
    if not values:
        return "no valid sample"
    return f"x{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def show(console: Console, table: Table, title: str) -> None:
    """Print the table."""
    out = RichTable(title=title, title_justify="left")
    for column in (
        "scheme",
        "threads",
        "us per fault",
        "throughput over 1 thread",
        "VMA lock over mmap_lock",
    ):
        out.add_column(column)
    for scheme in table.schemes:
        for n in table.threads:
            ns = table.cells[scheme, n].ns()
            out.add_row(
                scheme,
                str(n),
                f"{ns / 1000:.1f}" if ns is not None else "-",
                spread(table.scaling(scheme, n)) if n > 1 else "",
                spread(table.ratio(VMA_LOCK, MMAP_LOCK, n)) if scheme == VMA_LOCK else "",
            )
    console.print(out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="page_fault", description="What a page fault costs.")
    top = len(allowed_cpus())
    parser.add_argument("--threads", default=",".join(map(str, range(1, top + 1))), help="as in 1,2,4")
    parser.add_argument("--passes", type=int, default=7, help="passes over all schemes (default 7)")
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of one sample (default 20)")
    parser.add_argument("--rounds", action="store_true", help="map and unmap, as will-it-scale does")
    args = parser.parse_args(argv)
    try:
        args.threads = [int(part) for part in args.threads.split(",")]
    except ValueError:
        parser.error(f"--threads takes numbers separated by commas, not {args.threads!r}")
    if any(not 1 <= n <= top for n in args.threads):
        parser.error(f"--threads: this machine has {top} processors for us, and each thread needs its own")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    args = parse(argv)
    if gil_was_reenabled():
        print("page_fault: the GIL was switched back on; nothing would scale", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 130)
    for key, value in machine().items():
        console.print(f"{key}: {value}", highlight=False)
    boot()
    mm = mm_alloc()
    assert mm is not None
    schemes = [Faults(VMA_LOCK, True, args.rounds, mm), Faults(MMAP_LOCK, False, args.rounds, mm)]
    try:
        table = measure(schemes, args.threads, passes=args.passes, milliseconds=args.milliseconds)
    finally:
        fault.per_vma_lock = True
    show(console, table, "Map, touch, unmap" if args.rounds else "Faults in mapped memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
