"""A mapping moves while a registration is on its way to it.

Models:      kernel/events/uprobes.c, register_for_each_vma; mm/mremap.c, move_vma (7.2)
Guards:      none in 7.2: dup_mmap_sem keeps out forks only
Invariants:  P9 after register every mm that maps the place has the breakpoint, after unregister none
Leaves out:  the rest of register and unregister: the consumer is on its list already, or off it
Read next:   docs/findings/register-mremap.md; hazards/registration.py
"""

from typing import Any

from kmodel.explore import Verdict
from kmodel.fs import PAGE_SIZE
from kmodel.hazards.catalogue import Scenario, register
from kmodel.hazards.registration import NOP, OFFSET, TEXT, Mapped, Probed, State
from kmodel.mm import mremap
from kmodel.mm.flags import MREMAP_FIXED, MREMAP_MAYMOVE
from kmodel.sync import down_write, up_write
from kmodel.uprobes import UPROBE_SWBP_INSN, Uprobe, fetch_opcode
from kmodel.uprobes.consumer import consumer_add, consumer_del
from kmodel.uprobes.register import alloc_uprobe, register_for_each_vma

NEW = TEXT + 0x100000


class Coming(Mapped):
    """The program is mapped; the consumer is on the list of its uprobe."""

    def __init__(self) -> None:
        super().__init__()
        uprobe = alloc_uprobe(self.file.f_inode, OFFSET, 0)
        assert isinstance(uprobe, Uprobe)
        consumer_add(uprobe, self.consumer)
        self.uprobe = uprobe


class Going(Probed):
    """The program has a breakpoint; the consumer is off the list."""

    def __init__(self) -> None:
        super().__init__()
        consumer_del(self.uprobe, self.consumer)


def install_everywhere(state: State) -> None:
    """The rest of the registration."""
    down_write(state.uprobe.register_rwsem)
    assert register_for_each_vma(state.uprobe, state.consumer) == 0
    up_write(state.uprobe.register_rwsem)


def remove_everywhere(state: State) -> None:
    """The rest of the unregister, but for the put."""
    down_write(state.uprobe.register_rwsem)
    assert register_for_each_vma(state.uprobe, None) == 0
    up_write(state.uprobe.register_rwsem)


def move(state: State) -> None:
    """mremap(2) to another address."""
    assert mremap(state.mm, TEXT, PAGE_SIZE, PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, NEW) == NEW


def moved_with_it(state: State) -> None:
    """P9 after the registration."""
    assert fetch_opcode(state.mm, NEW + OFFSET) == UPROBE_SWBP_INSN, "the moved mapping lacks the breakpoint"


def moved_without_it(state: State) -> None:
    """P9 after the unregister: the next hit finds no uprobe, and is a SIGTRAP."""
    assert fetch_opcode(state.mm, NEW + OFFSET) == NOP, (
        "the moved mapping keeps a breakpoint that nobody knows"
    )


def _moves(name: str, summary: str, setup: Any, task: Any, final: Any) -> None:
    register(
        Scenario(
            name=name,
            summary=summary,
            setup=setup,
            threads=(task, move),
            final=final,
            without="mremap-beside-register",
            memory="sc",
            options={"races": False, "preemptions": 1, "max_executions": 150},
            expected=Verdict.FAIL,
            expected_broken=Verdict.BOUNDED,
        )
    )


_moves(
    "register-mremap",
    "A mapping moves after a registration has listed it: it is looked for where it was, and gets nothing.",
    Coming,
    install_everywhere,
    moved_with_it,
)
_moves(
    "unregister-mremap",
    "A mapping moves after an unregister has listed it, and keeps a breakpoint that belongs to nobody.",
    Going,
    remove_everywhere,
    moved_without_it,
)
