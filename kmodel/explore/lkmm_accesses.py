"""The kernel's memory model, without load buffering.

Models:      tools/memory-model (linux-kernel.cat) plus acyclic(po | rf), in the operational form of
             docs/explorer.md
Guards:      the engine's baton
Invariants:  M1 a load returns a store at or after what its task must see, M2 a store lands behind what its
             task must be behind, M3 nothing lands between a read-modify-write and the store it read
Leaves out:  load buffering; control and data dependencies order nothing here that program order does not
Read next:   explore/search.py for what labels are, tests/explore/test_litmus.py for the evidence

Tasks execute in program order; all weakness is in which store a load returns and where a store lands in
coherence order. A view says from which stores on somebody must read; it is a set of events, and a join is a
union. Per task:

    R  a load may not return anything earlier          W  a store may not land before any of these
    F  what every later store carries (fences)         O  own stores and what they carry
    K  all that is known: own events, every store read, and what those carried

The events of loads are members of views too: nobody reads from them, but a store that is ordered behind a
load has it in W, and that is what the race oracle asks.

What is independent for the search: two stores (each may land on either side of the other, whichever comes
first), a load and a store that it does not read. Only a load that comes before a store it could read is
tried again after it.
"""

from collections.abc import Callable
from typing import Any

from kmodel.core.access import NO_STORE
from kmodel.core.lifetime import POISON
from kmodel.core.struct import KernelObject, raw_set
from kmodel.explore.events import (
    COND,
    FENCE,
    LOAD,
    LOCK,
    RMW,
    STORE,
    Loc,
    Runner,
)
from kmodel.explore.lkmm_labels import (
    G_READ,
    G_WRITE,
    LOADS,
    RMWS,
    STORES,
    LkmmLabels,
    Reader,
    Store,
    find,
    floor,
    is_free,
    through,
)


