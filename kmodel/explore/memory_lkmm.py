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
from kmodel.core.report import LockingBug
from kmodel.core.struct import KernelObject, raw_get, raw_set
from kmodel.explore.events import (
    COND,
    FENCE,
    FREE,
    GP_END,
    GP_START,
    LOAD,
    LOCK,
    RCU_LOCK,
    RCU_UNLOCK,
    RELAX,
    RMW,
    STORE,
    UNLOCK,
    Loc,
    Runner,
)
from kmodel.explore.memory_sc import ScEngine
from kmodel.explore.search import Node

# What an event did, for the sleep sets: to its location, and (times 4) to the strong fences' common view.
LOADS, RMWS, STORES = 0, 1, 2
G_READ, G_WRITE = 4, 8
ONE = [0]


class Store:
    """An entry of a location's coherence order."""

    __slots__ = ("bit", "event", "glued", "pos", "value", "view")

    def __init__(self, event: int, value: Any, bit: int, view: int) -> None:
        self.event = event  # -1: the initial value
        self.value = value
        self.bit = bit
        self.view = view
        self.pos = 0
        self.glued = False  # a read-modify-write read this, and stands right behind


class Reader:
    """An event that read a location, and what it could have read instead."""

    __slots__ = ("cond", "event", "floor", "took")

    def __init__(
        self, event: int, floor: Store, cond: Callable[[Any], bool] | None, took: Store | None
    ) -> None:
        self.event = event
        self.floor = floor
        self.cond = cond
        self.took = took  # the store that it is glued to


def _floor(hist: list[Store], view: int) -> int:
    """Index of the last store that is in a view."""
    for i in range(len(hist) - 1, 0, -1):
        if hist[i].bit & view:
            return i
    return 0


def _find(hist: list[Store], event: int) -> int:
    for i in range(len(hist) - 1, -1, -1):
        if hist[i].event == event:
            return i
    raise AssertionError(f"no store of event {event}")


def _through(me: Runner, loc: Loc) -> int:
    """What the pointer through which this task reaches a location obliges it to see."""
    pointers = me.pointers
    return pointers[loc.kid] if loc.kid in pointers else 0


def _is_free(value: Any) -> bool:
    return not value


def _take(value: Any) -> Any:
    return NO_STORE if value else 1


