"""Grace periods as a specification: who waits for whom, and what each then knows.

Models:      tools/memory-model/Documentation: rcu_read_lock, rcu_read_unlock, synchronize_rcu, the same for
             SRCU domains
Guards:      the engine's baton
Invariants:  G1 a section that a grace period found open has ended when it ends, G2 a section either began
             after the start of a grace period and sees what was before it, or ends before its end and is
             seen by it
Leaves out:  when callbacks run together: each gets a task and a grace period of its own
Read next:   rcu/srcu.py, the implementation that can be explored against this

In order-sensitive memory a section that begins while a grace period runs may count as begun before or after
its start; the memory model offers both (a label of the event), here they are only recorded.
"""

from collections.abc import Callable
from typing import Any

from kmodel.core.report import LockingBug
from kmodel.core.struct import KernelObject
from kmodel.explore.events import BARRIER, RCU_LOCK, RCU_UNLOCK, Loc, Runner


class Section:
    """An outermost reader section that is open."""

    __slots__ = ("domain", "runner")

    def __init__(self, runner: Runner, domain: "Domain") -> None:
        self.runner = runner
        self.domain = domain


class GracePeriod:
    """A grace period that has started."""

    __slots__ = ("clock", "event", "known", "left", "number", "view", "waits_for")

    def __init__(self, number: int, waits_for: set[Section]) -> None:
        self.number = number
        self.waits_for = waits_for
        self.left: list[tuple[int, int]] = []  # (event of the unlock, what its reader knew)
        self.view = 0
        self.known = 0
        self.event = -1
        self.clock = 0


class Domain:
    """One flavour of RCU, or one srcu_struct."""

    __slots__ = ("GP", "RD", "calls", "count", "loc", "name", "running", "sections")

    def __init__(self, name: str, loc: Loc) -> None:
        self.name = name
        self.loc = loc
        self.sections: dict[Section, None] = {}
        self.running: dict[GracePeriod, None] = {}
        self.calls: list[Runner] = []
        self.count = 0
        self.GP = 0  # what completed grace periods had seen at their start
        self.RD = 0  # what the readers that have ended knew


class RcuSpecification:
    """engine().rcu of an exploration."""

    def __init__(self, engine: Any) -> None:
        self.e = engine

    def domain(self, key: Any) -> Domain:
        """The record of a domain in this execution."""
        domains: dict[Any, Domain] = self.e.domains
        # Not dict.get(): on free-threaded 3.13.5 it takes 20 us on a dict that another thread
        # created (measured).
        found = domains[key] if key in domains else None
        if found is None:
            if isinstance(key, KernelObject):
                name = str(getattr(key, "name", "") or f"{type(key).__name__}#{key._k_id}")
                number = key._k_id or 0
            else:
                name, number = str(key), 0
            found = domains[key] = Domain(name, Loc(None, name, (number, f"<{name}>"), None))
        return found

    def read_lock(self, domain: Any) -> int:
        """An outermost section begins; the number belongs to read_unlock."""
        e = self.e
        me: Runner | None = e.cur
        if me is None:
            return 0
        dom = self.domain(domain)
        section = Section(me, dom)
        me.what = section
        d: int = e.reader_event(me, RCU_LOCK, dom.loc, dom)
        dom.sections[section] = None
        me.sections[d] = section
        if e.recorder is not None:
            e.recorder.rcu(me, "rcu-lock", dom.name)
        return d

    def read_unlock(self, domain: Any, idx: int) -> None:
        """It ends."""
        e = self.e
        me: Runner | None = e.cur
        if me is None:
            return
        section = me.sections.pop(idx, None)
        if section is None:  # SRCU lets another task end the section
            for other in e.runners:
                section = section or other.sections.pop(idx, None)
        if section is None:
            if idx:  # 0: begun before the execution, where nothing is recorded
                raise LockingBug(f"a section of {self.domain(domain).name} is ended twice")
            return
        dom = section.domain
        me.what = section
        d = e.reader_event(me, RCU_UNLOCK, dom.loc, dom)
        del dom.sections[section]
        for gp in dom.running:
            if section in gp.waits_for:
                gp.waits_for.discard(section)
                gp.left.append((d, me.K))
        if e.recorder is not None:
            e.recorder.rcu(me, "rcu-unlock", dom.name)

    def synchronize(self, domain: Any) -> None:
        """Wait for the sections that are open."""
        e = self.e
        me: Runner | None = e.cur
        if me is None:
            return
        dom = self.domain(domain)
        me.what = dom
        d = e.gp_start(me, dom.loc, dom)
        dom.count += 1
        gp = GracePeriod(dom.count, set(dom.sections))
        gp.event = d
        gp.view = me.K
        dom.running[gp] = None
        if e.recorder is not None:
            e.recorder.rcu(me, "gp-start", dom.name)
        e.gp_end(me, dom.loc, dom, gp)
        dom.running.pop(gp, None)
        if e.recorder is not None:
            e.recorder.rcu(me, "gp-end", dom.name)

    def call(self, domain: Any, func: Callable[[], None]) -> None:
        """Have func run after a grace period, in a task of its own."""
        dom = self.domain(domain)
        runner = self.e.add(self._callback, (domain, func), f"{dom.name}-callback", True)
        dom.calls.append(runner)
        if self.e.recorder is not None and self.e.cur is not None:
            self.e.recorder.rcu(self.e.cur, "gp-call", dom.name)

    def _callback(self, domain: Any, func: Callable[[], None]) -> None:
        self.synchronize(domain)
        func()

    def barrier(self, domain: Any) -> None:
        """Wait for the callbacks queued so far."""
        e = self.e
        me: Runner | None = e.cur
        if me is None:
            return
        dom = self.domain(domain)
        if dom.calls:
            e.wait_for(me, list(dom.calls), f"waits for the callbacks of {dom.name}")


__all__ = ["BARRIER", "Domain", "GracePeriod", "RcuSpecification", "Section"]
