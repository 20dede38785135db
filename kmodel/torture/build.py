"""Setting the scene, and taking it down again.

Models:      nothing in Linux
Guards:      runs in the main thread while no task of the torture does
Invariants:  B1 after tear_down() nothing that the run allocated is left
Leaves out:  nothing
Read next:   torture/run.py

Small slabs without per-CPU stocks make freed VMAs and files come back at once, to any task.
"""

import contextlib
import errno
import mmap as mm_constants
import random
import time
from pathlib import Path
from typing import Any

import attrs

from kmodel.core import boot, kfree
from kmodel.fs import flush_delayed_fput, fput, open_file, prune_icache
from kmodel.mm import MmStruct, mmap, mmap_lock, mmput, munmap
from kmodel.mm.page_table import anon_pages
from kmodel.rcu import rcu_barrier, rcu_barrier_tasks_trace, srcu_barrier
from kmodel.slab import leaks, slab_options
from kmodel.sync import flush_scheduled_work
from kmodel.torture import watch
from kmodel.torture.elf import bytes_at
from kmodel.torture.journal import NOTHING, SLOT_PAGES, Slot
from kmodel.torture.oracle import Oracle
from kmodel.torture.probes import PAGE_SIZE, BadProbe, Choice, Probe, choose, parse_probe, resolve
from kmodel.torture.registrar import new_consumer
from kmodel.torture.remap import CHURN_PAGES, write_section_ends
from kmodel.torture.source import BadSource, Source, read_file, read_process
from kmodel.torture.world import Config, Key, Process, Region, World
from kmodel.uprobes import (
    lifetime,
    lookup,
    tree,
    uprobe_register,
    uprobe_unregister_nosync,
    uprobe_unregister_sync,
)

ENOTSUPP = 524
PROCESSES = ("a", "b")
PERMANENT, SLOTS, PER_SLOT, CLUSTERS = 32, 12, 4, 4
SPARE_PAGES = 4

PROT_RX = mm_constants.PROT_READ | mm_constants.PROT_EXEC
MAP_PRIVATE = mm_constants.MAP_PRIVATE
MAP_ANONYMOUS = mm_constants.MAP_ANONYMOUS
MAP_FIXED = 0x10

REFUSALS = {
    errno.EINVAL: "the offset is past the end of the file (EINVAL)",
    errno.EIO: "there is nothing to read at the offset (EIO)",
    errno.EFAULT: "there is nothing to read at the offset (EFAULT)",
    ENOTSUPP: "the byte there is a breakpoint already, or an instruction that must not be probed (ENOTSUPP)",
}


class Unusable(ValueError):
    """The scene cannot be built as asked; the text is one line for the user."""


@attrs.frozen
class Scene:
    """What build() made."""

    world: World
    title: str
    facts: list[str]


def build(config: Config, oracle: Oracle, stack: contextlib.ExitStack) -> Scene:
    """Boot the model with small slabs, load the address spaces, map and register. What is to be undone goes
    on `stack`.
    """
    try:
        source = read_file(config.maps) if config.maps is not None else read_process(config.pid)
        explicit = [resolve(parse_probe(text)) for text in config.probes]
        files = {source.root + path: path for path in source.readable_elf_files()}
        choice = choose(
            list(files),
            random.Random(f"{config.seed}/probes"),
            permanent=PERMANENT,
            slots=SLOTS,
            per_slot=PER_SLOT,
            clusters=CLUSTERS,
            explicit=explicit,
        )
    except (BadSource, BadProbe, ValueError) as error:
        raise Unusable(str(error)) from error

    stack.enter_context(slab_options(objects_per_slab=4, sheaf_capacity=0, quarantine=8))
    boot()
    world = World(oracle)
    open_files(world, source, choice, files)
    for name in PROCESSES:
        world.processes.append(load(world, name, source))
    keys = make_keys(world, choice)
    for process in world.processes:
        place(process, source, keys, files)
    register_permanent(world)
    drop_refused(world)
    world.regions = [region for region in world.regions if region.permanent and region.churned]
    install_observers(stack)
    return Scene(world, source.title, describe(world, source, choice))


# ------------------------------------------------------------------------------------------------ files


