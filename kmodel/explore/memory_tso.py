"""Total store order: stores wait in their task's buffer, in order, and reach memory some time later.

Models:      x86-64's memory, as the kernel runs on it
Guards:      the engine's baton
Invariants:  T1 stores of a task reach memory in program order, T2 a task reads its own buffer first, T3
             whatever is atomic or a full barrier waits for the buffer to drain
Leaves out:  the compiler, which may reorder what lkmm lets it; rcu_read_unlock() drains here
Read next:   explore/memory_lkmm.py

Each task has a companion that drains its buffer; the search chooses when, as it chooses for tasks. Putting
a store into the buffer is nobody else's business, so it is no event; its way to memory is, and so is a load
of what may still be in the buffer.
"""

from collections.abc import Callable
from typing import Any

import attrs

from kmodel.core.struct import raw_set
from kmodel.explore.events import FENCE, FLUSH, FREE, LOAD, Loc, Runner
from kmodel.explore.memory_sc import ScEngine
from kmodel.explore.search import Node


@attrs.define(eq=False)
class Buffered:
    """A store on its way to memory: what its task knew, and which of its loads have read it here."""

    loc: Loc
    value: Any
    order: str
    clock: int
    known: int
    nocheck: bool
    loads: list[int] = attrs.field(factory=list)
    allr: int = 0
    plainr: int = 0


