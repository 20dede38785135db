"""The lease of a return probe: owner, timer and fork over one hprobe, and the instance it lies in.

Models:      kernel/events/uprobes.c, hprobe_expire, hprobe_consume, ri_timer, free_ret_instance, dup_utask
             (7.2)
Guards:      see uprobes/hprobe.py and uprobes/return_instance.py
Invariants:  P8 one SRCU unlock per lease, gets == puts; T1 and T2 of uprobes/uretprobe.py
Leaves out:  breakpoints: a call begins with prepare_uretprobe(), and ends with uprobe_handle_trampoline()
Read next:   uprobes/ri_timer.py; docs/findings/

Races are not reported here: the timer reads an instance that its owner may be filling for its next life, and
what it makes of it is checked instead.
"""

from typing import Any

from kmodel.core import (
    WRITE_ONCE,
    boot,
    current,
    smp_cond_load_acquire,
    smp_store_release,
    variables,
)
from kmodel.explore import Verdict
from kmodel.fs import iget_path
from kmodel.hazards.catalogue import Scenario, register
from kmodel.mm import MmStruct
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace, synchronize_srcu
from kmodel.sync import timer_setup
from kmodel.uprobes import (
    PtRegs,
    Uprobe,
    UprobeConsumer,
    get_xol_area,
    lifetime,
    put_uprobe,
    ri_timer,
    uprobe_get_trampoline_vaddr,
    uprobe_handle_trampoline,
)
from kmodel.uprobes.consumer import consumer_add
from kmodel.uprobes.handler import handler_chain
from kmodel.uprobes.register import alloc_uprobe
from kmodel.uprobes.return_instance import alloc_return_instance
from kmodel.uprobes.uretprobe import dup_utask, prepare_uretprobe
from kmodel.uprobes.utask import UprobeTask, alloc_utask

STACK = 0x7000
HOME = 0x1111


class State:
    """A task with an XOL area, and two uprobes with one reference each."""

    def __init__(self) -> None:
        boot()
        inode = iget_path("/bin/prog", size=0x1000)
        assert inode is not None
        self.uprobes: list[Uprobe] = []
        for offset in (0x10, 0x20):
            uprobe = alloc_uprobe(inode, offset, 0)
            assert isinstance(uprobe, Uprobe)
            self.uprobes.append(uprobe)
        self.mm = MmStruct()
        task = current()
        before, task.mm = task.mm, self.mm
        assert get_xol_area(task) is not None
        task.mm = before
        self.utask: UprobeTask = alloc_utask()
        self.utask.ri_timer.function = None  # goes off where the scenario says
        self.child: Any = None
        self.steps = variables(entered=0, forked=0, dropped=0)


def be(state: State, utask: UprobeTask | None = None) -> Any:
    """current becomes the probed task (or its child)."""
    task = current()
    task.mm = state.mm
    task.utask = utask if utask is not None else state.utask
    return task


def enter(state: State, which: int = 0, sp: int = STACK, home: int = HOME) -> PtRegs:
    """current calls a probed function."""
    regs = PtRegs(ip=0x400000 + which, sp=sp, stack={sp: home})
    ri = alloc_return_instance(state.utask)
    assert ri is not None
    prepare_uretprobe(state.uprobes[which], regs, ri)
    return regs


def leave(regs: PtRegs) -> None:
    """It returns."""
    regs.sp += 8
    uprobe_handle_trampoline(regs)


def calls_once(state: State) -> None:
    """The owner: one call."""
    be(state)
    regs = enter(state)
    smp_store_release(state.steps, "entered", 1)
    leave(regs)


def calls_twice(state: State) -> None:
    """The owner: a call of one probed function, then of another one, in the same instance if it can be."""
    be(state)
    regs = enter(state)
    smp_store_release(state.steps, "entered", 1)
    leave(regs)
    leave(enter(state, 1))


def timer_inside(state: State) -> None:
    """The timer goes off once the first function was entered."""
    smp_cond_load_acquire(state.steps, "entered", bool)
    ri_timer(state.utask.ri_timer)


def final_references(state: State) -> None:
    """Every reference that was taken was given back."""
    for n, uprobe in enumerate(state.uprobes):
        assert uprobe.ref == 1, f"uprobe {n} has {uprobe.ref} references, and one consumer"
    assert state.utask.depth == 0


OPTIONS = {"races": False}


def _scenario(name: str, hazards: str, guard: str, summary: str, threads: Any, **more: Any) -> None:
    register(
        Scenario(
            name=name,
            hazards=hazards,
            summary=summary,
            threads=threads,
            without=guard,
            **{"setup": State, "final": final_references, "memory": "sc", "options": OPTIONS, **more},
        )
    )


# ------------------------------------------------------------------------- one lease, two who end it

_scenario(
    "hprobe-one-winner",
    "H57",
    "no-hprobe-cmpxchg",
    "The owner returns and the timer goes off: both end the lease, and the reference is nobody's.",
    (calls_once, timer_inside),
    breaks="locking",
)
_scenario(
    "hprobe-loser-put",
    "H60",
    "no-hprobe-loser-put",
    "The timer takes a reference for the lease, the owner is faster, and nobody gives it back.",
    (calls_once, timer_inside),
    breaks="assertion",
)


def calls_and_drops(state: State) -> None:
    """The owner: one call, after which the uprobe's last reference goes."""
    calls_once(state)
    put_uprobe(state.uprobes[0])


_scenario(
    "timer-without-srcu",
    "H57",
    "no-ri-timer-srcu",
    "The owner is faster than the timer, and what the timer then touches is freed.",
    (calls_and_drops, timer_inside),
    final=None,
    breaks="use-after-free",
)


