"""Every way from a breakpoint to its handlers that was argued over, side by side, over threads.

    python -m benchmarks.uprobe_schemes [--threads 1,2] [--passes 5] [--only TEXT] [--png FILE] ... (--help)

`benchmarks/uprobe_lookup.py` measures the four schemes that differ in the lookup alone. Here are all of
them: with each kind of treelock, of references and of protection, and each lock of the mapping. Each
sample is taken inside uprobe_scheme(): the probes stay, and what they are guarded by changes. Ratios are
within one pass.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import allowed_cpus, machine, measure
from benchmarks.uprobe_lookup import (
    FLOOR,
    Hits,
    Lookups,
    World,
    build,
    draw,
    floor_handle_swbp,
    floor_lookup,
    show_rows,
)
from kmodel.core import gil_was_reenabled
from kmodel.uprobes import ALL_SCHEMES, Scheme, lifetime, uprobe_scheme


@contextmanager
def around(scheme: Any) -> Iterator[None]:
    """The scheme's treelock, references and protection; nothing for the floor."""
    if scheme.name == FLOOR:
        yield
        return
    with uprobe_scheme(ALL_SCHEMES[scheme.name]):
        yield
        lifetime.wait_for_frees()


def schemes(world: World, chosen: Sequence[Scheme], lookup_only: bool) -> list[Any]:
    """The floor and these, as the harness wants them."""
    if lookup_only:
        return [Lookups(FLOOR, floor_lookup, world), *(Lookups(s.name, s.lookup, world) for s in chosen)]
    return [Hits(FLOOR, floor_handle_swbp, world), *(Hits(s.name, s.handle_swbp, world) for s in chosen)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="uprobe_schemes.py", description=(__doc__ or "").splitlines()[0])
    top = len(allowed_cpus())
    default = ",".join(str(n) for n in sorted({1, 2, 4, 8, 16}) if n <= top)
    parser.add_argument(
        "--threads", default=default, metavar="LIST", help=f"numbers of threads (default {default})"
    )
    parser.add_argument("--passes", type=int, default=5, help="passes over all cells (default 5)")
    parser.add_argument("--milliseconds", type=float, default=8.0, help="length of one sample (default 8)")
    parser.add_argument("--probes", type=int, default=200, help="how many functions to probe (default 200)")
    parser.add_argument("--only", metavar="TEXT", help="only schemes with TEXT in their names")
    parser.add_argument("--lookup-only", action="store_true", help="time the lookup, not the whole hit")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves")
    args = parser.parse_args(argv)
    try:
        args.threads = [int(part) for part in args.threads.split(",")]
    except ValueError:
        fail(f"--threads takes numbers separated by commas, not {args.threads!r}")
    if any(not 1 <= n <= top for n in args.threads):
        fail(f"--threads: this machine has {top} processors for us, and each thread needs its own")
    for name in ("passes", "probes", "milliseconds"):
        if getattr(args, name) <= 0:
            fail(f"--{name} must be above 0")
    args.schemes = [s for s in ALL_SCHEMES.values() if not args.only or args.only in s.name]
    if not args.schemes:
        fail(f"--only {args.only!r}: no such scheme; their names have: {', '.join(words())}")
    if args.png is not None and not args.png.absolute().parent.is_dir():
        fail(f"--png {args.png}: there is no such folder")
    return args


def words() -> list[str]:
    """The parts that names of schemes are made of."""
    return sorted({part for name in ALL_SCHEMES for part in name.split(" + ")})


def fail(text: str) -> None:
    """One line, status 2."""
    print(f"uprobe_schemes.py: {text}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    args = parse(argv)
    if gil_was_reenabled():
        fail("the GIL was switched back on; nothing would scale")
    console = Console(width=None if sys.stdout.isatty() else 130)
    for key, value in machine().items():
        console.print(f"{key}: {value}", highlight=False)
    world = build(args.probes)
    what = "a lookup" if args.lookup_only else "a breakpoint hit"
    console.print(
        f"{len(world.addresses)} probes, {world.mm.map_count} VMAs, {args.passes} passes", highlight=False
    )
    table = measure(
        schemes(world, args.schemes, args.lookup_only),
        args.threads,
        passes=args.passes,
        milliseconds=args.milliseconds,
        around=around,
    )
    show_rows(console, table, f"What {what} costs, by scheme")
    if args.png:
        draw(table, args.png, f"Throughput of {what}")
        console.print(f"drawn: {args.png}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