class LkmmEngine(ScEngine):
    """Explore under the kernel's memory model."""

    memory = "lkmm"
    labelled = True

    def reset(self) -> None:
        super().reset()
        self.G = 0
        self.fencers: list[int] = []  # events that added to G
        self.fences = Loc(None, "<fences>", (0, "<fences>"), None)
        self.ev_pred = -2  # behind which store the last event's store landed
        self.ev_event = -1

    def new_loc(self, loc: Loc) -> None:
        loc.hist = [Store(-1, raw_get(loc.obj, loc.field), 0, 0)]

    def initial_value(self, loc: Loc) -> Any:
        return next(s.value for s in loc.hist if s.event < 0)

    def visible(self, loc: Loc) -> dict[str, list[int]] | None:
        found = {}
        for runner in self.runners:
            low = _floor(loc.hist, runner.R | _through(runner, loc))
            found[str(runner.pid)] = list(range(low, len(loc.hist)))
        return found

    # -- what may happen: labels

    def labels(self, me: Runner) -> list[Any]:
        """With which results the pending access may be made now, the most ordinary first."""
        kind = me.kind
        loc = me.loc
        if loc is None or kind > LOCK:
            if kind == UNLOCK:
                return self._places(me, loc)  # type: ignore[arg-type]
            if kind == RCU_LOCK:
                return list(range(1 << len(me.what.domain.running)))
            return ONE
        hist = loc.hist
        if kind == LOAD:
            if len(hist) == 1:
                return [hist[0].event]
            low = _floor(hist, me.R | _through(me, loc))
            return [hist[i].event for i in range(len(hist) - 1, low - 1, -1)]
        if kind == STORE:
            return self._places(me, loc)
        if kind == COND:
            low = _floor(hist, me.R | _through(me, loc))
            return [hist[i].event for i in range(len(hist) - 1, low - 1, -1) if me.arg(hist[i].value)]
        if kind in (RMW, LOCK):
            return self._targets(me, loc)
        return ONE

    def _places(self, me: Runner, loc: Loc) -> list[Any]:
        hist = loc.hist
        behind = me.W | _through(me, loc)
        if me.order == "release":
            behind |= me.K
        low = _floor(hist, behind)
        return [hist[i].event for i in range(len(hist) - 1, low - 1, -1) if not hist[i].glued]

    def _rmw_floors(self, me: Runner, loc: Loc) -> tuple[int, int, int]:
        """From where on a read-modify-write may fail, could succeed but for fences, and may succeed."""
        pointer = _through(me, loc)
        hist = loc.hist
        low = _floor(hist, me.R | pointer)
        view = me.R | me.W | pointer
        if me.order == "full" or me.order == "release":
            view |= me.K
        own = _floor(hist, view)
        return low, own, _floor(hist, view | self.G) if me.order == "full" else own

    def _targets(self, me: Runner, loc: Loc) -> list[Any]:
        hist = loc.hist
        low, _own, low_store = self._rmw_floors(me, loc)
        update = me.arg
        found = []
        for i in range(len(hist) - 1, low - 1, -1):
            store = hist[i]
            if me.kind == LOCK:
                if i >= low_store and not store.glued and not store.value:
                    found.append(store.event)
            elif (
                store.value is POISON
                or update(store.value) is NO_STORE
                or (i >= low_store and not store.glued)
            ):
                found.append(store.event)
        return found

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
        store = hist[_find(hist, event)]
        old = me.clock
        bit = 1 << d
        clock = old | bit | loc.fclk
        if event >= 0:
            clock |= self.clk[event]
        view = me.R | _through(me, loc)
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
        loc.readers.append(Reader(d, hist[_floor(hist, view)], me.arg if kind == COND else None, None))
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
            self._store_races(me, loc, loc.hist[_find(loc.hist, d)], None, clock)
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
        bad &= ~(me.W | _through(me, loc) | me.own)
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
            hist.insert(_find(hist, behind) + 1, store)
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
        store = loc.hist[_find(loc.hist, me.label)]
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
        loc.readers.append(Reader(d, floor, _is_free if kind == LOCK else None, read))
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

    # -- waiting and locks

    def _cond(self, obj: Any, field: str, cond: Callable[[Any], bool], order: str, doing: str) -> Any:
        me = self.cur
        if me is None:
            return super()._cond(obj, field, cond, order, doing)
        loc = self.loc_of(obj, field)
        me.kind, me.loc, me.arg = COND, loc, cond
        d = self.wait_until(me, self.labels, f"{doing} on {field}")  # type: ignore[arg-type]
        return self.read(me, d, loc, COND, order)

    def spin_lock(self, obj: Any, field: str) -> None:
        me = self.cur
        if me is None:
            self._outside(obj, field)
            return
        loc = self.loc_of(obj, field)
        me.kind, me.loc, me.order = LOCK, loc, "acquire"
        d = self.wait_until(me, self.labels, f"waits for {type(obj).__name__}")  # type: ignore[arg-type]
        self._exchange(me, d, loc, loc.hist[_find(loc.hist, me.label)], 1, "acquire", LOCK)
        loc.lastacq = d
        if self.recorder is not None:
            self.recorder.lock(me, loc, "lock")

    def spin_trylock(self, obj: Any, field: str) -> bool:
        me = self.cur
        if me is None:
            return super().spin_trylock(obj, field)
        got: bool = self.rmw(obj, field, _take, "acquire") == 0
        if got:
            loc = self.loc_of(obj, field)
            hist = loc.hist
            me.F |= hist[_find(hist, self.depth - 1) - 1].view
            loc.lastacq = self.depth - 1
        return got

    def spin_unlock(self, obj: Any, field: str) -> None:
        me = self.cur
        if me is None:
            raw_set(obj, field, 0)
            return
        loc = self.loc_of(obj, field)
        if not loc.hist[-1].value:
            raise LockingBug(f"{obj!r} is not locked")
        me.kind, me.loc, me.order = UNLOCK, loc, "release"
        d = self.point(me)
        self.write(me, d, loc, UNLOCK, "release", 0)
        if self.recorder is not None:
            self.recorder.lock(me, loc, "unlock")

    def blocked_races(self, me: Runner) -> None:
        if me.kind == LOCK and me.loc is not None:
            self._store_races(me, me.loc, None, self._rmw_floors(me, me.loc)[1], me.clock)

    def relaxed(self, me: Runner) -> None:
        d = self.wait_until(me, _may_differ, "spins until something it read changes")
        clock = me.clock | 1 << d
        newer = sorted({s.event for loc, read in me.turn for s in loc.hist[read.pos + 1 :]})
        if newer:
            self._races(me, d, me.clock, me.clock | self.clk[newer[0]], newer[1:])
        for loc, _read in me.turn:
            # Stores reach everybody in the end: do not spin on what is old by now.
            last = loc.hist[-1]
            if last.event >= 0:
                clock |= self.clk[last.event]
                self._saw(me, last, 0, "once")
        self.ev_pred = -2
        self.commit(me, d, clock, RELAX, None, LOADS)

    # -- what the search asks

    def still_asleep(self, parent: Node) -> dict[int, Any]:
        found: dict[int, Any] = {}
        loc, effect, kind = self.ev_loc, self.ev_w, self.ev_kind
        fence = effect >> 2
        special = kind == FREE or RCU_LOCK <= kind <= GP_END
        behind, d = self.ev_pred, self.depth - 1
        for t, entry in parent.sleep.items():
            if t == parent.task:
                continue
            sleeper = self.runners[t]
            mine = sleeper.loc
            if mine is not None and loc is not None:
                if (kind == FREE or sleeper.kind == FREE) and mine.kid == loc.kid:
                    continue
                if (
                    special
                    and mine is loc
                    and (kind in (GP_START, GP_END) or sleeper.kind in (GP_START, GP_END))
                ):
                    continue
            if mine is loc and loc is not None and not special and behind > -2:
                kept = {}
                for label, what in entry.items():
                    if fence and what >> 2 and (fence == 2 or what >> 2 == 2):
                        continue
                    stored = what & 3
                    if stored == RMWS and label == behind and effect & 3 == RMWS:
                        continue
                    if stored == STORES and label == behind:
                        # The gap this store was to land in has been split, or its front half closed.
                        kept[d] = what
                        if effect & 3 == RMWS:
                            continue
                    kept[label] = what
            elif fence:
                kept = {
                    label: what
                    for label, what in entry.items()
                    if not (what >> 2 and (fence == 2 or what >> 2 == 2))
                }
            else:
                kept = entry
            if kept:
                found[t] = kept
        return found

    def born(self, child: Runner, parent: Runner | None) -> None:
        if parent is not None:
            child.R = child.W = child.F = child.K = parent.K

    def joined(self, me: Runner, other: Runner) -> None:
        for view in "RWFK":
            setattr(me, view, getattr(me, view) | other.K)

    # -- the life of objects

    def _forget(self, loc: Loc) -> None:
        loc.hist = [Store(-1, raw_get(loc.obj, loc.field), 0, 0)]
        loc.readers = []

    def freed(self, obj: Any) -> None:
        me = self.cur
        if me is None or not type(obj).__k_slots__:
            return
        loc = self.loc_of(obj, next(iter(type(obj).__k_slots__)))
        me.kind, me.loc = FREE, loc
        d = self.point(me)
        clock = me.clock | 1 << d
        events: set[int] = set()
        for other in self.of_object[loc.kid]:
            events.update(r.event for r in other.readers)
            events.update(s.event for s in other.hist if s.event >= 0)
        for event in events:
            clock |= self.clk[event]
        self._races(me, d, me.clock, clock, sorted(events))
        for other in self.of_object[loc.kid]:
            other.freed = d
            other.fclk = clock
        self.freed_objects[loc.kid] = d
        self.oracles.note_free(me, d, obj)
        self.ev_pred = -2
        self.commit(me, d, clock, FREE, loc, LOADS)
        if self.recorder is not None:
            self.recorder.life(me, obj, "free")

    def allocated(self, obj: Any) -> None:
        again = self.root_of(obj) in self.freed_objects
        super().allocated(obj)
        if again:
            for loc in self.of_object[self.root_of(obj)] if self.root_of(obj) in self.of_object else ():
                self._forget(loc)

    # -- grace periods

    def reader_event(self, me: Runner, kind: int, loc: Loc, dom: Any) -> int:
        me.kind, me.loc = kind, loc
        d = self.point(me)
        clock = self._touch(me, d, loc, False, me.clock, me.clock | 1 << d)
        if kind == RCU_LOCK:
            view = dom.GP
            for i, gp in enumerate(dom.running):
                if me.label >> i & 1:
                    gp.waits_for.add(me.what)  # begun before it after all
                else:
                    view |= gp.view
            me.R |= view
            me.W |= view
            me.F |= view
            me.K |= view
        elif kind == RCU_UNLOCK:
            dom.RD |= me.K
        self.ev_pred = -2
        self.commit(me, d, clock, kind, loc, LOADS)
        return d

    def gp_start(self, me: Runner, loc: Loc, dom: Any) -> int:
        me.kind, me.loc = GP_START, loc
        d = self.point(me)
        clock = self._touch_both(me, d, loc, me.clock)
        self._mb(me)
        me.dirty = True
        self.ev_pred = -2
        self.commit(me, d, clock, GP_START, loc, G_WRITE)
        return d

    def gp_end(self, me: Runner, loc: Loc, dom: Any, gp: Any) -> None:
        me.kind, me.loc = GP_END, loc
        d = self.wait_until(me, lambda _me: not gp.waits_for, f"waits for readers of {dom.name}")
        old = me.clock
        for event, known in gp.left:
            # Their ends enable this event, they do not race with it.
            old |= self.clk[event]
            me.K |= known
        me.K |= dom.RD
        clock = self._touch_both(me, d, loc, old)
        self._mb(me)
        dom.GP |= gp.view
        self.ev_pred = -2
        self.commit(me, d, clock, GP_END, loc, G_WRITE)


def _may_differ(me: Runner) -> bool:
    return any(loc.hist[-1].pos > read.pos for loc, read in me.turn)