def open_files(world: World, source: Source, choice: Choice, files: dict[str, str]) -> None:
    """An inode with the file's real bytes for every file that has probes; held open until the end."""
    lines = {m.path: m for m in source.mappings}
    for path in dict.fromkeys(probe.path for probe in choice.all):
        name = files.get(path, path)
        line = lines.get(name)
        ino, dev = (line.inode, line.dev) if line is not None else (Path(path).stat().st_ino, (0, 0))
        file = open_file(name, contents=Path(path).read_bytes(), ino=ino, dev=dev)
        world.opened.append(file)
        world.inodes[path] = file.f_inode


def load(world: World, name: str, source: Source) -> Process:
    """One address space with the layout of the source."""
    mm = MmStruct.from_proc_maps(source.text)
    return Process(name, mm)


# ------------------------------------------------------------------------------------------------ probes


@attrs.define
class Keys:
    """The probes of a run as keys of the tree."""

    permanent: list[Key]
    churned: list[Key]
    groups: list[list[Key]]
    regions: list[Region]


def make_keys(world: World, choice: Choice) -> Keys:
    """Keys for the chosen probes. The last of each contested group is churned, the others stay."""

    def key(probe: Probe) -> Key:
        made = Key(probe, world.inodes[probe.path], probe.offset, str(probe))
        world.labels[made.place] = str(probe)
        return made

    keys = Keys([key(p) for p in choice.permanent], [], [], [])
    for cluster in choice.clusters:
        region = Region([key(p) for p in cluster.permanent], [key(p) for p in cluster.churned])
        keys.regions.append(region)
        keys.permanent += region.permanent
        keys.churned += region.churned
    for group in choice.contested:
        members = [key(p) for p in group]
        keys.groups.append(members)
        if len(members) > 1:
            keys.churned.append(members[-1])
            keys.permanent += members[:-1]
        else:
            keys.permanent += members
    world.permanent, world.churned = keys.permanent, keys.churned
    world.contested, world.regions = keys.groups, keys.regions
    return keys