class Ticking(State):
    """The same with the timer armed: it goes off at any time after a call began."""

    def __init__(self) -> None:
        super().__init__()
        timer_setup(self.utask.ri_timer, ri_timer)


def never_returns(state: State) -> None:
    """The owner: inside the probed function for ever."""
    be(state)
    enter(state)
    smp_store_release(state.steps, "entered", 1)


def waits_for_leases(state: State) -> None:
    """Half of uprobe_unregister_sync()."""
    smp_cond_load_acquire(state.steps, "entered", bool)
    synchronize_srcu(lifetime.uretprobes_srcu)


_scenario(
    "lease-timer",
    "H58",
    "no-ri-timer",
    "A probed function does not return, and whoever waits for SRCU waits for ever.",
    (never_returns, waits_for_leases),
    setup=Ticking,
    final=None,
    breaks="deadlock",
)


# ------------------------------------------------------------------------- the instance


def final_depth(state: State) -> None:
    """Nothing is pending."""
    assert state.utask.depth == 0


_scenario(
    "return-instance-freed",
    "H61",
    "no-ri-rcu",
    "The owner returns and frees the instance that the timer is looking at.",
    (calls_once, timer_inside),
    breaks="use-after-free",
)
_scenario(
    "return-instance-reused",
    "H61",
    "no-ri-seqcount",
    "The owner puts the instance to its next use while the timer still holds it for the last one.",
    (calls_twice, timer_inside),
    breaks="locking",
)
_scenario(
    "return-instance-pool",
    "H62",
    "ri-timer-without-mb",
    "The timer's odd ri_seqcount is late, the owner takes the timer for absent, and reuses the instance.",
    (calls_twice, timer_inside),
    memory="tso",
    expected=Verdict.FAIL,
    expected_broken=Verdict.PASS,
)


# ------------------------------------------------------------------------- fork


def forks(state: State) -> None:
    """The owner: calls, forks inside the function, returns."""
    be(state)
    regs = enter(state)
    state.child = Child()
    dup_utask(state.child, state.utask)
    smp_store_release(state.steps, "forked", 1)
    leave(regs)


def returns_in_child(state: State) -> None:
    """The child: a copy of the stack, so it returns too."""
    smp_cond_load_acquire(state.steps, "forked", bool)
    be(state, state.child.utask)
    leave(PtRegs(ip=0x400000, sp=STACK, stack={STACK: HOME}))


class Child:
    """A task_struct that fork is filling in."""

    utask: Any = None


_scenario(
    "fork-ends-lease",
    "H63",
    "no-fork-expire",
    "A forked child has a copy of the parent's lease, and both end it.",
    (forks, returns_in_child),
    breaks="locking",
)


def forks_while_dying(state: State) -> None:
    """The owner forks after the last reference went."""
    be(state)
    regs = enter(state)
    smp_store_release(state.steps, "entered", 1)
    smp_cond_load_acquire(state.steps, "dropped", bool)
    state.child = Child()
    dup_utask(state.child, state.utask)
    leave(regs)


def drops(state: State) -> None:
    """The last put, while a function that was probed is running."""
    smp_cond_load_acquire(state.steps, "entered", bool)
    put_uprobe(state.uprobes[0])
    WRITE_ONCE(state.steps, "dropped", 1)


_scenario(
    "fork-dying-uprobe",
    "H59",
    "no-hprobe-null-test",
    "Fork asks for a reference on a uprobe that is dying: there is none, and it is taken all the same.",
    (forks_while_dying, drops),
    final=final_depth,
    breaks="error",
)


# ------------------------------------------------------------------------- longjmp


def jumps_out(state: State) -> None:
    """Calls a probed function, leaves it by longjmp(), and calls another one from further up."""
    be(state)
    enter(state, 0, sp=STACK - 64, home=HOME + 1)
    regs = enter(state, 1)
    leave(regs)
    assert regs.ip == HOME, f"the function returned to {regs.ip:#x}, and was called from {HOME:#x}"


_scenario(
    "longjmp-leftovers",
    "H64",
    "no-uretprobe-alive-check",
    "A frame that a longjmp left out is still on the list, and the next return goes where it would have.",
    (jumps_out,),
    breaks="assertion",
)


# ------------------------------------------------------------------------- sessions


class Session(State):
    """A consumer with both handlers that is about to be added, and what was called."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = self.returned = 0
        self.uc = UprobeConsumer(handler=self.on_entry, ret_handler=self.on_return)

    def on_entry(self, uc: Any, regs: PtRegs, data: Any) -> int:
        """The session begins."""
        self.entered += 1
        return 0

    def on_return(self, uc: Any, func: int, regs: PtRegs, data: Any) -> int:
        """It ends."""
        self.returned += 1
        return 0


def adds(state: Session) -> None:
    """The part of uprobe_register() that publishes the consumer."""
    consumer_add(state.uprobes[0], state.uc)


def hits_and_returns(state: Session) -> None:
    """handle_swbp() once the uprobe is found, and the return."""
    task = be(state)
    regs = PtRegs(ip=0x400000, sp=STACK, stack={STACK: HOME})
    rcu_read_lock_trace(task)
    handler_chain(state.uprobes[0], regs, state.utask, task)
    rcu_read_unlock_trace(task)
    if regs.stack[STACK] == uprobe_get_trampoline_vaddr(task):
        smp_cond_load_acquire(state.uc, "id", bool)  # the function takes its time: the register is over
        leave(regs)
    assert state.entered == state.returned, (
        f"a session's entry handler ran {state.entered} times, its return handler {state.returned}"
    )


_scenario(
    "session-without-id",
    "H65",
    "consumer-id-after-add",
    "A session is hit before it has its id: its return handler is never called for that call.",
    (adds, hits_and_returns),
    setup=Session,
    expected=Verdict.FAIL,
    expected_broken=Verdict.PASS,
)
