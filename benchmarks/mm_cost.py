"""What a mapping costs when there are many: mmap+munmap and look-up, at 1,000 to 100,000 VMAs.

    python -m benchmarks.mm_cost
    python -m benchmarks.mm_cost --sizes 1000,65000 --passes 20

All address spaces are there at once and every pass measures each, so that a slow second of the machine
hits all alike. A pass's figures are divided by its own at the smallest size; the table shows the median of
these ratios over passes, and of the processor time that they come from. Random places: caches of the machine
miss as they would.
"""

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

import attrs

from kmodel.core import boot
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    MmStruct,
    find_vma,
    mm_alloc,
    mm_struct,
    mmap,
    mmap_read_lock,
    mmap_read_unlock,
    munmap,
    vma_lookup,
)
from kmodel.rcu import rcu_barrier

BASE: Final = 0x10_0000_0000
STRIDE: Final = 2 * PAGE_SIZE
GOAL: Final = 2.5
BITS: Final = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED


@attrs.define
class Crowd:
    """An address space with `size` mappings of one page, a free page behind each."""

    size: int
    mm: MmStruct

    def map_and_unmap(self, places: Sequence[int]) -> None:
        """A page into a gap and out again; it has no neighbour's permissions, so it does not merge."""
        mm = self.mm
        for place in places:
            at = BASE + place * STRIDE + PAGE_SIZE
            mmap(mm, at, PAGE_SIZE, PROT_READ, BITS)
            munmap(mm, at, PAGE_SIZE)

    def look_up(self, places: Sequence[int]) -> None:
        """vma_lookup(), without locks."""
        mm = self.mm
        for place in places:
            assert vma_lookup(mm, BASE + place * STRIDE) is not None

    def find(self, places: Sequence[int]) -> None:
        """find_vma() of an address in a gap: the mapping above. mmap_lock held for reading."""
        mm = self.mm
        mmap_read_lock(mm)
        for place in places:
            find_vma(mm, BASE + place * STRIDE + PAGE_SIZE)
        mmap_read_unlock(mm)


def crowd(size: int) -> Crowd:
    """Make one. Mapped in random order, so that the tree is as splits leave it."""
    mm = mm_alloc()
    assert mm is not None
    order = list(range(size))
    random.Random(size).shuffle(order)
    for i in order:
        mmap(mm, BASE + i * STRIDE, PAGE_SIZE, PROT_READ | PROT_WRITE, BITS)
    assert mm.map_count == size
    return Crowd(size, mm)


OPERATIONS: Final[tuple[tuple[str, Callable[[Crowd, Sequence[int]], None], int], ...]] = (
    ("mmap+munmap", Crowd.map_and_unmap, 150),
    ("vma_lookup", Crowd.look_up, 1500),
    ("find_vma", Crowd.find, 750),
)


def measure(crowds: Sequence[Crowd], passes: int, seed: int) -> dict[str, list[list[float]]]:
    """Nanoseconds of processor time per operation: [operation][pass][size]."""
    choose = random.Random(seed)
    found: dict[str, list[list[float]]] = {name: [] for name, _, _ in OPERATIONS}
    for number in range(passes + 1):
        for name, operation, count in OPERATIONS:
            row = []
            for each in crowds:
                places = [choose.randrange(each.size) for _ in range(count)]
                operation(each, places[: count // 10])  # its caches are its own again
                started = time.thread_time_ns()
                operation(each, places)
                row.append((time.thread_time_ns() - started) / count)
            if number:  # the first pass warms up
                found[name].append(row)
        rcu_barrier()
    return found


def report(crowds: Sequence[Crowd], found: dict[str, list[list[float]]]) -> bool:
    """Print the curve; whether the largest size meets the goal for mmap+munmap and look-up."""
    good = True
    print(f"{'VMAs':>8}" + "".join(f"{name:>26}" for name in found))
    for i, each in enumerate(crowds):
        cells = ""
        for rows in found.values():
            ratio = statistics.median(row[i] / row[0] for row in rows)
            cells += f"{statistics.median(row[i] for row in rows) / 1000:>14.1f} us  {ratio:5.2f} x"
            if each is crowds[-1]:
                good = good and ratio <= GOAL
        print(f"{each.size:>8,}{cells}")
    smallest, largest = crowds[0].size, crowds[-1].size
    print(f"goal: {largest:,} VMAs at most {GOAL} times {smallest:,}: {'met' if good else 'MISSED'}")
    return good


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 if the goal was met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mm_cost", description=__doc__)
    parser.add_argument("--sizes", default="1000,3000,10000,30000,100000")
    parser.add_argument("--passes", type=int, default=11)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    sizes = sorted(int(size) for size in args.sizes.split(","))
    boot()
    limit = mm_struct.sysctl_max_map_count
    mm_struct.sysctl_max_map_count = max(limit, sizes[-1] + 10)
    try:
        crowds = [crowd(size) for size in sizes]
        gc.collect()
        gc.freeze()
        print(f"Python {sys.version.split()[0]}, {args.passes} passes, seed {args.seed}")
        good = report(crowds, measure(crowds, args.passes, args.seed))
    finally:
        gc.unfreeze()
        mm_struct.sysctl_max_map_count = limit
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
