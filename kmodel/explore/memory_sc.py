"""Sequential consistency, the rest: objects that come and go, and grace periods.

Models:      kmem_cache and RCU as far as the search must know of them
Guards:      the engine's baton
Invariants:  M3 an access and the free of its object are tried in both orders
Read next:   explore/rcu_spec.py
"""

from typing import Any

from kmodel.explore.events import (
    FREE,
    GP_END,
    GP_START,
    Loc,
    Runner,
)
from kmodel.explore.sc_accesses import ScAccesses


class ScEngine(ScAccesses):
    """Explore under sequential consistency."""

    memory = "sc"

    # -- the life of objects

    def freed(self, obj: Any) -> None:
        me = self.cur
        if me is None:
            return
        loc = self.first_word_of(obj)
        if loc is None:
            return
        me.kind, me.loc = FREE, loc
        d = self.point(me)
        old, clock = me.clock, me.clock | 1 << d
        earlier_events: list[int] = []
        for other in self.of_object[loc.kid]:
            clock |= other.wclk | other.rclk
            earlier_events += (*other.reads, other.lastw)
        self._races(me, d, old, clock, sorted(earlier_events))
        for other in self.of_object[loc.kid]:
            other.lastw, other.wclk, other.rclk, other.freed = d, clock, 0, d
            other.reads.clear()
        self.freed_objects[loc.kid] = d
        self.oracles.note_free(me, d, obj)
        self.commit(me, d, clock, FREE, loc, True)
        if self.recorder is not None:
            self.recorder.life(me, obj, "free")

    def allocated(self, obj: Any) -> None:
        me = self.cur
        kid = self.root_of(obj)
        self.freed_objects.pop(kid, None)
        for loc in self.of_object[kid] if kid in self.of_object else ():
            loc.freed = -1
            loc.allr = loc.allw = loc.plainr = loc.plainw = 0
        self.oracles.note_alloc(me, obj)
        if self.recorder is not None and me is not None:
            self.recorder.life(me, obj, "alloc")

    # -- grace periods: the readers are what a grace period's start may come before or after

    def reader_event(self, me: Runner, kind: int, loc: Loc, dom: Any) -> int:
        """rcu_read_lock or rcu_read_unlock of a domain."""
        me.kind, me.loc = kind, loc
        d = self.point(me)
        old = me.clock
        clock = old | loc.wclk | 1 << d
        self._races(me, d, old, clock, [loc.lastw])
        loc.reads.append(d)
        loc.rclk |= clock
        me.K |= loc.sync | 1 << d
        self.commit(me, d, clock, kind, loc, False)
        return d

    def gp_start(self, me: Runner, loc: Loc, dom: Any) -> int:
        """synchronize_rcu notes who reads."""
        me.kind, me.loc = GP_START, loc
        d = self.point(me)
        old = me.clock
        clock = old | loc.wclk | loc.rclk | 1 << d
        self._races(me, d, old, clock, [loc.lastw, *loc.reads])
        loc.lastw, loc.wclk, loc.rclk = d, clock, 0
        loc.reads.clear()
        me.K |= 1 << d
        # What was known here is known to sections that begin later.
        loc.sync |= me.K
        me.dirty = True
        self.commit(me, d, clock, GP_START, loc, True)
        return d

    def gp_end(self, me: Runner, loc: Loc, dom: Any, gp: Any) -> None:
        """It has waited for them."""
        me.kind, me.loc = GP_END, None
        d = self.wait_until(me, lambda _me: not gp.waits_for, f"waits for readers of {loc.field}")
        clock = me.clock | 1 << d
        for event, known in gp.left:
            clock |= self.clk[event]
            me.K |= known
        me.K |= 1 << d
        self.commit(me, d, clock, GP_END, None, False)
