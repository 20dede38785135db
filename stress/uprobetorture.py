"""uprobetorture: all that happens to uprobes at once, on real threads, judged by what must always hold.

It ends by itself: after --seconds, or, on a busy machine, when everything it is to meet has been met, but not
later than ten times that. --seed fixes what the tasks decide, not when the system runs them.

    P1, P7, P10  while it runs: a handler is called at its own place, not after goodbye, and no trap is taken
                 for a stranger's
    P6           permanent probes are always found
    P9, P12      at the end: breakpoints where somebody wants one, and each counter is the number of its own
    U1 .. U3     the tree holds the permanent probes, each with one reference; slab has these uprobes and
                 their consumers and no other; nothing is dying; no warning of the kernel

    python -m stress.uprobetorture --seconds 600 --seed 7 --threads 12

Exit status 0: clean, 1: a violation, or a path that was not met; 2: bad usage.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence

from kmodel.core import (
    boot,
    clear_warnings,
    current,
    engine,
    gil_was_reenabled,
    is_freed,
    kernel_warnings,
    kthread_run,
)
from kmodel.mm import (
    MmStruct,
    mmap_read_lock,
    mmap_read_unlock,
    mmput,
    vma_lookup,
)
from kmodel.slab import kmalloc_cache, live_objects
from kmodel.uprobes import (
    UPROBE_SWBP_INSN,
    Uprobe,
    delayed,
    fetch_opcode,
    lifetime,
    tree,
)
from kmodel.uprobes.ref_ctr import read_ref_ctr
from stress.uprobetorture_roles import (
    DATA,
    MOVED,
    OFFSETS,
    REQUIRED,
    ROLES,
    TEXTS,
    Watcher,
    World,
    counter_of,
    vma_lookup_locked,
)

# ------------------------------------------------------------------------------------ the run


def torture(seconds: float, seed: int, threads: int = len(ROLES), *, bare_mremap: bool = False) -> World:
    """Run all roles, the first three more than once if there are threads; the world says what happened."""
    boot()
    world = World(seed, bare_mremap)

    def body(n: int) -> None:
        task, role = current(), ROLES[n % len(ROLES)]
        task.local["world"], task.local["met"] = world, Counter()
        world.met.append(task.local["met"])
        try:
            role(world, random.Random(seed * 1000 + n))
        except BaseException as error:
            world.fail(f"{role.__name__}: {type(error).__name__}: {error}")
            raise

    # One mover and one forker: two would move the program that the other has moved.
    order = [*range(len(ROLES)), *(n % 3 for n in range(threads - len(ROLES)))]
    tasks = [kthread_run(body, n, comm=f"{ROLES[n].__name__}/{i}", daemon=False) for i, n in enumerate(order)]
    began = time.monotonic()
    try:
        while not world.stop and (ran := time.monotonic() - began) < 10 * seconds:
            if ran >= seconds and not unmet(world):
                break
            time.sleep(0.05)
    except KeyboardInterrupt:
        print("interrupted: this is what happened so far", file=sys.stderr)
    world.stop = True
    for task in tasks:
        try:
            # A task that died may have left with a lock that others wait for: then that is the news.
            assert engine().join(task, 5.0 if world.wrong else 60.0), f"{task!r} does not end"
        except Exception as error:  # noqa: BLE001  # whatever a task died of is what was wrong
            world.wrong.append(f"{task!r}: {error!r}")
    if not world.wrong:
        settle(world)
    return world


def settle(world: World) -> None:
    """Nobody runs any more: what must hold now."""
    lifetime.wait_for_frees()
    tree.check_invariants()
    if set(tree.uprobes()) != set(world.permanent.values()):
        world.fail(
            f"the tree holds {len(tree.uprobes())} probes, not the {len(world.permanent)} permanent ones"
        )
    for key, uprobe in world.permanent.items():
        if is_freed(uprobe) or uprobe.ref != 1:
            world.fail(f"the permanent probe {key} has {uprobe.ref} references")
    for cls in (Uprobe, Watcher):
        live = len(live_objects(kmalloc_cache(cls)))
        if live != len(world.permanent):
            world.fail(f"slab has {live} of {cls.__name__}, not {len(world.permanent)}")
    for name, mm in (("still", world.still), *((f"child {n}", c) for n, c in enumerate(world.children))):
        for n in range(2):
            judge_program(world, name, mm, n)
    for mm in (*world.children, world.still, world.hot):
        mmput(mm)
    if delayed.delayed_uprobe_list:
        world.fail(
            f"H53: {len(delayed.delayed_uprobe_list)} increments wait for address spaces that are gone"
        )
    world.wrong += [f"the kernel warned: {warning.message}" for warning in kernel_warnings()]
    clear_warnings()


def judge_program(world: World, name: str, mm: MmStruct, n: int) -> None:
    """P9 and P12 of one program in an address space whose mappings of it never went away."""
    text = TEXTS[n] if vma_lookup_locked(mm, TEXTS[n]) else TEXTS[n] + MOVED
    mmap_read_lock(mm)
    data = vma_lookup(mm, DATA[n])
    counters = {o: read_ref_ctr(data, DATA[n] + counter_of(o)) for o in OFFSETS if counter_of(o)}
    mmap_read_unlock(mm)
    for offset in OFFSETS:
        installed = fetch_opcode(mm, text + offset) == UPROBE_SWBP_INSN
        if installed != ((n, offset) in world.permanent):
            world.fail(
                f"P9: {name}, program {n}, {offset:#x}: breakpoint {'left' if installed else 'missing'}"
            )
        if offset in counters and counters[offset] != installed:
            world.fail(f"P12: {name}, program {n}, {offset:#x}: counter {counters[offset]}, {installed=}")


def unmet(world: World) -> list[str]:
    """What a run has to meet, and has not met yet."""
    met = world.total()
    return [what for what in REQUIRED if not met[what]]


def verdict(world: World) -> list[str]:
    """What is wrong with the run, if anything: violations, or paths that were not met."""
    return world.wrong or [f"not met: {what}" for what in unmet(world)]


def report(world: World) -> str:
    """How often what happened."""
    met = world.total()
    return "  ".join(f"{what} {met[what]:,}" for what in sorted(met, key=lambda w: -met[w]))


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(
        prog="python -m stress.uprobetorture", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for how long (3)")
    parser.add_argument("--seed", type=int, default=None, help="what the tasks decide; printed")
    parser.add_argument("--threads", type=int, default=len(ROLES), help=f"at least {len(ROLES)}, the default")
    parser.add_argument(
        "--bare-mremap",
        action="store_true",
        help="moves beside registrations, as Linux allows: expect P9 (docs/findings/register-mremap.md)",
    )
    given = parser.parse_args(argv)
    if given.seconds <= 0 or given.threads < len(ROLES):
        parser.error(f"--seconds must be positive, --threads at least {len(ROLES)}: one for each role")
    if gil_was_reenabled():
        parser.error("the GIL was switched back on")
    seed = random.randrange(1 << 16) if given.seed is None else given.seed
    print(f"seed {seed}: --seconds {given.seconds:g} --threads {given.threads} --seed {seed}", flush=True)
    world = torture(given.seconds, seed, given.threads, bare_mremap=given.bare_mremap)
    print(report(world))
    wrong = verdict(world)
    for what in wrong:
        print(f"VIOLATION {what}" if world.wrong else what)
    print("clean" if not wrong else f"not clean; again: python -m stress.uprobetorture --seed {seed}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
