"""The kernel's memory model, the rest: waits, locks, objects that come and go, and grace periods.

Models:      see explore/lkmm_accesses.py
Guards:      the engine's baton
Invariants:  M4 the critical sections of a lock are ordered, for third parties too
Read next:   explore/rcu_spec.py, explore/lkmm_accesses.py
"""

from collections.abc import Callable
from typing import Any

from kmodel.core.report import LockingBug
from kmodel.core.struct import raw_get, raw_set
from kmodel.explore.events import (
    COND,
    FREE,
    GP_END,
    GP_START,
    LOCK,
    RCU_LOCK,
    RCU_UNLOCK,
    RELAX,
    UNLOCK,
    Loc,
    Runner,
)
from kmodel.explore.lkmm_accesses import LkmmAccesses
from kmodel.explore.lkmm_labels import (
    G_WRITE,
    LOADS,
    Store,
    find,
    take,
)


class LkmmEngine(LkmmAccesses):
    """Explore under the kernel's memory model."""

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
        self._exchange(me, d, loc, loc.hist[find(loc.hist, me.label)], 1, "acquire", LOCK)
        loc.lastacq = d
        if self.recorder is not None:
            self.recorder.lock(me, loc, "lock")

    def spin_trylock(self, obj: Any, field: str) -> bool:
        me = self.cur
        if me is None:
            return super().spin_trylock(obj, field)
        got: bool = self.rmw(obj, field, take, "acquire") == 0
        if got:
            loc = self.loc_of(obj, field)
            hist = loc.hist
            me.F |= hist[find(hist, self.depth - 1) - 1].view
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

    # -- the life of objects

    def _forget(self, loc: Loc) -> None:
        loc.hist = [Store(-1, raw_get(loc.obj, loc.field), 0, 0)]
        loc.readers = []

    def freed(self, obj: Any) -> None:
        me = self.cur
        if me is None:
            return
        loc = self.first_word_of(obj)
        if loc is None:
            return
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
