"""The kernel's memory model: which results an access may have, and which of them need not be tried again.

Models:      see explore/lkmm_accesses.py
Guards:      the engine's baton
Invariants:  M1 a load returns a store at or after what its task must see, M2 a store lands behind what its
             task must be behind, M3 nothing lands between a read-modify-write and the store it read
Read next:   explore/lkmm_accesses.py for the rules, explore/search.py for what labels are
"""

from collections.abc import Callable
from typing import Any

from kmodel.core.access import NO_STORE
from kmodel.core.lifetime import POISON
from kmodel.core.struct import raw_get
from kmodel.explore.events import (
    COND,
    FREE,
    GP_END,
    GP_START,
    LOAD,
    LOCK,
    RCU_LOCK,
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


def floor(hist: list[Store], view: int) -> int:
    """Index of the last store that is in a view."""
    for i in range(len(hist) - 1, 0, -1):
        if hist[i].bit & view:
            return i
    return 0


def find(hist: list[Store], event: int) -> int:
    """Index of the store that an event made."""
    for i in range(len(hist) - 1, -1, -1):
        if hist[i].event == event:
            return i
    raise AssertionError(f"no store of event {event}")


def through(me: Runner, loc: Loc) -> int:
    """What the pointer through which this task reaches a location obliges it to see."""
    pointers = me.pointers
    return pointers[loc.kid] if loc.kid in pointers else 0


def is_free(value: Any) -> bool:
    """Whether a lock word is that of a free lock."""
    return not value


def take(value: Any) -> Any:
    """The update of a trylock."""
    return NO_STORE if value else 1


class LkmmLabels(ScEngine):
    """Locations with their coherence order, and what the search asks about them."""

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
            low = floor(loc.hist, runner.R | through(runner, loc))
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
            low = floor(hist, me.R | through(me, loc))
            return [hist[i].event for i in range(len(hist) - 1, low - 1, -1)]
        if kind == STORE:
            return self._places(me, loc)
        if kind == COND:
            low = floor(hist, me.R | through(me, loc))
            return [hist[i].event for i in range(len(hist) - 1, low - 1, -1) if me.arg(hist[i].value)]
        if kind in (RMW, LOCK):
            return self._targets(me, loc)
        return ONE

    def _places(self, me: Runner, loc: Loc) -> list[Any]:
        hist = loc.hist
        behind = me.W | through(me, loc)
        if me.order == "release":
            behind |= me.K
        low = floor(hist, behind)
        return [hist[i].event for i in range(len(hist) - 1, low - 1, -1) if not hist[i].glued]

    def _rmw_floors(self, me: Runner, loc: Loc) -> tuple[int, int, int]:
        """From where on a read-modify-write may fail, could succeed but for fences, and may succeed."""
        pointer = through(me, loc)
        hist = loc.hist
        low = floor(hist, me.R | pointer)
        view = me.R | me.W | pointer
        if me.order == "full" or me.order == "release":
            view |= me.K
        own = floor(hist, view)
        return low, own, floor(hist, view | self.G) if me.order == "full" else own

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
