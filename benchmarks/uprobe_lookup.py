"""What does a breakpoint hit cost, and does it scale? The schemes of the mailing-list threads side by side.

    python -m benchmarks.uprobe_lookup [--threads 1,2] [--passes 9] [--lookup-only] [--png FILE] ... (--help)

The address space is this very process's, the probes are functions of the ELF files it maps; each thread hits
all breakpoints in turn. `floor` is the same functions with the synchronisation taken out: what free-threaded
CPython charges for the walk from address to VMA to file to uprobe to handlers. Ratios are within one pass.
With --writer MS another task maps and unmaps a page of the process all the while, on a processor of its own;
there is no floor then, because a walk without synchronisation would go wrong.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.harness import Table, allowed_cpus, machine, measure
from benchmarks.writer import Beside, Writer
from kmodel.core import TaskStruct, current, gil_was_reenabled
from kmodel.fs import read_contents
from kmodel.mm import PAGE_SHIFT, MmStruct, for_each_vma, mmap_read_lock, mmap_read_unlock
from kmodel.mm.maple_node import SLOT, MapleTree, mt_offset
from kmodel.rcu import rb_find
from kmodel.torture.elf import functions, is_elf
from kmodel.uprobes import SCHEMES, PtRegs, Uprobe, UprobeConsumer, tree, uprobe_register
from kmodel.uprobes import Scheme as UprobeScheme
from kmodel.uprobes.arch import (
    MAX_UINSN_BYTES,
    OPS_XOL,
    ArchUprobe,
    arch_uprobe_analyze_insn,
    arch_uprobe_skip_sstep,
    uprobe_get_swbp_addr,
)
from kmodel.uprobes.handler import COPY_INSN, handler_chain
from kmodel.uprobes.tree import uprobe_cmp_key
from kmodel.uprobes.utask import get_utask
from kmodel.uprobes.xol import UPROBE_NO_TRAMPOLINE_VADDR

FLOOR = "floor: no synchronisation"
SPECULATION = "full speculation"
MMAP_LOCK = "RCU tree + mmap_lock"
STACK_TOP = 0x7FFF_FFFF_E000


# ---------------------------------------------------------------------------- the world


@attrs.frozen
class World:
    """The modelled process and the addresses of its breakpoints."""

    mm: MmStruct
    addresses: tuple[int, ...]


def count_hit(uc: Any, regs: PtRegs, data: Any) -> int:
    """The handler: count in a register of the hitting thread, which is nobody else's."""
    regs.gpr[0] += 1
    return 0


def is_emulated(inode: Any, offset: int) -> bool:
    """Whether the instruction at this place needs no slot."""
    arch = ArchUprobe()
    insn = read_contents(inode, offset, MAX_UINSN_BYTES)
    return bool(insn) and not arch_uprobe_analyze_insn(arch, insn) and arch.ops != OPS_XOL


