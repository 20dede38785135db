"""How a uprobe ends while somebody still looks at it: references, the tree, and the chain before kfree().

Models:      kernel/events/uprobes.c, put_uprobe, uprobe_free_deferred, __insert_uprobe (7.2); find_uprobe and
             pre_ssout
             as the series of July 2024 first had them
Guards:      see uprobes/lifetime.py
Invariants:  U1 ref never goes from 0 to 1, U3 nobody touches a freed uprobe, and the tree has each key once
Leaves out:  consumers and breakpoints: unregister here is the last put
Read next:   uprobes/lifetime.py, uprobes/find_refcount.py; then hazards/speculation.py

WARN is switched off where a reference count is abused: the kernel's refcount_t notices, and warns, but what
the
warning is about is the memory.
"""

from typing import Any

from kmodel.core import boot
from kmodel.explore import Verdict
from kmodel.fs import Inode, iget_path
from kmodel.hazards.catalogue import Scenario, register
from kmodel.rcu import (
    __srcu_read_lock,
    __srcu_read_unlock,
    rcu_read_lock_trace,
    rcu_read_unlock_trace,
)
from kmodel.uprobes import Uprobe, find_uprobe_rcu, get_uprobe, lifetime, put_uprobe, try_get_uprobe
from kmodel.uprobes.find_refcount import find_uprobe
from kmodel.uprobes.register import alloc_uprobe
from kmodel.uprobes.tree import check_invariants, uprobes

OFFSET = 0x10


class State:
    """A file with one uprobe, to which one reference is left: the one that unregister puts."""

    def __init__(self) -> None:
        boot()
        inode = iget_path("/bin/prog", size=0x1000)
        assert inode is not None
        self.inode: Inode = inode
        uprobe = alloc_uprobe(inode, OFFSET, 0)
        assert isinstance(uprobe, Uprobe)
        self.uprobe = uprobe
        self.idx = -1


def unregister(state: State) -> None:
    """The last put. A worker takes the uprobe out of the tree, waits for both kinds of readers, and frees
    it.
    """
    put_uprobe(state.uprobe)


def use(uprobe: Uprobe) -> None:
    """What a task does with a uprobe that it thinks it may use."""
    assert uprobe.offset == OFFSET


# ------------------------------------------------------------------------- H01: find_uprobe


def hit_with_reference(state: State) -> None:
    """A breakpoint handler of that time: it works with a reference, and outside of any section."""
    uprobe = find_uprobe(state.inode, OFFSET)
    if uprobe is not None:
        use(uprobe)
        put_uprobe(uprobe)


register(
    Scenario(
        name="uprobe-resurrection",
        hazards="H01",
        summary="A lookup finds a uprobe whose last reference is gone, and takes one: from 0 to 1.",
        setup=State,
        threads=(unregister, hit_with_reference),
        without="plain-get",
        breaks="use-after-free",
        options={"warnings": False},
    )
)


# ------------------------------------------------------------------------- H02: pre_ssout


def hit_then_step(state: State) -> None:
    """The handler runs as a reader; for the single-step, which is long, it takes a reference."""
    rcu_read_lock_trace()
    active_uprobe = find_uprobe_rcu(state.inode, OFFSET)
    if active_uprobe is not None:
        active_uprobe = try_get_uprobe(active_uprobe)  # None: dying; -EINVAL, and the instruction runs again
    rcu_read_unlock_trace()
    if active_uprobe is not None:
        use(active_uprobe)
        put_uprobe(active_uprobe)


def hit_then_step_plain_get(state: State) -> None:
    """The same with get_uprobe(): being readable is taken for being alive."""
    rcu_read_lock_trace()
    active_uprobe = find_uprobe_rcu(state.inode, OFFSET)
    if active_uprobe is not None:
        get_uprobe(active_uprobe)
    rcu_read_unlock_trace()
    if active_uprobe is not None:
        use(active_uprobe)
        put_uprobe(active_uprobe)


register(
    Scenario(
        name="uprobe-pre-ssout",
        hazards="H02",
        summary="A reader keeps a dying uprobe for its single-step with a plain get, and outlives its free.",
        setup=State,
        threads=(unregister, hit_then_step),
        broken_threads=(unregister, hit_then_step_plain_get),
        breaks="use-after-free",
        options={"warnings": False},
    )
)


