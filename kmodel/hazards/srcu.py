"""SRCU: the implementation against what it promises, with each of its guards taken away in turn.

Models:      kernel/rcu/srcutree.c as kmodel has it in rcu/srcu.py and rcu/srcu_gp.py (7.2)
Guards:      every barrier and every scan is one
Invariants:  V1 a section that was open when synchronize_srcu() was called is over when it returns
Leaves out:  callbacks; SRCU-fast
Read next:   rcu/srcu_gp.py, where A to E are explained

Elsewhere the explorer runs grace periods by their specification. Here use_implementation makes it run the
counters, the flip and the scans, and "use after free" is how a grace period that ended early shows.

Barriers D and E, around the flip, have no scenario: without them readers may go on using the old index for
longer, which costs the updater further scans. They bound how far the counters run, not who is waited for.
"""

from typing import Any

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    Struct,
    boot,
    kernel_struct,
    kfree,
    rcu_assign_pointer,
    rcu_dereference,
)
from kmodel.hazards.catalogue import Scenario, register
from kmodel.rcu import SrcuStruct, srcu_down_read, srcu_up_read, synchronize_srcu
from kmodel.rcu.srcu_gp import srcu_readers_active_idx_check


@kernel_struct
class Foo(Struct):
    """What readers use and the updater frees."""

    uses: int = 0


@kernel_struct
class Shared(Struct):
    """Where readers find it."""

    foo: Foo | None = None


class State:
    """A domain, and something published in it."""

    def __init__(self) -> None:
        boot()
        self.ssp = SrcuStruct("domain", use_implementation=True)
        self.old = Foo()
        self.new = Foo()
        self.shared = Shared(foo=self.old)
        self.idx = -1
        self.uses = 0  # the scenario's own count: sections that got the old one


def quiet_domain() -> State:
    """Nobody is inside."""
    return State()


def reader_inside() -> State:
    """A reader has begun its section and has got the pointer; `last_of_section` is the rest of it."""
    state = State()
    state.idx = srcu_down_read(state.ssp)
    return state


def last_of_section(state: State) -> None:
    """The end of the section that reader_inside() began."""
    assert READ_ONCE(state.old, "uses") >= 0
    srcu_up_read(state.ssp, state.idx)


def reader(state: State) -> None:
    """One section."""
    idx = srcu_down_read(state.ssp)
    foo: Any = rcu_dereference(state.shared, "foo")
    assert READ_ONCE(foo, "uses") >= 0
    srcu_up_read(state.ssp, idx)


def counting_reader(state: State) -> None:
    """One section, which leaves a mark in what it got."""
    idx = srcu_down_read(state.ssp)
    foo: Any = rcu_dereference(state.shared, "foo")
    if foo is state.old:
        state.uses = 1
        WRITE_ONCE(foo, "uses", 1)
    srcu_up_read(state.ssp, idx)


def visitor(state: State) -> None:
    """A section with nothing in it."""
    srcu_up_read(state.ssp, srcu_down_read(state.ssp))


def scan(state: State) -> None:
    """One look at the index, out of a grace period. The reader of the set-up is on it all the time."""
    quiet = srcu_readers_active_idx_check(state.ssp, state.idx)
    assert not quiet, "the scan says that nobody is on the index, and there is a reader inside"


def updater(state: State) -> None:
    """Replace it; free the old one when nobody has it any more, and what readers did to it is seen."""
    rcu_assign_pointer(state.shared, "foo", state.new)
    synchronize_srcu(state.ssp)
    assert READ_ONCE(state.old, "uses") == state.uses, "what a section did is not seen after the grace period"
    kfree(state.old)


def updater_after_another(state: State) -> None:
    """A grace period before, for no reason: in the middle of it the readers' index is flipped once."""
    synchronize_srcu(state.ssp)
    updater(state)


def _srcu(name: str, summary: str, threads: Any, *hazards: str, **more: Any) -> None:
    register(
        Scenario(
            **{
                "name": name,
                "hazards": hazards,
                "summary": summary,
                "setup": quiet_domain,
                "threads": threads,
                "without": name,
                "breaks": "use-after-free",
                **more,
            }
        )
    )


_srcu(
    "srcu-second-scan",
    "The readers on the index before the flip are not waited for.",
    (reader, updater),
    memory="sc",
)
_srcu(
    "srcu-mb-b",
    "What a section reads leaks out before the increment that announces it.",
    (reader, updater),
)
_srcu(
    "srcu-mb-c",
    "What a section stores leaks out behind the increment that ends it.",
    (counting_reader, updater),
    breaks="assertion",
)
_srcu(
    "srcu-first-scan",
    "A reader fetched its index before a flip, and counts itself in on it after the scan.",
    (reader, updater_after_another),
    "H70",
    memory="sc",
)
_srcu(
    "srcu-unlocks-first",
    "Locks are summed before unlocks: a reader that comes and goes between them hides one that is inside.",
    (last_of_section, reader, updater),
    "H69",
    setup=reader_inside,
    memory="sc",
)
_srcu(
    "srcu-mb-a",
    "An unlock is counted whose lock is not, as far as the updater can see, and hides another reader.",
    (visitor, scan),
    "H69",
    setup=reader_inside,
    breaks="assertion",
)