class TsoEngine(ScEngine):
    """Explore with store buffers."""

    memory = "tso"

    def reset(self) -> None:
        super().reset()
        self.buffers: dict[int, list[Buffered]] = {}

    def born(self, child: Runner, parent: Runner | None) -> None:
        super().born(child, parent)
        companion = Runner(len(self.runners), child.pid, child.task, None, ())
        companion.started = companion.finished = companion.daemon = True
        companion.owner, child.flusher = child, companion
        companion.kind = FLUSH
        companion.ready = self._full
        companion.doing = "drains its store buffer"
        self.buffers[child.idx] = []
        self.runners.append(companion)
        self.waiting.append(companion)

    def _full(self, companion: Runner) -> bool:
        assert companion.owner is not None
        return bool(self.buffers[companion.owner.idx])

    # -- accesses

    def _load(self, obj: Any, field: str, order: str) -> Any:
        me = self.cur
        if me is not None:
            loc = self.locs.get((obj._k_id, field))
            if loc is not None and loc.obj is obj and (id(loc) in me.pointers or self._newest(me, loc)):
                me.kind, me.loc = LOAD, loc
                return self._load_own(me, self.point(me), loc, order)
        return super()._load(obj, field, order)

    def _newest(self, me: Runner, loc: Loc) -> Buffered | None:
        """The last store to `loc` in the task's buffer."""
        return next((b for b in reversed(self.buffers[me.idx]) if b.loc is loc), None)

    def _load_own(self, me: Runner, d: int, loc: Loc, order: str) -> Any:
        """Load where the task has stored. While nobody else's store came behind its own, it reads its own,
        from the buffer or from memory: the load and the way of its store to memory are independent.
        """
        newest = self._newest(me, loc)
        if loc.freed >= 0 or (newest is None and loc.lastw != me.pointers[id(loc)]):
            return self.read(me, d, loc, LOAD, order)
        bit = 1 << d
        clock = me.clock | bit
        where = loc if newest is None else newest
        if not me.nocheck:
            where.allr |= bit
            where.plainr |= bit if order == "plain" else 0
        if newest is None:
            loc.reads.append(d)
            loc.rclk |= clock
            value = loc.get(loc.obj)  # type: ignore[misc]
            me.turn.append((loc, len(loc.writes)))
        else:
            newest.loads.append(d)
            value = newest.value
            me.turn.append((loc, len(loc.writes) + sum(b.loc is loc for b in self.buffers[me.idx])))
        me.K |= bit
        self.commit(me, d, clock, LOAD, loc, False)
        if self.recorder is not None:
            self.recorder.load(me, loc, LOAD, order, value, forwarded=newest is not None)
        return value

    def still_asleep(self, parent: Node) -> dict[int, Any]:
        found = super().still_asleep(parent)
        loc, task = self.ev_loc, parent.task
        if loc is None or self.ev_kind == FREE:
            return found
        for t, stores in parent.sleep.items():
            sleeper = self.runners[t]
            if t == task or t in found or sleeper.loc is not loc:
                continue
            if sleeper.owner is not None:
                own = sleeper.owner.idx == task and self.ev_kind == LOAD
            else:
                own = sleeper.kind == LOAD and self._reads_own(sleeper, loc)
            if own:
                found[t] = stores
        return found

    def _reads_own(self, me: Runner, loc: Loc) -> bool:
        return self._newest(me, loc) is not None or loc.lastw == me.pointers.get(id(loc))

    def _store(self, obj: Any, field: str, value: Any, order: str) -> None:
        me = self.cur
        if me is None:
            raw_set(obj, field, value)
            return
        self._buffer(me, self.loc_of(obj, field), value, order)

    def _buffer(self, me: Runner, loc: Loc, value: Any, order: str) -> None:
        if loc.freed >= 0:
            self.drain(me)
        buffer = self.buffers[me.idx]
        if not buffer:
            assert me.flusher is not None
            me.flusher.loc = loc
        buffer.append(Buffered(loc, value, order, me.clock, me.K, me.nocheck))
        me.dirty = True
        if self.recorder is not None:
            self.recorder.buffered(me, loc, order, value)

    def flush(self, runner: Runner) -> None:
        owner = runner.owner
        assert owner is not None
        buffer = self.buffers[owner.idx]
        stored = buffer.pop(0)
        loc, order, value = stored.loc, stored.order, stored.value
        d = self.depth
        runner.clock |= stored.clock
        runner.K |= stored.known
        runner.nocheck = stored.nocheck
        self.write(runner, d, loc, FLUSH, order, value)
        # From here on somebody else's store could have come between this one and these loads of it.
        loc.reads += stored.loads
        loc.allr |= stored.allr
        loc.plainr |= stored.plainr
        for load in stored.loads:
            loc.rclk |= self.clk[load]
        runner.loc = buffer[0].loc if buffer else None
        owner.K |= 1 << d
        owner.pointers[id(loc)] = d
        if self.recorder is not None:
            self.recorder.store(runner, loc, FLUSH, order, value)

    def drain(self, me: Runner | None) -> None:
        """Wait until the task's stores are in memory."""
        if me is None:
            return
        companion = me.flusher
        assert companion is not None
        buffer = self.buffers[me.idx]
        if buffer:
            me.kind, me.loc = FENCE, None
            d = self.wait_until(me, lambda _me: not buffer, "waits for its store buffer to drain")
            self.commit(me, d, me.clock | companion.clock | 1 << d, FENCE, None, False)
        else:
            me.clock |= companion.clock

    def rmw(self, obj: Any, field: str, update: Callable[[Any], Any], order: str) -> Any:
        self.drain(self.cur)
        return super().rmw(obj, field, update, order)

    def fence(self, kind: str) -> None:
        if kind == "mb":
            self.drain(self.cur)
        super().fence(kind)

    def _cond(self, obj: Any, field: str, cond: Callable[[Any], bool], order: str, doing: str) -> Any:
        me = self.cur
        if me is not None and self._newest(me, self.loc_of(obj, field)):
            value = self._load(obj, field, order)
            if cond(value):
                return value
            self.drain(me)
        return super()._cond(obj, field, cond, order, doing)

    # -- locks, tasks, lives, grace periods: all of these contain full barriers or atomic operations

    def spin_lock(self, obj: Any, field: str) -> None:
        self.drain(self.cur)
        super().spin_lock(obj, field)

    def spin_unlock(self, obj: Any, field: str) -> None:
        me = self.cur
        if me is None:
            raw_set(obj, field, 0)
            return
        loc = self.loc_of(obj, field)
        self._buffer(me, loc, 0, "release")

    def add(self, func: Callable[..., Any], args: tuple[Any, ...], comm: str, daemon: bool) -> Runner:
        self.drain(self.cur)
        return super().add(func, args, comm, daemon)

    def gone(self, other: Runner) -> bool:
        return other.finished and not self.buffers[other.idx]

    def joined(self, me: Runner, other: Runner) -> None:
        super().joined(me, other)
        assert other.flusher is not None
        me.clock |= other.flusher.clock

    def freed(self, obj: Any) -> None:
        self.drain(self.cur)
        super().freed(obj)

    def reader_event(self, me: Runner, kind: int, loc: Loc, dom: Any) -> int:
        self.drain(me)
        return super().reader_event(me, kind, loc, dom)

    def gp_start(self, me: Runner, loc: Loc, dom: Any) -> int:
        self.drain(me)
        return super().gp_start(me, loc, dom)
