"""What do N unregisters cost? One wait for readers each, one for all of them, a batch; and by the treelock.

    python -m benchmarks.unregister [--consumers 20] [--passes 7] (--help)

A program with N probes on as many functions is mapped; all N consumers are registered, and then
unregistered in one of several ways, which is timed. The loop over passes is the outermost one; ratios are
within one pass, to "nosync + one sync" with the rwlock, which is what Linux 7.2 has. Every way is one of
the model's threads, alone: nobody is inside a handler, so a wait is the least that it can be.
"""

import argparse
import mmap as prot
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.harness import machine
from benchmarks.uprobe_lookup import spread
from kmodel.core import boot
from kmodel.fs import PAGE_SIZE, File, open_file
from kmodel.mm import MmStruct, mmap
from kmodel.uprobes import (
    ALL_SCHEMES,
    BatchConsumer,
    lifetime,
    uprobe_register_batch,
    uprobe_scheme,
    uprobe_unregister,
    uprobe_unregister_batch,
    uprobe_unregister_nosync,
    uprobe_unregister_sync,
)

TEXT = 0x400000
RWLOCK = "rwlock tree + refcount + mmap_lock"
PERCPU = "percpu_rwsem tree + refcount + mmap_lock"
SRCU = "RCU tree + SRCU + mmap_lock"
HOLDOUTS = "RCU tree + holdouts + mmap_lock"
BASE = "nosync + one sync"


@attrs.frozen
class Consumers:
    """A file and the registered consumers of its probes."""

    file: File
    consumers: list[BatchConsumer]


def ignore(uc: Any, regs: Any, data: Any) -> int:
    """A handler."""
    return 0


def get_consumer(i: int, ctx: list[BatchConsumer]) -> BatchConsumer:
    """The i-th of a list."""
    return ctx[i]


def registered(n: int) -> Consumers:
    """n consumers, registered at n places of a mapped program."""
    pages = n * 16 // PAGE_SIZE + 1
    file = open_file("/bin/prog", contents=b"\x90" * pages * PAGE_SIZE)
    mmap(MmStruct(), TEXT, pages * PAGE_SIZE, prot.PROT_READ | prot.PROT_EXEC, prot.MAP_PRIVATE, file, 0)
    consumers = [BatchConsumer(handler=ignore, offset=16 * i) for i in range(n)]
    error = uprobe_register_batch(file.f_inode, n, get_consumer, consumers)
    if error:
        raise AssertionError(f"the batch was refused: {error}")
    return Consumers(file, consumers)


def one_sync_each(world: Consumers) -> None:
    """uprobe_unregister() for each."""
    for uc in world.consumers:
        uprobe_unregister(uc.uprobe, uc)


def one_sync(world: Consumers) -> None:
    """uprobe_unregister_nosync() for each, then uprobe_unregister_sync()."""
    for uc in world.consumers:
        uprobe_unregister_nosync(uc.uprobe, uc)
    uprobe_unregister_sync()


def batch(world: Consumers) -> None:
    """uprobe_unregister_batch()."""
    uprobe_unregister_batch(world.file.f_inode, len(world.consumers), get_consumer, world.consumers)


def until_freed(way: Callable[[Consumers], None]) -> Callable[[Consumers], None]:
    """The same, and wait until every uprobe is out of the tree and freed: the treelock's part is in there."""

    def timed(world: Consumers) -> None:
        way(world)
        lifetime.wait_for_frees()

    return timed


WAYS: dict[str, tuple[str, Callable[[Consumers], None]]] = {
    "sync each": (RWLOCK, one_sync_each),
    BASE: (RWLOCK, one_sync),
    "batch": (RWLOCK, batch),
    "sync each, SRCU": (SRCU, one_sync_each),
    "nosync + one sync, SRCU": (SRCU, one_sync),
    "sync each, tasks trace holdouts": (HOLDOUTS, one_sync_each),
    "nosync + one sync, until freed": (RWLOCK, until_freed(one_sync)),
    "nosync + one sync, until freed, percpu_rwsem treelock": (PERCPU, until_freed(one_sync)),
}


def measure(n: int, passes: int) -> dict[str, list[float]]:
    """Seconds of each way, one for each pass."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _pass in range(passes):
        for name, (scheme, way) in WAYS.items():
            with uprobe_scheme(ALL_SCHEMES[scheme]):
                boot()
                world = registered(n)
                began = time.perf_counter()
                way(world)
                seconds[name].append(time.perf_counter() - began)
                lifetime.wait_for_frees()
    return seconds


def show(console: Console, seconds: dict[str, list[float]], n: int) -> None:
    """Print the table."""
    out = RichTable(title=f"What {n} unregisters cost", title_justify="left")
    out.add_column("way")
    for column in ("us each", f"to {BASE!r}"):
        out.add_column(column, justify="right")
    for name, found in seconds.items():
        ratios = [mine / base for mine, base in zip(found, seconds[BASE], strict=True)]
        out.add_row(name, f"{median(found) / n * 1e6:.0f}", spread(ratios) if name != BASE else "")
    console.print(out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="unregister.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--consumers", type=int, default=20, metavar="N", help="how many (default 20)")
    parser.add_argument("--passes", type=int, default=7, help="passes over all ways (default 7)")
    args = parser.parse_args(argv)
    for name in ("consumers", "passes"):
        if getattr(args, name) <= 0:
            print(f"unregister.py: --{name} must be above 0", file=sys.stderr)
            raise SystemExit(2)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 130)
    for key, value in machine().items():
        console.print(f"{key}: {value}", highlight=False)
    measure(2, 1)  # the first of everything is slower
    show(console, measure(args.consumers, args.passes), args.consumers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
