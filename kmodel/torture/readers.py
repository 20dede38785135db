"""Tasks that look: they hit breakpoints, descend the tree, take references, read maps.

Models:      nothing in Linux
Guards:      each task has its own log and random numbers
Invariants:  P9 a hit of a permanent probe calls its handler once, P10 no hit ends in SIGTRAP
Leaves out:  hits of breakpoints by several instructions of one page at once
Read next:   torture/remap.py
"""

import random
import time
from collections.abc import Callable
from typing import Any

from kmodel.proc import proc_maps
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.sync import REFCOUNT_SATURATED, refcount_read
from kmodel.torture.oracle import name_of
from kmodel.torture.source import parse_maps
from kmodel.torture.tasks import Task
from kmodel.torture.wary import Pauses, wary
from kmodel.torture.watch import lock_sequence
from kmodel.torture.world import Key, Member
from kmodel.uprobes import PtRegs, exc_int3, find_uprobe_rcu, forced_signals, handle_swbp, put_uprobe, tree
from kmodel.uprobes.find_refcount import find_uprobe
from kmodel.uprobes.usermode import finish_step

DESCENTS_PER_STEP = 16

PAUSES_IN_HIT = Pauses(0.005, at_end=0.08)
PAUSES_BEFORE_GET = Pauses(0.01, at_end=0.05)
PAUSE_IN_DESCENT = 0.5


class Hitter(Task):
    """Executes breakpoints: at contested addresses, at permanent probes, at those that come and go."""

    name = "hit"

    def __init__(self, me: Member, rng: random.Random) -> None:
        super().__init__(me, rng)
        self.permanent = list(me.process.permanent)
        self.contested = list(me.process.slots)
        self.churned = list(me.process.churned)
        # per region: the addresses of its probes that come and go, in the order of the region
        at = {key: address for address, key in me.process.churned.items()}
        self.regions = [[at[key] for key in r.churned if key in at] for r in me.world.regions]
        self.regs = PtRegs()

    def step(self) -> None:
        me, rng, focus = self.me, self.rng, self.world.focus
        chance = rng.random()
        if chance < 0.4 and self.contested:
            self.hit(self.contested[focus.slot], handle_swbp)
        elif chance < 0.55 and self.contested:
            self.hit(rng.choice(self.contested), handle_swbp)
        elif chance < 0.8 and self.churned:
            near = self.regions[focus.region] if self.regions else []
            me.hit_lingers = chance < 0.7 and bool(near)
            address = near[focus.key % len(near)] if me.hit_lingers else rng.choice(near or self.churned)
            self.hit(address, handle_swbp)
            me.hit_lingers = False
        elif self.permanent:
            self.hit_permanent(rng.choice(self.permanent))

    def hit(self, address: int, trap: Callable[[PtRegs], None]) -> None:
        """What the task does when the CPU has executed the breakpoint at `address`."""
        me, regs = self.me, self.regs
        me.hit_calls = 0
        me.hit_was_fast = False
        me.hit_address = address
        me.hit_seq = lock_sequence(self.mm)
        regs.ip = wary(address + 1, me, PAUSES_IN_HIT)
        regs.sp = 0x7FFF_FFFF_E000
        regs.stack.clear()
        self.log.count("hit")
        trap(regs)
        finish_step(regs)
        if not me.hit_was_fast:
            self.log.count("slow_path")
        if forced_signals(me.task):
            me.oracle.violate(
                self.log,
                "P10 (no SIGTRAP for a breakpoint of ours)",
                f"the hit at {address:#x} ended in signal {forced_signals(me.task)[-1]}",
                others="regist",
            )

    def hit_permanent(self, address: int) -> None:
        """Hit a probe that is registered and mapped all the time: its handler runs once, no more and no
        less.
        """
        self.hit(address, exc_int3)
        if self.me.hit_calls != 1:
            key = self.me.process.permanent[address]
            self.me.oracle.violate(
                self.log,
                "P9 (a registered probe is hit)",
                f"{key.probe} at {address:#x} is registered and mapped all the time, but a hit of it called "
                f"{self.me.hit_calls} handlers",
                others="regist|remap",
            )