# ------------------------------------------------------------------------- H08: the chain


def hit(state: State) -> None:
    """The handler as it is today: no reference, RCU tasks trace from the lookup to the end."""
    rcu_read_lock_trace()
    uprobe = find_uprobe_rcu(state.inode, OFFSET)
    if uprobe is not None:
        use(uprobe)
    rcu_read_unlock_trace()


def hit_then_return(state: State) -> None:
    """A return probe: the uprobe is leased, under SRCU, from the function's entry to its return."""
    rcu_read_lock_trace()
    uprobe = find_uprobe_rcu(state.inode, OFFSET)
    if uprobe is not None:
        state.idx = __srcu_read_lock(lifetime.uretprobes_srcu)
    rcu_read_unlock_trace()
    if uprobe is not None:
        return_from_function(state)


def return_from_function(state: State) -> None:
    """The end of it: the return handlers run, the lease is over."""
    use(state.uprobe)
    __srcu_read_unlock(lifetime.uretprobes_srcu, state.idx)


def unregister_inside_function(state: State) -> None:
    """A task is in a probed function when the last put comes (its own, to have them in this order)."""
    state.idx = __srcu_read_lock(lifetime.uretprobes_srcu)
    put_uprobe(state.uprobe)
    return_from_function(state)


def _chain(name: str, guard: str, threads: Any, summary: str) -> None:
    register(
        Scenario(
            name=name,
            hazards="H08",
            summary=summary,
            setup=State,
            threads=threads,
            without=guard,
            breaks="use-after-free",
        )
    )


_chain(
    "uprobe-free-at-once",
    "free-without-grace-period",
    (unregister, hit),
    "The last put frees the uprobe, and a task in its handler goes on using it.",
)
_chain(
    "uprobe-free-no-tasks-trace",
    "no-tasks-trace-wait",
    (unregister, hit),
    "The chain ends before call_rcu_tasks_trace(): handlers are not waited for.",
)
_chain(
    "uprobe-free-no-srcu",
    "no-srcu-wait",
    (unregister_inside_function,),
    "The chain leaves call_srcu() out: functions that have not returned are not waited for.",
)

# As it is in 7.2 this breaks: while a task is between its lookup and its lease, the wait for leases may be
# over already, and the wait for lookups does not cover the lease. With the waits the other way round it
# holds, which is also the order of uprobe_unregister_sync().
register(
    Scenario(
        name="uprobe-lease-too-late",
        hazards="H08",
        summary="A task looks the uprobe up, the chain's SRCU wait ends, and then the task takes its lease.",
        setup=State,
        threads=(unregister, hit_then_return),
        without="srcu-wait-first",
        memory="sc",
        expected=Verdict.FAIL,
        expected_broken=Verdict.PASS,
    )
)


# ------------------------------------------------------------------------- H06, H07: the dead twin


def register_again(state: State) -> None:
    """Somebody registers at the same place; the old uprobe may be dying in the tree still."""
    uprobe = alloc_uprobe(state.inode, OFFSET, 0)
    assert isinstance(uprobe, Uprobe)
    use(uprobe)


def final_tree(state: State) -> None:
    """One uprobe is registered, so one is in the tree."""
    check_invariants()
    assert len(uprobes()) == 1, f"one uprobe is registered, and {len(uprobes())} are in the tree"


register(
    Scenario(
        name="uprobe-dead-twin",
        hazards="H06",
        summary="An insertion finds a dying uprobe of its key, takes it for alive, and uses what is freed.",
        setup=State,
        threads=(unregister, register_again),
        final=final_tree,
        without="no-dead-twin",
        breaks="assertion",
        options={"warnings": False},
    )
)
register(
    Scenario(
        name="uprobe-double-erase",
        hazards="H07",
        summary="The deferred free takes a node out of the tree that an insertion had taken out before.",
        setup=State,
        threads=(unregister, register_again),
        final=final_tree,
        without="no-active-test",
        breaks="error",
    )
)