def build(probes: int) -> World:
    """Load this process's address space and register `probes` uprobes on functions spread over its ELF
    files.
    """
    mm = MmStruct.from_proc_maps(os.getpid())
    mmap_read_lock(mm)
    candidates: list[tuple[Any, int, int]] = []
    for vma in for_each_vma(mm):
        if vma.vm_file is None or not vma.vm_flags & 0x4 or not is_elf(vma.vm_file.f_path):
            continue
        first = vma.vm_pgoff << PAGE_SHIFT
        for function in functions(vma.vm_file.f_path):
            if first <= function.offset < first + vma.vm_end - vma.vm_start:
                address = vma.vm_start + function.offset - first
                candidates.append((vma.vm_file.f_inode, function.offset, address))
    mmap_read_unlock(mm)
    # Only what is emulated: a single-step is a different subject, and dearer than all that is compared here.
    candidates = [entry for entry in candidates if is_emulated(*entry[:2])]
    candidates.sort(key=lambda entry: entry[2])
    addresses: list[int] = []
    step = max(len(candidates) // max(probes * 2, 1), 1)
    for inode, offset, address in candidates[::step]:
        if len(addresses) < probes and address not in addresses:
            made = uprobe_register(inode, offset, 0, UprobeConsumer(handler=count_hit))
            if isinstance(made, Uprobe):
                addresses.append(address)
    if not addresses:
        raise SystemExit("no function of this process's ELF files could be probed")
    return World(mm, tuple(addresses))


# ---------------------------------------------------------------------------- the floor


# The functions of a hit, one for one, with everything taken out that is there because of other CPUs: reader
# sections, samples, marked accesses, barriers, dead-node checks and rechecks.


def floor_walk(mt: MapleTree, index: int) -> Any:
    """mtree_lookup_walk."""
    node: Any = mt.ma_root
    while node is not None:
        entry = getattr(node, SLOT[mt_offset(node, index)])
        if node.is_leaf:
            return entry
        node = entry
    return None


def floor_vma_lookup(mm: MmStruct, addr: int) -> Any:
    """vma_lookup."""
    return floor_walk(mm.mm_mt, addr)


def floor_find_uprobe(inode: Any, offset: int) -> Uprobe | None:
    """find_uprobe_rcu."""
    found: Uprobe | None = rb_find((inode, offset), tree.uprobes_tree, uprobe_cmp_key)
    return found


def floor_find_active_uprobe(bp_vaddr: int, task: TaskStruct) -> Uprobe | None:
    """find_active_uprobe_speculative."""
    vma = floor_vma_lookup(task.mm, bp_vaddr)
    if vma is None:
        return None
    vm_file = vma.vm_file
    if vm_file is None:
        return None
    offset = (vma.vm_pgoff << PAGE_SHIFT) + (bp_vaddr - vma.vm_start)
    return floor_find_uprobe(vm_file.f_inode, offset)


def floor_lookup(bp_vaddr: int, task: TaskStruct) -> Uprobe | None:
    """find_active_uprobe_rcu, whose slow path is not needed when nothing changes."""
    return floor_find_active_uprobe(bp_vaddr, task)


def floor_handle_uprobe(uprobe: Uprobe, regs: PtRegs, bp_vaddr: int, task: TaskStruct) -> None:
    """handle_uprobe."""
    regs.ip = bp_vaddr
    if not uprobe.flags & COPY_INSN:
        return
    arch = uprobe.arch
    utask = get_utask(task)
    handler_chain(uprobe, regs, utask, task)
    if regs.ip == bp_vaddr and not arch_uprobe_skip_sstep(arch, regs):
        raise AssertionError("an instruction that is not emulated")


def floor_get_trampoline_vaddr(task: TaskStruct) -> int:
    """uprobe_get_trampoline_vaddr."""
    area = task.mm.uprobes_state.xol_area
    return area.vaddr if area is not None else UPROBE_NO_TRAMPOLINE_VADDR


def floor_handle_swbp(regs: PtRegs) -> None:
    """handle_swbp."""
    task = current()
    bp_vaddr = uprobe_get_swbp_addr(regs)
    if bp_vaddr == floor_get_trampoline_vaddr(task):
        raise AssertionError("nothing is called here, so nothing returns")
    uprobe = floor_lookup(bp_vaddr, task)
    if uprobe is not None:
        floor_handle_uprobe(uprobe, regs, bp_vaddr, task)


# ---------------------------------------------------------------------------- what is timed


@attrs.define
class Hits:
    """Whole hits: from the trap to the instruction after it."""

    name: str
    handle_swbp: Any
    world: World

    def prepare(self) -> tuple[PtRegs, list[int]]:
        """Registers of this thread, its own copy of the addresses; current is in the modelled process."""
        current().mm = self.world.mm
        return PtRegs(), [int(str(address)) for address in self.world.addresses]

    def loop(self, prepared: tuple[PtRegs, list[int]], n: int) -> None:
        """n hits, the breakpoints in turn."""
        regs, addresses = prepared
        handle_swbp = self.handle_swbp
        before = regs.gpr[0]
        done = 0
        while done < n:
            for address in addresses[: n - done]:
                regs.ip = address + 1
                regs.sp = STACK_TOP
                handle_swbp(regs)
            done += min(len(addresses), n - done)
        if regs.gpr[0] - before != n:
            raise AssertionError(f"{self.name}: {regs.gpr[0] - before} of {n} hits reached the handler")


@attrs.define
class Lookups:
    """Only the way from the address to the uprobe."""

    name: str
    lookup: Any
    world: World

    def prepare(self) -> tuple[TaskStruct, list[int]]:
        """The calling task, in the modelled process, and its own copy of the addresses."""
        task = current()
        task.mm = self.world.mm
        return task, [int(str(address)) for address in self.world.addresses]

    def loop(self, prepared: tuple[TaskStruct, list[int]], n: int) -> None:
        """n lookups, the breakpoints in turn."""
        task, addresses = prepared
        lookup = self.lookup
        done = 0
        while done < n:
            for address in addresses[: n - done]:
                if lookup(address, task) is None:
                    raise AssertionError(f"{self.name}: no uprobe at {address:#x}")
            done += min(len(addresses), n - done)


def schemes(world: World, lookup_only: bool, floor: bool = True) -> list[Any]:
    """The floor and every scheme, as the harness wants them."""
    found: Sequence[UprobeScheme] = tuple(SCHEMES.values())
    if lookup_only:
        lookups = [Lookups(s.name, s.lookup, world) for s in found]
        return [Lookups(FLOOR, floor_lookup, world), *lookups] if floor else lookups
    hits = [Hits(s.name, s.handle_swbp, world) for s in found]
    return [Hits(FLOOR, floor_handle_swbp, world), *hits] if floor else hits


# ---------------------------------------------------------------------------- the report


def spread(values: list[float]) -> str:
    """Median and range of a list of ratios."""
    if not values:
        return "no valid sample"
    return f"x{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def show(console: Console, table: Table, what: str) -> None:
    """Print the table, and the three figures people ask for."""
    show_rows(console, table, what)
    if FLOOR in table.schemes:
        figures(console, table)


def show_rows(console: Console, table: Table, what: str) -> None:
    """Print the table, one row per scheme and number of threads."""
    base = FLOOR if FLOOR in table.schemes else MMAP_LOCK
    out = RichTable(title=what, title_justify="left")
    for column in (
        "scheme",
        "threads",
        "ns",
        "throughput to 1 thread",
        f"throughput to {'the floor' if base == FLOOR else base}",
        "rejected",
    ):
        out.add_column(column, justify="left" if column == "scheme" else "right")
    for name in table.schemes:
        for n in table.threads:
            cell = table.cells[name, n]
            ns = cell.ns()
            out.add_row(
                name if n == table.threads[0] else "",
                str(n),
                f"{ns:.0f}" if ns is not None else "-",
                spread(table.scaling(name, n)) if n > 1 else "",
                spread(table.ratio(name, base, n)) if name != base else "",
                str(cell.rejected),
            )
    console.print(out)


def figures(console: Console, table: Table) -> None:
    """Scaling of speculation beside the floor's, its cost over the floor, and how far mmap_lock falls
    behind.
    """
    cost = [1 / ratio for ratio in table.ratio(SPECULATION, FLOOR, 1)]
    console.print(f"speculation costs {spread(cost)} of the floor on one thread")
    for n in table.threads[1:]:
        console.print(
            f"{n} threads: speculation scales {spread(table.scaling(SPECULATION, n))}, "
            f"the floor {spread(table.scaling(FLOOR, n))}; "
            f"speculation does {spread(table.ratio(SPECULATION, MMAP_LOCK, n))} of what mmap_lock does"
        )


def draw(table: Table, path: Path, what: str) -> None:
    """Throughput relative to the floor on one thread, over the number of threads."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    base = table.cells[FLOOR if FLOOR in table.schemes else MMAP_LOCK, 1].samples
    for name in table.schemes:
        heights = []
        for n in table.threads:
            pairs = zip(table.cells[name, n].samples, base, strict=True)
            ratios = [a.throughput / b.throughput for a, b in pairs if a is not None and b is not None]
            heights.append(median(ratios) if ratios else math.nan)
        style = "--" if name == FLOOR else "-"
        axes.plot(table.threads, heights, style, marker="o", label=name)
    axes.set_xticks(table.threads)
    axes.set_xlabel("threads")
    axes.set_ylabel(f"throughput ({'the floor' if FLOOR in table.schemes else MMAP_LOCK} on one thread is 1)")
    axes.set_ylim(bottom=0)
    axes.set_title(what)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="uprobe_lookup.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--threads", metavar="LIST", help="numbers of threads (default: 1,2,4... as there are CPUs)"
    )
    parser.add_argument("--passes", type=int, default=9, help="passes over all cells (default 9)")
    parser.add_argument("--milliseconds", type=float, default=8.0, help="length of one sample (default 8)")
    parser.add_argument("--probes", type=int, default=200, help="how many functions to probe (default 200)")
    parser.add_argument("--lookup-only", action="store_true", help="time the lookup, not the whole hit")
    parser.add_argument(
        "--writer", type=float, metavar="MS", help="a task maps and unmaps a page beside the hits, every MS"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    args = parser.parse_args(argv)
    top = len(allowed_cpus()) - (args.writer is not None)
    if args.threads is None:
        args.threads = ",".join(str(n) for n in (1, 2, 4, 8, 16) if n <= max(top, 1))
    try:
        args.threads = [int(part) for part in args.threads.split(",")]
    except ValueError:
        parser.error(f"--threads takes numbers separated by commas, not {args.threads!r}")
    if any(not 1 <= n <= top for n in args.threads):
        parser.error(f"--threads: this machine has {top} processors for them, and each thread needs its own")
    for name in ("passes", "probes", "milliseconds", "writer"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} must be above 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    args = parse(argv)
    if gil_was_reenabled():
        print("uprobe_lookup.py: the GIL was switched back on; nothing would scale", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 130)
    for key, value in machine().items():
        console.print(f"{key}: {value}", highlight=False)
    world = build(args.probes)
    what = "a lookup" if args.lookup_only else "a breakpoint hit"
    console.print(
        f"{len(world.addresses)} probes, {world.mm.map_count} VMAs, {args.passes} passes", highlight=False
    )

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    beside = contextlib.ExitStack()
    timed = schemes(world, args.lookup_only, floor=args.writer is None)
    if args.writer is not None:
        writer = beside.enter_context(Writer(world.mm, allowed_cpus()[-1], args.writer / 1000))
        timed = [Beside(scheme, writer) for scheme in timed]
    with beside:
        table = measure(
            timed, args.threads, passes=args.passes, milliseconds=args.milliseconds, progress=progress
        )
    progress("")
    show(console, table, f"What {what} costs, by scheme")
    for scheme in timed:
        if isinstance(scheme, Beside):
            console.print(
                f"{scheme.name}: {scheme.rounds / scheme.seconds:.0f} mmap and munmap a second beside it"
            )
    if args.png:
        draw(table, args.png, f"Throughput of {what}")
        console.print(f"drawn: {args.png}", highlight=False)
    if args.json:
        samples = {
            f"{name}, {n}": [attrs.asdict(s) if s is not None else None for s in cell.samples]
            for (name, n), cell in table.cells.items()
        }
        args.json.write_text(json.dumps({"machine": machine(), "samples": samples}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