class Descender(Task):
    """Looks permanent probes up in the tree, without locks, while others rotate it."""

    name = "descend"

    def __init__(self, me: Member, rng: random.Random) -> None:
        super().__init__(me, rng)
        # Pauses are for the last steps of the way, at the nodes that rotate.
        self.regions = [
            (r.permanent, Pauses(PAUSE_IN_DESCENT, reach=(r.churned[-1].offset - r.churned[0].offset) // 4))
            for r in me.world.regions
        ]
        self.everywhere = (me.world.permanent, Pauses(0.0))

    def step(self) -> None:
        for n in range(DESCENTS_PER_STEP):
            near = n & 3 and self.regions
            keys, pauses = self.regions[self.world.focus.region] if near else self.everywhere
            self.descend(self.rng.choice(keys), pauses)

    def descend(self, key: Key, pauses: Pauses) -> None:
        """Look one up; it is there, so it must be found."""
        seqcount = tree.uprobes_seqcount
        rcu_read_lock_trace(self.me.task)
        before = seqcount.sequence
        began = time.monotonic_ns()
        found = find_uprobe_rcu(key.inode, wary(key.offset, self.me, pauses))
        took = time.monotonic_ns() - began
        after = seqcount.sequence
        rcu_read_unlock_trace(self.me.task)
        log = self.log
        log.count("descent")
        if before != after or before & 1:
            log.count("tree_write_during_descent")
        if found is key.uprobe:
            return
        log.note(
            "find_uprobe_rcu({}): uprobes_seqcount {} before, {} after, took {:.1f} us -> {}",
            key.probe,
            before,
            after,
            took / 1000,
            found,
        )
        what = "absent" if found is None else f"to be {name_of(found)}, not {name_of(key.uprobe)}"
        self.me.oracle.violate(
            log,
            "H03, P6 (what is in the tree is found)",
            f"{key.probe} is registered all the time, but find_uprobe_rcu reported it {what}",
            [
                "the reader, in order:",
                f"  read_seqcount_begin(uprobes_seqcount)   about {before}",
                "  rb_find_rcu: went down the tree and met no such key",
                f"  NULL was believed                        uprobes_seqcount is {after} by now"
                + (": a writer was in the tree meanwhile" if after != before else ""),
            ],
            others="regist",
        )


class RefUser(Task):
    """Looks probes up the way the series of July 2024 did: with a reference, given back later."""

    name = "refs"
    rest = 0.0005

    def step(self) -> None:
        world = self.world
        near = world.regions[world.focus.region].churned if world.regions else []
        key = self.rng.choice(near or world.churned or world.permanent)
        log, task = self.log, self.me.task
        rcu_read_lock_trace(task)
        seen = find_uprobe_rcu(key.inode, key.offset)
        dying = seen is not None and refcount_read(seen, "ref") == 0
        rcu_read_unlock_trace(task)
        uprobe = find_uprobe(key.inode, wary(key.offset, self.me, PAUSES_BEFORE_GET))
        log.count("ref_get")
        if uprobe is None:
            if dying:
                log.count("get_refused")
            return
        ref = refcount_read(uprobe, "ref")
        log.note("find_uprobe({}) with a reference -> {}, ref is {}", key.probe, uprobe, ref)
        if ref <= 0:
            self.revived(key, uprobe, ref, dying)
        if self.rng.random() < 0.2:
            time.sleep(0)
        put_uprobe(uprobe)

    def revived(self, key: Key, uprobe: Any, ref: int, dying: bool) -> None:
        """Report a reference taken on a uprobe that had none left."""
        self.me.oracle.violate(
            self.log,
            "P6, H01 (a uprobe's ref never goes from 0 to 1)",
            f"the lookup of {key.probe} took a reference on {name_of(uprobe)}, whose last one was gone",
            [
                "the reader, in order:",
                f"  rb_find_rcu                    {name_of(uprobe)}{', ref 0: dying' if dying else ''}",
                "  refcount_inc(uprobe, ref)      from 0: its free is queued already",
                f"  refcount_read(uprobe, ref)     {ref}"
                + (
                    " = REFCOUNT_SATURATED (it WARNed, and leaks instead)"
                    if ref == REFCOUNT_SATURATED
                    else ""
                ),
            ],
            others="regist",
        )


class MapsReader(Task):
    """Reads /proc/PID/maps of the tortured process, which must be in order and show what never changes."""

    name = "maps"
    rest = 0.005

    def __init__(self, me: Member, rng: random.Random) -> None:
        super().__init__(me, rng)
        self.fixed = sorted({*me.process.permanent, *me.process.churned})

    def step(self) -> None:
        text = proc_maps(self.mm)
        self.log.count("maps_read")
        try:
            mappings = parse_maps(text, "maps", torn=True)
        except ValueError as error:
            self.me.oracle.violate(
                self.log, "P11 (maps is in order)", str(error), text.splitlines(), others="remap"
            )
        n = 0
        for address in self.fixed:
            while n < len(mappings) and mappings[n].end <= address:
                n += 1
            if n == len(mappings) or mappings[n].start > address:
                self.me.oracle.violate(
                    self.log,
                    "H40 (no false gap in maps)",
                    f"maps shows a hole at {address:#x}, which is mapped all the time",
                    text.splitlines(),
                    others="remap",
                )
