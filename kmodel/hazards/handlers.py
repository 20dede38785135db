"""A task hits a breakpoint while its uprobe is being made ready, or its consumer goes away.

Models:      kernel/events/uprobes.c, handle_swbp, prepare_uprobe, uprobe_unregister_nosync / _sync (7.2)
Guards:      RCU tasks trace for the walk over consumers; UPROBE_COPY_INSN for the instruction
Invariants:  a handler finds its consumer alive and the uprobe's instruction copied
Leaves out:  the lookup that leads to the uprobe: hazards/speculation.py
Read next:   uprobes/handler.py
"""

from typing import Any

from kmodel.core import boot, current, kernel_struct, untraced
from kmodel.fs import PAGE_SIZE, open_file
from kmodel.hazards.catalogue import Scenario, register
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.slab import kfree
from kmodel.uprobes import PtRegs, Uprobe, UprobeConsumer, uprobe_unregister_sync
from kmodel.uprobes.breakpoint import prepare_uprobe
from kmodel.uprobes.consumer import consumer_add, consumer_del
from kmodel.uprobes.handler import handle_uprobe
from kmodel.uprobes.register import alloc_uprobe

ADDRESS = 0x400010
NOP = 0x90


@kernel_struct
class Tracer(UprobeConsumer):
    """Somebody's consumer."""

    uprobe: Any = untraced(default=None)


def handler(tracer: Any, regs: PtRegs, data: Any) -> int:
    """It looks at the probed instruction."""
    assert tracer.uprobe.arch.insn[:1] == bytes([NOP]), "the handler runs, and the instruction is not copied"
    return 0


class State:
    """A uprobe with one consumer; its instruction is not copied yet."""

    def __init__(self) -> None:
        boot()
        file = open_file("/bin/prog", contents=bytes([NOP]) * PAGE_SIZE)
        uprobe = alloc_uprobe(file.f_inode, 0x10, 0)
        assert isinstance(uprobe, Uprobe)
        self.uprobe = uprobe
        self.consumer = Tracer(handler=handler, uprobe=uprobe)
        consumer_add(uprobe, self.consumer)


def ready() -> State:
    """The instruction is copied."""
    state = State()
    prepare_uprobe(state.uprobe)
    return state


def hit(state: State) -> None:
    """A breakpoint of this uprobe; how the uprobe was found is another story."""
    rcu_read_lock_trace()
    handle_uprobe(state.uprobe, PtRegs(ip=ADDRESS + 1), ADDRESS, current())
    rcu_read_unlock_trace()


def unregister(state: State) -> None:
    """Take the consumer off the list, wait for handlers that are at it, free it."""
    consumer_del(state.uprobe, state.consumer)
    uprobe_unregister_sync()
    kfree(state.consumer)


def prepare(state: State) -> None:
    """The first installation: copy the instruction, then say so."""
    prepare_uprobe(state.uprobe)


register(
    Scenario(
        name="consumer-unregister-sync",
        hazards=("H44", "H45"),
        summary="A consumer is freed while a task walks over it to call its handler.",
        setup=ready,
        threads=(hit, unregister),
        without="no-unregister-sync",
        breaks="use-after-free",
    )
)
register(
    Scenario(
        name="handler-copy-insn",
        hazards="H46",
        summary="A breakpoint is hit before the instruction of its new uprobe was copied.",
        setup=State,
        threads=(hit, prepare),
        without="no-copy-insn-test",
        breaks="assertion",
        memory="sc",
        options={"races": False},
    )
)
register(
    Scenario(
        name="handler-insn-wmb",
        hazards="H47",
        summary="The flag is seen that says the instruction is copied, and the instruction is not.",
        setup=State,
        threads=(hit, prepare),
        without="no-insn-wmb",
        breaks="data-race",
    )
)
