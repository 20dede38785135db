"""The chain from the last put to kfree(): who may start it, and the one rcu_head it has.

Models:      kernel/events/uprobes.c, put_uprobe, uprobe_free_deferred, uprobe_free_srcu (7.2); before
             2bf8e5aceff8 put_uprobe did the work itself
Guards:      a work item, because a timer may put last; callbacks queued one after the other
Invariants:  U3 freed once, after both grace periods; no mutex is taken in a softirq
Leaves out:  what the timer's put was of: a return instance's (uprobes/uretprobe.py)
Read next:   hazards/lifetimes.py, uprobes/lifetime.py
"""

from kmodel.hazards.catalogue import Scenario, register
from kmodel.hazards.lifetimes import State as Lifetime
from kmodel.hazards.lifetimes import unregister
from kmodel.sync import TimerList, mod_timer
from kmodel.uprobes import put_uprobe


def expire(timer: TimerList) -> None:
    """What a timer of return instances does with the reference that an instance had."""
    put_uprobe(timer.container)


def arm(state: Lifetime) -> None:
    """The task whose timer it is arms it."""
    timer = TimerList(function=expire)
    timer.container = state.uprobe
    mod_timer(timer, 0.1)


register(
    Scenario(
        name="uprobe-put-softirq",
        hazards="H56",
        summary="A timer drops the last reference, and the free wants a mutex where nobody may sleep.",
        setup=Lifetime,
        threads=(arm,),
        without="no-free-work",
        breaks="locking",
    )
)
register(
    Scenario(
        name="uprobe-free-one-head",
        hazards="H09",
        summary="Both grace periods are asked for at a time, with the one rcu_head that the uprobe has.",
        setup=Lifetime,
        threads=(unregister,),
        without="no-callback-chain",
        breaks="use-after-free",
        memory="sc",
        options={"races": False},
    )
)
