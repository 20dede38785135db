"""Sequentially consistent memory: every load returns the last store.

Models:      nothing in Linux: the machine everybody first thinks of
Guards:      the engine's baton
Invariants:  M1 values live in the objects' own slots, M2 two accesses of one location are independent if
             both only load
Leaves out:  all reordering; see memory_tso.py and memory_lkmm.py
Read next:   explore/memory_tso.py

An event is dependent by its effect: a cmpxchg that fails is a load. A marked access synchronises with every
earlier marked store of its location, and so do locks; plain accesses do not, which is what the race oracle
goes by.
"""

from collections.abc import Callable
from typing import Any

from kmodel.core.access import NO_STORE
from kmodel.core.lifetime import POISON
from kmodel.core.report import LockingBug
from kmodel.core.struct import raw_get, raw_set
from kmodel.explore.engine import ExploreEngine
from kmodel.explore.events import (
    COND,
    FREE,
    LOAD,
    LOCK,
    RELAX,
    RMW,
    STORE,
    UNLOCK,
    Aborted,
    Loc,
    Runner,
)
from kmodel.explore.search import Node


class ScAccesses(ExploreEngine):
    """Accesses, waits and locks under sequential consistency."""

    memory = "sc"

    # -- accesses

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
        """The event of a load."""
        old = me.clock
        bit = 1 << d
        last = loc.lastw
        clock = old | loc.wclk | bit
        if last >= 0 and not old >> last & 1 and d >= self.plen - 1:
            self.search.race(last, clock, me)
        loc.reads.append(d)
        loc.rclk |= clock
        value = loc.get(loc.obj)  # type: ignore[misc]
        if loc.freed >= 0:
            self.oracles.use_after_free(me, d, loc, "read")
        if me.nocheck:
            bad = 0
        elif order == "plain":
            bad = loc.allw & ~me.K
            loc.plainr |= bit
            loc.allr |= bit
        else:
            bad = loc.plainw & ~me.K
            loc.allr |= bit
            me.K |= loc.sync
        if bad and self.check_races:
            self.oracles.data_race(me, d, loc, bad, "load", order)
        me.K |= bit
        me.turn.append((loc, len(loc.writes)))
        self.commit(me, d, clock, kind, loc, False)
        if self.recorder is not None:
            self.recorder.load(me, loc, kind, order, value)
        return value

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
        d = self.point(me)
        self.write(me, d, loc, STORE, order, value)
        if self.recorder is not None:
            self.recorder.store(me, loc, STORE, order, value)

    def write(self, me: Runner, d: int, loc: Loc, kind: int, order: str, value: Any) -> None:
        """The event of a store."""
        old = me.clock
        bit = 1 << d
        clock = old | loc.wclk | loc.rclk | bit
        if d >= self.plen - 1:
            seen = old
            for earlier in reversed(loc.reads):
                if not seen >> earlier & 1:
                    self.search.race(earlier, clock, me)
                    seen |= self.clk[earlier]
            last = loc.lastw
            if last >= 0 and not seen >> last & 1:
                self.search.race(last, clock, me)
        obj = loc.obj
        loc.writes.append((d, loc.get(obj)))  # type: ignore[misc]
        loc.lastw = d
        loc.wclk = clock
        loc.rclk = 0
        loc.reads.clear()
        if loc.freed >= 0:
            self.oracles.use_after_free(me, d, loc, "written")
        me.K |= bit
        if me.nocheck:
            bad = 0
        elif order == "plain":
            bad = (loc.allw | loc.allr) & ~me.K
            loc.plainw |= bit
            loc.allw |= bit
        else:
            bad = (loc.plainw | loc.plainr) & ~me.K
            loc.allw |= bit
            if kind == RMW:
                me.K |= loc.sync
            loc.sync |= me.K
        if bad and self.check_races:
            self.oracles.data_race(me, d, loc, bad, "store", order)
        me.dirty = True
        loc.set(obj, value)  # type: ignore[misc]
        self.commit(me, d, clock, kind, loc, True)

    def plain_load(self, obj: Any, field: str) -> Any:
        return self._load(obj, field, "plain")

    def plain_store(self, obj: Any, field: str, value: Any) -> None:
        self._store(obj, field, value, "plain")

    def load(self, obj: Any, field: str, order: str) -> Any:
        return self._load(obj, field, order)

    def store(self, obj: Any, field: str, value: Any, order: str) -> None:
        self._store(obj, field, value, order)

    def rmw(self, obj: Any, field: str, update: Callable[[Any], Any], order: str) -> Any:
        if field not in obj.__k_atomic__:
            raise TypeError(f"{type(obj).__name__}.{field} is not declared atomic()")
        me = self.cur
        if me is None:
            old = raw_get(obj, field)
            new = update(old)
            if new is not NO_STORE:
                raw_set(obj, field, new)
            return old
        key = (obj._k_id, field)
        loc = self.locs[key] if key in self.locs else None
        if loc is None or loc.obj is not obj:
            loc = self.loc_of(obj, field)
        me.kind = RMW
        me.loc = loc
        d = self.point(me)
        old = loc.get(obj)  # type: ignore[misc]
        if loc.freed >= 0 and old is POISON:
            self.oracles.use_after_free(me, d, loc, "changed")
        new = update(old)
        if new is NO_STORE:
            self.read(me, d, loc, RMW, order)
        else:
            self.write(me, d, loc, RMW, order, new)
            if self.recorder is not None:
                self.recorder.rmw(me, loc, order, old, new)
        return old

    def fence(self, kind: str) -> None:
        if self.recorder is not None and self.cur is not None:
            self.recorder.note(self.cur, "fence", "", order=kind)

    # -- waiting

    def _cond(self, obj: Any, field: str, cond: Callable[[Any], bool], order: str, doing: str) -> Any:
        me = self.cur
        if me is None:
            if self.over is not None:
                raise Aborted
            value = raw_get(obj, field)
            if not cond(value):
                raise LockingBug(
                    f"{obj!r}.{field} is waited for outside the run, where nothing can change it"
                )
            return value
        loc = self.loc_of(obj, field)
        me.kind, me.loc, me.arg = COND, loc, cond
        d = self.wait_until(me, _holds, f"{doing} on {field}")
        self._cond_races(me, loc)
        return self.read(me, d, loc, COND, order)

    def _cond_races(self, me: Runner, loc: Loc) -> None:
        """The condition may have held before some store."""
        seen = me.clock
        for earlier, before in reversed(loc.writes):
            if seen >> earlier & 1:
                return
            if me.arg(before):
                self.search.race(earlier, me.clock | loc.wclk, me)
                return

    def blocked_races(self, me: Runner) -> None:
        loc = me.loc
        if loc is None:
            return
        if me.kind == COND:
            self._cond_races(me, loc)
        elif me.kind == LOCK:
            self._lock_races(me, loc)

    def relaxed(self, me: Runner) -> None:
        d = self.wait_until(me, _may_differ, "spins until something it read changes")
        first = min(loc.writes[seen][0] for loc, seen in me.turn if len(loc.writes) > seen)
        self.commit(me, d, me.clock | self.clk[first] | 1 << d, RELAX, None, False)

    # -- locks

    def _lock_races(self, me: Runner, loc: Loc) -> None:
        earlier = loc.lastacq
        if earlier >= 0 and not me.clock >> earlier & 1:
            self.search.race(earlier, me.clock | loc.wclk | loc.rclk, me)

    def spin_lock(self, obj: Any, field: str) -> None:
        me = self.cur
        if me is None:
            self._outside(obj, field)
            return
        loc = self.loc_of(obj, field)
        me.kind, me.loc = LOCK, loc
        d = self.wait_until(me, _unlocked, f"waits for {type(obj).__name__}")
        if loc.freed >= 0 and loc.get(obj) is POISON:  # type: ignore[misc]
            self.oracles.use_after_free(me, d, loc, "locked")
        self._lock_races(me, loc)
        # The unlock that let it in enables this event, it does not race with it.
        me.clock |= loc.wclk
        loc.lastacq = d
        self.write(me, d, loc, LOCK, "full", 1)
        me.K |= loc.sync
        if self.recorder is not None:
            self.recorder.lock(me, loc, "lock")

    def _outside(self, obj: Any, field: str) -> None:
        if self.over is not None:
            return
        if raw_get(obj, field):
            raise LockingBug(f"{obj!r} is taken outside the run, where nothing can release it")
        raw_set(obj, field, 1)

    def spin_trylock(self, obj: Any, field: str) -> bool:
        me = self.cur
        if me is None:
            free = not raw_get(obj, field)
            raw_set(obj, field, 1)
            return free
        got: bool = self.rmw(obj, field, _take, "acquire") == 0
        if got:
            self.loc_of(obj, field).lastacq = self.depth - 1
        return got

    def spin_unlock(self, obj: Any, field: str) -> None:
        me = self.cur
        if me is None:
            raw_set(obj, field, 0)
            return
        loc = self.loc_of(obj, field)
        if not loc.get(obj):  # type: ignore[misc]
            raise LockingBug(f"{obj!r} is not locked")
        me.kind, me.loc = UNLOCK, loc
        d = self.point(me)
        self.write(me, d, loc, UNLOCK, "release", 0)
        if self.recorder is not None:
            self.recorder.lock(me, loc, "unlock")

    # -- what the search asks

    def still_asleep(self, parent: Node) -> dict[int, Any]:
        """Which tasks that slept at `parent` still do after the event that was just made."""
        found = {}
        loc, isw, kind = self.ev_loc, self.ev_w, self.ev_kind
        runners = self.runners
        for t, stores in parent.sleep.items():
            if t == parent.task:
                continue
            if loc is not None:
                sleeper = runners[t]
                mine = sleeper.loc
                if mine is loc:
                    if stores or isw:
                        continue
                elif mine is not None and mine.kid == loc.kid and (kind == FREE or sleeper.kind == FREE):
                    continue
            found[t] = stores
        return found

    def born(self, child: Runner, parent: Runner | None) -> None:
        if parent is not None:
            child.K = parent.K

    def joined(self, me: Runner, other: Runner) -> None:
        me.K |= other.K

    def _races(self, me: Runner, d: int, old: int, clock: int, earlier: list[int]) -> None:
        """An event with the clock `clock`, `old` before it, conflicts with these; the last that come first
        race.
        """
        if d < self.plen - 1:
            return
        seen = old
        for event in reversed(earlier):
            if event >= 0 and not seen >> event & 1:
                self.search.race(event, clock, me)
                seen |= self.clk[event]


def _holds(me: Runner) -> bool:
    loc = me.loc
    assert loc is not None
    return bool(me.arg(loc.get(loc.obj)))  # type: ignore[misc]


def _unlocked(me: Runner) -> bool:
    loc = me.loc
    assert loc is not None
    value = loc.get(loc.obj)  # type: ignore[misc]
    return not value or value is POISON  # what a freed lock holds: nobody is going to unlock it


def _may_differ(me: Runner) -> bool:
    return any(len(loc.writes) > seen for loc, seen in me.turn)


def _take(value: Any) -> Any:
    return NO_STORE if value else 1