def place(process: Process, source: Source, keys: Keys, files: dict[str, str]) -> None:
    """Find out where each key is mapped; map explicit ones that are not; lay out the contested slots."""
    mm = process.mm
    process.permanent = {a: key for key in keys.permanent if (a := mapped_at(source, key, files)) is not None}
    process.churned = {a: key for key in keys.churned if (a := mapped_at(source, key, files)) is not None}
    extra = [key for key in keys.permanent if key not in process.permanent.values()]
    groups = [group for group in keys.groups if group]
    stride = SLOT_PAGES + 2
    span = (len(groups) * stride + len(extra) * 2 + CHURN_PAGES + 2 * SPARE_PAGES) * PAGE_SIZE
    base = mmap(mm, 0, span, mm_constants.PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS)
    munmap(mm, base, span)
    process.scratch = base
    at = base + (SPARE_PAGES + CHURN_PAGES) * PAGE_SIZE
    seq = watch.lock_sequence(mm)
    for group in groups:
        middle = at + SLOT_PAGES // 2 * PAGE_SIZE
        address = middle + group[0].offset % PAGE_SIZE
        process.slots[address] = Slot(mm, address, NOTHING, seq, time.monotonic_ns(), tuple(group))
        at += stride * PAGE_SIZE
    for key in extra:
        file = open_file(key.inode.path, size=key.inode.i_size)
        mmap(mm, at, PAGE_SIZE, PROT_RX, MAP_PRIVATE | MAP_FIXED, file, key.offset // PAGE_SIZE)
        fput(file)
        process.permanent[at + key.offset % PAGE_SIZE] = key
        at += 2 * PAGE_SIZE


def mapped_at(source: Source, key: Key, files: dict[str, str]) -> int | None:
    """The address at which the source maps the key's byte as code."""
    path = files.get(key.probe.path, key.probe.path)
    for m in source.mappings:
        if m.executable_file and m.path == path and m.offset <= key.offset < m.offset + m.end - m.start:
            if m.perms[1] != "w":
                return m.start + key.offset - m.offset
    return None


def drop_refused(world: World) -> None:
    """Forget those that come and go which the kernel would refuse (a lock prefix as first byte, say)."""
    refused = set()
    for key in world.churned:
        consumer = new_consumer(key)
        uprobe = uprobe_register(key.inode, key.offset, 0, consumer)
        if isinstance(uprobe, int):
            refused.add(key)
        else:
            uprobe_unregister_nosync(uprobe, consumer)
            uprobe_unregister_sync()
        kfree(consumer)
    forget(world, refused)


def forget(world: World, keys: set[Key]) -> None:
    """Take keys out of every plan."""
    world.permanent = [k for k in world.permanent if k not in keys]
    world.churned = [k for k in world.churned if k not in keys]
    world.contested = [[k for k in group if k not in keys] for group in world.contested]
    for region in world.regions:
        region.permanent = [k for k in region.permanent if k not in keys]
        region.churned = [k for k in region.churned if k not in keys]
    for process in world.processes:
        process.permanent = {a: k for a, k in process.permanent.items() if k not in keys}
        process.churned = {a: k for a, k in process.churned.items() if k not in keys}
        for slot in process.slots.values():
            slot.keys = tuple(k for k in slot.keys if k not in keys)
        process.slots = {a: slot for a, slot in process.slots.items() if slot.keys}


def register_permanent(world: World) -> None:
    """Register what stays to the end. Refusals of explicit probes are the user's to hear; others are
    dropped.
    """
    refused = set()
    for key in world.permanent:
        consumer = new_consumer(key)
        uprobe = uprobe_register(key.inode, key.offset, 0, consumer)
        if not isinstance(uprobe, int):
            key.uprobe, key.consumer = uprobe, consumer
            continue
        kfree(consumer)
        if key.probe.explicit:
            why = REFUSALS.get(-uprobe, f"errno {-uprobe}")
            where = f"{key.probe.path}:{key.probe.name} at {key.offset:#x}"
            raise Unusable(f"probe {where}: the kernel refuses it: {why}")
        refused.add(key)
    forget(world, refused)


# ------------------------------------------------------------------------------------------------ observers


def install_observers(stack: contextlib.ExitStack) -> None:
    """Let the oracle look on, until the stack is closed."""
    lookup.observer = watch.speculated
    tree.observer = watch.dead_twin
    mmap_lock.observer = write_section_ends
    stack.callback(remove_observers)


def remove_observers() -> None:
    """Nobody looks on any more."""
    lookup.observer = None
    tree.observer = None
    mmap_lock.observer = None


# ------------------------------------------------------------------------------------------------ the end


def tear_down(world: World) -> dict[str, int]:
    """Unregister everything, end the processes, close the files; what is left of each kind (all should be
    0).
    """
    for key in world.permanent:
        uprobe_unregister_nosync(key.uprobe, key.consumer)
    uprobe_unregister_sync()
    for key in world.permanent:
        key.consumer.unregistered = True
        kfree(key.consumer)
    left = {"breakpoints left in an address space": sum(breakpoints_left(p.mm) for p in world.processes)}
    settle()
    left["uprobes left in the tree"] = len(tree.uprobes())
    for process in world.processes:
        mmput(process.mm)
    for file in world.opened:
        fput(file)
    settle()
    prune_icache()
    settle()
    counts: dict[str, int] = {}
    for leak in leaks():
        counts[leak.cache] = counts.get(leak.cache, 0) + 1
    left["slab objects"] = sum(counts.values())
    return left | {f"objects of {name}": n for name, n in sorted(counts.items())}


def settle() -> None:
    """Wait until everything that was put off has been done."""
    for _ in range(2):
        flush_delayed_fput()
        flush_scheduled_work()
        srcu_barrier(lifetime.uretprobes_srcu)
        rcu_barrier_tasks_trace()
        rcu_barrier()


def breakpoints_left(mm: Any) -> int:
    """How many private pages the mm has: each is a copy made for a breakpoint, all gone by now."""
    return len(anon_pages(mm))


def describe(world: World, source: Source, choice: Choice) -> list[str]:
    """What was built, as lines for people."""
    files = {probe.path for probe in choice.all}
    some = ", ".join(str(p) for p in choice.permanent[:4])
    return [
        f"address space: {source.title}, {len(source.mappings)} mappings, loaded "
        f"{len(world.processes)} times; {len(source.readable_elf_files())} ELF files to probe",
        f"probes: {len(world.permanent)} permanent in {len(files)} files ({some}, ...), "
        f"{len(world.churned)} that come and go, {len(world.contested)} contested addresses",
        *(
            f"  {p.path}:{p.name}   offset {p.offset:#x}, bytes {bytes_at(p.path, p.offset, 8).hex(' ')}"
            for p in choice.permanent
            if p.explicit
        ),
    ]
