"""Registration beside what happens to mappings meanwhile: mmap(2), fork(2), a hit, a failure halfway.

Models:      kernel/events/uprobes.c, uprobe_register, uprobe_unregister_nosync, register_for_each_vma,
             uprobe_mmap, handler_chain (7.2); fork(2) and mmap(2), whole
Guards:      dup_mmap_sem, register_rwsem, mmap_lock; and the order: publish first, scan afterwards
Invariants:  P9 after register returned every mm that maps the place has the breakpoint, after unregister none
             P12 the reference counter equals the breakpoints
Leaves out:  filters by mm; what a fork copies besides the one page
Read next:   uprobes/register.py, uprobes/mm_hooks.py

These are long: a registration takes a percpu_rw_semaphore for writing, a fork copies an address space. The
ones with a fork are explored with two preemptions at most, and say BOUNDED.
"""

import mmap as prot
from typing import Any

from kmodel.core import boot, current
from kmodel.explore import Verdict
from kmodel.fs import PAGE_SIZE, File, open_file
from kmodel.hazards.catalogue import Scenario, register
from kmodel.mm import MAP_FIXED, MmStruct, fork, mmap, mmap_write_lock, mmap_write_unlock, vma_lookup
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.slab import kfree, kzalloc
from kmodel.uprobes import (
    UPROBE_HANDLER_REMOVE,
    UPROBE_SWBP_INSN,
    PtRegs,
    Uprobe,
    UprobeConsumer,
    fetch_opcode,
    find_uprobe_rcu,
    uprobe_mmap,
    uprobe_register,
    uprobe_unregister,
)
from kmodel.uprobes.consumer import consumer_add
from kmodel.uprobes.handler import handle_uprobe
from kmodel.uprobes.ref_ctr import read_ref_ctr
from kmodel.uprobes.register import alloc_uprobe, register_one_vma

TEXT = 0x400000
DATA = 0x600000
OFFSET = 0x10
PLACE = TEXT + OFFSET
COUNTER = 0x800
"""Where in the file the reference counter is; the page has code below and zeroes from here on."""

NOP = 0x90
CODE = bytes([NOP]) * COUNTER + bytes(PAGE_SIZE - COUNTER)


def map_text(mm: MmStruct, file: File) -> None:
    """Map the program's code."""
    mmap(mm, TEXT, PAGE_SIZE, prot.PROT_READ | prot.PROT_EXEC, prot.MAP_PRIVATE | MAP_FIXED, file, 0)


def map_data(mm: MmStruct, file: File, pgoff: int = 0) -> None:
    """Map a page of the file where a reference counter may live: private and writable."""
    mmap(mm, DATA, PAGE_SIZE, prot.PROT_READ | prot.PROT_WRITE, prot.MAP_PRIVATE | MAP_FIXED, file, pgoff)


def counter(mm: MmStruct) -> int:
    """The reference counter in the program's memory."""
    value = read_ref_ctr(vma_lookup(mm, DATA), DATA + COUNTER)
    assert value is not None
    return value


def nothing(uc: Any, regs: PtRegs, data: Any) -> int:
    """A handler."""
    return 0


def remove(uc: Any, regs: PtRegs, data: Any) -> int:
    """A handler that has seen enough."""
    return UPROBE_HANDLER_REMOVE


class State:
    """A program, an address space, somebody who is about to register; nothing is mapped."""

    uprobe: Any = None
    child: Any = None

    def __init__(self) -> None:
        boot()
        self.mm = MmStruct()
        self.file = open_file("/bin/prog", contents=CODE)
        self.consumer = UprobeConsumer(handler=nothing)


class Mapped(State):
    """The program is mapped."""

    def __init__(self) -> None:
        super().__init__()
        map_text(self.mm, self.file)


class Probed(Mapped):
    """It has the breakpoint."""

    def __init__(self) -> None:
        super().__init__()
        come(self)


def come(state: State) -> None:
    """Register."""
    uprobe = uprobe_register(state.file.f_inode, OFFSET, 0, state.consumer)
    assert isinstance(uprobe, Uprobe), f"uprobe_register() = {uprobe}"
    state.uprobe = uprobe


def go(state: State) -> None:
    """Unregister."""
    uprobe_unregister(state.uprobe, state.consumer)


def map_program(state: State) -> None:
    """The program is mapped."""
    map_text(state.mm, state.file)


def fork_program(state: State) -> None:
    """fork(2)."""
    state.child = fork(state.mm)


def has_breakpoint(state: State) -> None:
    """P9, of a mapping that is there by now."""
    assert fetch_opcode(state.mm, PLACE) == UPROBE_SWBP_INSN, "the mapping lacks the breakpoint"


def both_have_it(state: State) -> None:
    """P9, of parent and child."""
    has_breakpoint(state)
    assert fetch_opcode(state.child, PLACE) == UPROBE_SWBP_INSN, "the child lacks the breakpoint"


def none_has_it(state: State) -> None:
    """P9, after the unregister."""
    assert fetch_opcode(state.mm, PLACE) == NOP, "the parent keeps a breakpoint that nobody wants"
    assert fetch_opcode(state.child, PLACE) == NOP, "the child keeps a breakpoint that nobody wants"


def _sc(name: str, hazards: Any, summary: str, setup: Any, threads: Any, guard: str, **more: Any) -> None:
    options = {"races": False, **more.pop("options", {})}
    given: dict[str, Any] = {"breaks": "assertion", "memory": "sc", "options": options, **more}
    register(
        Scenario(
            name=name,
            hazards=hazards,
            summary=summary,
            setup=setup,
            threads=threads,
            without=guard,
            **given,
        )
    )