class LkmmAccesses(LkmmLabels):
    """Loads, stores, read-modify-writes and fences."""

    # -- loads

    def _load(self, obj: Any, field: str, order: str) -> Any:
        me = self.cur
        if me is None:
            return self.unseen_load(obj, field)
        key = (obj._k_id, field)
        loc = self.locs[key] if key in self.locs else None
        if loc is None or loc.obj is not obj:
            loc = self.loc_of(obj, field)
        me.kind = LOAD
        me.loc = loc
        d = self.point(me)
        return self.read(me, d, loc, LOAD, order)

    def read(self, me: Runner, d: int, loc: Loc, kind: int, order: str) -> Any:
        hist = loc.hist
        event = me.label
        store = hist[find(hist, event)]
        old = me.clock
        bit = 1 << d
        clock = old | bit | loc.fclk
        if event >= 0:
            clock |= self.clk[event]
        view = me.R | through(me, loc)
        if loc.freed >= 0:
            self.oracles.use_after_free(me, d, loc, "read")
        if self.check_races and not me.nocheck:
            if order == "plain":
                bad = loc.allw & ~(view | me.own)
                loc.plainr |= bit
            else:
                bad = loc.plainw & ~(view | me.own)
            loc.allr |= bit
            if bad:
                self.oracles.data_race(me, d, loc, bad, "load", order)
        loc.readers.append(Reader(d, hist[floor(hist, view)], me.arg if kind == COND else None, None))
        me.own |= bit
        self._saw(me, store, bit, order)
        me.turn.append((loc, store))
        self.ev_pred = -2
        self.commit(me, d, clock, kind, loc, LOADS)
        if self.recorder is not None:
            self.recorder.load(me, loc, kind, order, store.value)
        return store.value

    def _saw(self, me: Runner, store: Store, bit: int, order: str) -> None:
        """What the task knows after reading a store."""
        view = store.view
        me.K |= view | bit
        if order == "acquire":
            me.R |= view
            me.W |= view
        else:
            me.R |= store.bit
            me.W |= store.bit
            if view and isinstance(store.value, KernelObject):
                # Address dependency: what is read through the pointer is at least what its
                # publisher had ordered before.
                kid = self.root_of(store.value)
                me.pointers[kid] = me.pointers[kid] | view if kid in me.pointers else view

    # -- stores

    def _store(self, obj: Any, field: str, value: Any, order: str) -> None:
        me = self.cur
        if me is None:
            raw_set(obj, field, value)
            return
        key = (obj._k_id, field)
        loc = self.locs[key] if key in self.locs else None
        if loc is None or loc.obj is not obj:
            loc = self.loc_of(obj, field)
        me.kind = STORE
        me.loc = loc
        me.order = order
        d = self.point(me)
        self.write(me, d, loc, STORE, order, value)
        if self.recorder is not None:
            self.recorder.store(me, loc, STORE, order, value)

    def write(self, me: Runner, d: int, loc: Loc, kind: int, order: str, value: Any) -> None:
        bit = 1 << d
        view = me.F | bit
        if order == "release":
            view |= me.K
        clock = me.clock | bit | loc.fclk
        self._check_store(me, d, loc, order)
        self._land(me, d, loc, value, view, me.label)
        if d >= self.plen - 1:
            self._store_races(me, loc, loc.hist[find(loc.hist, d)], None, clock)
        me.R |= bit
        me.W |= bit
        me.O |= view
        me.K |= view
        me.own |= bit
        me.dirty = True
        self.commit(me, d, clock, kind, loc, STORES)

    def _check_store(self, me: Runner, d: int, loc: Loc, order: str) -> None:
        bit = 1 << d
        if loc.freed >= 0:
            self.oracles.use_after_free(me, d, loc, "written")
        if not self.check_races or me.nocheck:
            return
        if order == "plain":
            bad = loc.allw | loc.allr
            loc.plainw |= bit
        else:
            bad = loc.plainw | loc.plainr
        loc.allw |= bit
        bad &= ~(me.W | through(me, loc) | me.own)
        if bad:
            self.oracles.data_race(me, d, loc, bad, "store", order)

    def _land(self, me: Runner, d: int, loc: Loc, value: Any, view: int, behind: int) -> Store:
        """Put a store into coherence order."""
        hist = loc.hist
        store = Store(d, value, 1 << d, view)
        self.ev_pred = behind
        if hist[-1].event == behind:
            store.pos = len(hist)
            hist.append(store)
            loc.set(loc.obj, value)  # type: ignore[misc]
        else:
            hist.insert(find(hist, behind) + 1, store)
            for i, each in enumerate(hist):
                each.pos = i
        return store

    def _store_races(self, me: Runner, loc: Loc, new: Store | None, low: int | None, clock: int) -> None:
        """Which earlier readers could have read `new`; from `low` on, which took what this one could have
        taken.
        """
        seen = me.clock
        for reader in reversed(loc.readers):
            event = reader.event
            if seen >> event & 1:
                continue
            hit = (
                new is not None
                and new.pos > reader.floor.pos
                and (reader.cond is None or reader.cond(new.value))
            )
            if not hit and low is not None:
                took = reader.took
                hit = took is not None and took.pos >= low and self._would_take(me, took.value)
            if hit:
                self.search.race(event, clock, me)
                seen |= self.clk[event]

    @staticmethod
    def _would_take(me: Runner, value: Any) -> bool:
        return not value if me.kind == LOCK else me.arg(value) is not NO_STORE

    # -- read-modify-write

    def rmw(self, obj: Any, field: str, update: Callable[[Any], Any], order: str) -> Any:
        if field not in obj.__k_atomic__:
            raise TypeError(f"{type(obj).__name__}.{field} is not declared atomic()")
        me = self.cur
        if me is None:
            return super().rmw(obj, field, update, order)
        loc = self.loc_of(obj, field)
        me.kind, me.loc, me.arg, me.order = RMW, loc, update, order
        d = self.point(me)
        store = loc.hist[find(loc.hist, me.label)]
        old = store.value
        if old is POISON or loc.freed >= 0:
            self.oracles.use_after_free(me, d, loc, "changed")
        new = update(old)
        if new is NO_STORE:
            if d >= self.plen - 1:
                clock = me.clock if store.event < 0 else me.clock | self.clk[store.event]
                self._store_races(me, loc, None, self._rmw_floors(me, loc)[1], clock)
                if order == "full":
                    self._fence_races(me, loc, clock)
            self.read(me, d, loc, RMW, "relaxed")
        else:
            self._exchange(me, d, loc, store, new, order, RMW)
            if self.recorder is not None:
                self.recorder.rmw(me, loc, order, old, new)
        return old

    def _exchange(self, me: Runner, d: int, loc: Loc, read: Store, new: Any, order: str, kind: int) -> None:
        """The event of a read-modify-write that stores."""
        bit = 1 << d
        fresh = d >= self.plen - 1
        low, own, _low_store = self._rmw_floors(me, loc)
        floor = loc.hist[low]
        effect = RMWS
        clock = me.clock | bit | loc.fclk
        if read.event >= 0:
            clock |= self.clk[read.event]
        if order == "full":
            effect |= G_WRITE
            clock = self._touch(me, d, self.fences, True, me.clock, clock)
            self._mb(me)
        self._check_store(me, d, loc, order)
        view = me.F | bit | read.view
        if order == "release":
            view |= me.K
        store = self._land(me, d, loc, new, view, read.event)
        if fresh:
            self._store_races(me, loc, store, own, clock)
        read.glued = True
        loc.allr |= bit
        loc.readers.append(Reader(d, floor, is_free if kind == LOCK else None, read))
        self._saw(me, read, bit, order)
        me.R |= bit
        me.W |= bit
        me.O |= view
        me.K |= view
        me.own |= bit
        if order == "full":
            self._mb(me)
        elif kind == LOCK:
            # Whoever held the lock before: its stores are ordered before ours for third parties too.
            me.F |= read.view
        me.dirty = True
        self.commit(me, d, clock, kind, loc, effect)

    # -- fences

    def _mb(self, me: Runner) -> None:
        self.G = me.R = me.W = me.F = me.K = me.R | me.W | me.K | self.G

    def fence(self, kind: str) -> None:
        me = self.cur
        if me is None:
            return
        if kind == "rmb":
            me.R |= me.K
        elif kind == "wmb":
            me.W |= me.O
            me.F |= me.O
        else:
            me.kind, me.loc = FENCE, None
            d = self.point(me)
            isw = bool((me.R | me.W | me.K) & ~self.G)
            clock = self._touch(me, d, self.fences, isw, me.clock, me.clock | 1 << d)
            self._mb(me)
            self.commit(me, d, clock, FENCE, None, G_WRITE if isw else G_READ)
        if self.recorder is not None:
            self.recorder.note(me, "fence", "", order=kind)

    def _fence_races(self, me: Runner, loc: Loc, clock: int) -> None:
        """A full read-modify-write failed: could it have succeeded had it come before some strong fences?"""
        _low, own, low_store = self._rmw_floors(me, loc)
        if any(self._would_take(me, store.value) for store in loc.hist[own:low_store]):
            for earlier in reversed(self.fencers):
                if not me.clock >> earlier & 1:
                    self.search.race(earlier, clock, me)

    def _touch(self, me: Runner, d: int, res: Loc, isw: bool, old: int, clock: int) -> int:
        """An event, `old` before it, uses something whose users' order matters: find races, return its
        whole clock.
        """
        clock |= res.wclk
        if isw:
            clock |= res.rclk
            self._races(me, d, old, clock, [res.lastw, *res.reads])
            res.lastw = d
            res.wclk = clock
            res.rclk = 0
            res.reads.clear()
            if res is self.fences:
                self.fencers.append(d)
        else:
            self._races(me, d, old, clock, [res.lastw])
            res.reads.append(d)
            res.rclk |= clock
        return clock

    def _touch_both(self, me: Runner, d: int, res: Loc, old: int) -> int:
        """An event that is a strong fence, and uses a domain too."""
        events = sorted({res.lastw, *res.reads, self.fences.lastw, *self.fences.reads})
        clock = old | 1 << d | res.wclk | res.rclk | self.fences.wclk | self.fences.rclk
        self._races(me, d, old, clock, events)
        self.fencers.append(d)
        for each in (res, self.fences):
            each.lastw, each.wclk, each.rclk = d, clock, 0
            each.reads.clear()
        return clock