# ------------------------------------------------------------------------------- H49: mmap(2)

_sc(
    "register-mmap",
    "H49",
    "A mapping is made while a registration lists the mappings: neither sees the other.",
    State,
    (come, map_program),
    "no-consumer-before-scan",
    final=has_breakpoint,
)


class Seen(State):
    """A registration and an mmap(2) that have seen each other: the consumer is on the list, the mapping is
    linked. The place has a reference counter, and the page it is in is mapped.
    """

    def __init__(self) -> None:
        super().__init__()
        map_text(self.mm, self.file)
        map_data(self.mm, self.file)
        uprobe = alloc_uprobe(self.file.f_inode, OFFSET, COUNTER)
        assert isinstance(uprobe, Uprobe)
        consumer_add(uprobe, self.consumer)
        self.uprobe = uprobe


def come_to_it(state: State) -> None:
    """What is left of the registration: the mapping is on its list."""
    assert register_one_vma(state.uprobe, state.consumer, state.mm, PLACE) == 0


def map_it(state: State) -> None:
    """What is left of the mmap(2): the uprobe is in the tree."""
    mmap_write_lock(state.mm)
    uprobe_mmap(vma_lookup(state.mm, PLACE))
    mmap_write_unlock(state.mm)


def counted_once(state: State) -> None:
    """P12."""
    has_breakpoint(state)
    assert counter(state.mm) == 1, f"one breakpoint, and the reference counter says {counter(state.mm)}"


_sc(
    "install-twice",
    "H54",
    "A registration and an mmap(2) see each other: both install the breakpoint, and both count it.",
    Seen,
    (come_to_it, map_it),
    "no-verify-opcode",
    final=counted_once,
)

# ------------------------------------------------------------------------------- H48: fork(2)


def _bounded(preemptions: int) -> dict[str, Any]:
    return {"options": {"preemptions": preemptions}, "expected": Verdict.BOUNDED}


_sc(
    "register-fork",
    "H48",
    "A child is linked after the registration listed the mappings, with a copy of the page as it was.",
    Mapped,
    (come, fork_program),
    "no-dup-mmap-sem",
    final=both_have_it,
    **_bounded(2),
)
_sc(
    "unregister-fork",
    "H48",
    "A child inherits a breakpoint whose removal has listed the mappings already: an orphan.",
    Probed,
    (go, fork_program),
    "no-dup-mmap-sem",
    final=none_has_it,
    **_bounded(1),
)

# ------------------------------------------------------------------------------- H45: half a registration


class Halfway:
    """Two address spaces. In the second the page of the reference counter is past the end of the file."""

    def __init__(self) -> None:
        boot()
        self.file = open_file("/bin/prog", contents=CODE)
        self.mm, self.other_mm = MmStruct(), MmStruct()
        map_text(self.mm, self.file)
        map_text(self.other_mm, self.file)
        map_data(self.other_mm, self.file, 1)
        consumer: Any = kzalloc(UprobeConsumer)
        consumer.handler = nothing
        self.consumer = consumer


def fail_to_come(state: Halfway) -> None:
    """Register, in vain: whoever cannot register needs no consumer."""
    ret = uprobe_register(state.file.f_inode, OFFSET, PAGE_SIZE + COUNTER, state.consumer)
    assert isinstance(ret, int), "the registration was to fail"
    kfree(state.consumer)


def hit_in_the_first(state: Halfway) -> None:
    """A task of the address space that had the breakpoint for a while; its lookup in short."""
    current().mm = state.mm
    rcu_read_lock_trace()
    uprobe = find_uprobe_rcu(state.file.f_inode, OFFSET)
    if uprobe is not None:
        handle_uprobe(uprobe, PtRegs(ip=PLACE + 1), PLACE, current())
    rcu_read_unlock_trace()


for _name, _guard, _what in (
    ("register-fails-sync", "no-unregister-sync", "does not wait for handlers that run already"),
    ("register-fails-rollback", "no-register-rollback", "leaves its consumer on the list"),
):
    _sc(
        _name,
        "H45",
        f"A registration that fails in the second address space {_what}.",
        Halfway,
        (fail_to_come, hit_in_the_first),
        _guard,
        breaks="use-after-free",
        options={"warnings": False, "preemptions": 2, "max_executions": 300},
        expected=Verdict.BOUNDED,
    )

# ------------------------------------------------------------------------------- H55: a handler that leaves


class Leaving(Mapped):
    """The only consumer will ask for the removal of its breakpoint; another one is about to come."""

    def __init__(self) -> None:
        super().__init__()
        leaver = UprobeConsumer(handler=remove)
        uprobe = uprobe_register(self.file.f_inode, OFFSET, 0, leaver)
        assert isinstance(uprobe, Uprobe)
        self.uprobe = uprobe


def handle(state: State) -> None:
    """A hit, whose lookup is over."""
    current().mm = state.mm
    rcu_read_lock_trace()
    handle_uprobe(state.uprobe, PtRegs(ip=PLACE + 1), PLACE, current())
    rcu_read_unlock_trace()


_sc(
    "handler-remove",
    "H55",
    "All handlers ask for removal; before it is done somebody registers, whose breakpoint then goes.",
    Leaving,
    (handle, come),
    "no-removal-recheck",
    final=has_breakpoint,
)
