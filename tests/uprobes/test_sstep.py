"""Instructions that cannot be emulated: slots, steps, signals in between, and everything given back."""

from typing import Any

import pytest

from kmodel.core import current, guards, is_freed
from kmodel.mm import MmStruct, mmput
from kmodel.slab import fail_nth
from kmodel.uprobes import (
    PtRegs,
    Uprobe,
    get_xol_area,
    handle_swbp,
    lifetime,
    uprobe_unregister_nosync,
)
from kmodel.uprobes.sigpending import SIGKILL, send_sig
from kmodel.uprobes.sstep import older_deny_signal
from kmodel.uprobes.usermode import delivered, finish_step
from kmodel.uprobes.utask import UTASK_RUNNING, UTASK_SSTEP
from kmodel.uprobes.xol import UINSNS_PER_PAGE, UPROBE_XOL_SLOT_BYTES, xol_get_slot_nr, xol_insn
from tests.uprobes.stories import Gate, both_engines
from tests.uprobes.world import TEXT, map_text, new_file, recorder, registered

MOV = bytes.fromhex("4889e5")
RET = b"\xc3"
SIGUSR1 = 10


@pytest.fixture
def mm() -> Any:
    mm = MmStruct()
    current().mm = mm
    current().utask = None
    return mm


@pytest.fixture
def uprobe(mm: MmStruct) -> Uprobe:
    """A probe on `mov %rsp,%rbp` at TEXT, and one on `ret` at TEXT + 16."""
    file = new_file(code=(MOV.ljust(16, b"\x90") + RET).ljust(8192, b"\x90"))
    map_text(mm, file)
    registered(file, 16)
    return registered(file, 0)


def hit(address: int = TEXT, **kwargs: Any) -> PtRegs:
    """Execute the breakpoint, up to the step."""
    regs = PtRegs(ip=address + 1, **kwargs)
    handle_swbp(regs)
    return regs


def in_use() -> list[int]:
    """The slots that are taken, without the trampoline's."""
    area = get_xol_area()
    assert area is not None
    return [n for n in range(1, UINSNS_PER_PAGE) if area.bitmap >> n & 1]


def test_the_instruction_is_executed_in_a_slot(uprobe: Uprobe) -> None:
    """The task goes on in a slot that holds the original instruction, with a reference; then behind it."""
    regs = hit()
    area = get_xol_area()
    assert area is not None
    utask = current().utask

    assert regs.ip == area.vaddr + UPROBE_XOL_SLOT_BYTES
    assert xol_insn(area, regs.ip)[:3] == MOV
    assert (utask.state, utask.active_uprobe, uprobe.ref, in_use()) == (UTASK_SSTEP, uprobe, 2, [1])
    finish_step(regs)

    assert regs.ip == TEXT + 3
    assert (utask.state, utask.active_uprobe, uprobe.ref, in_use()) == (UTASK_RUNNING, None, 1, [])


def test_a_return_goes_where_it_says(uprobe: Uprobe) -> None:
    """ret in a slot needs no correction: it takes ip from the stack."""
    regs = hit(TEXT + 16, sp=800, stack={800: 0x1234})
    finish_step(regs)

    assert (regs.ip, regs.sp, in_use()) == (0x1234, 808, [])


def test_a_dying_uprobe_is_executed_again(mm: MmStruct, uprobe: Uprobe, monkeypatch: Any) -> None:
    """No reference, no step: the task is at the breakpoint, which is gone by the time it comes back (H02)."""
    from kmodel.uprobes import handler

    original = handler.arch_uprobe_skip_sstep

    def dies(arch: Any, regs: PtRegs) -> bool:
        uprobe.ref = 0
        return bool(original(arch, regs))

    monkeypatch.setattr(handler, "arch_uprobe_skip_sstep", dies)
    regs = hit()

    assert regs.ip == TEXT
    assert (current().utask.active_uprobe, in_use()) == (None, [])


def test_without_an_area_the_breakpoint_is_executed_again(uprobe: Uprobe) -> None:
    """-ENOMEM: the reference is given back, and the task traps again until there is memory."""
    with fail_nth(1, cache="kmalloc-XolArea"):
        regs = hit()

    assert regs.ip == TEXT
    assert uprobe.ref == 1
    assert current().utask.active_uprobe is None


def test_the_step_outlives_the_unregister(uprobe: Uprobe) -> None:
    """The reference keeps the uprobe until the step is over."""
    regs = hit()
    consumer = next(uc for uc in consumers(uprobe))
    uprobe_unregister_nosync(uprobe, consumer)
    assert not is_freed(uprobe)

    finish_step(regs)
    lifetime.wait_for_frees()

    assert regs.ip == TEXT + 3
    assert is_freed(uprobe)


def consumers(uprobe: Uprobe) -> list[Any]:
    from kmodel.rcu import list_for_each_entry

    return list(list_for_each_entry(uprobe.consumers))


@pytest.mark.parametrize("older", [False, True])
def test_a_signal_waits_for_the_end_of_the_step(uprobe: Uprobe, older: bool) -> None:
    """It is delivered behind the instruction, never in the slot; with siglock as without (H66)."""
    regs = hit()
    send_sig(SIGUSR1, current())
    if older:
        with older_deny_signal():
            finish_step(regs)
    else:
        finish_step(regs)

    assert delivered() == [(SIGUSR1, TEXT + 3)]
    assert in_use() == []


def test_without_the_denial_a_handler_is_entered_in_the_slot(uprobe: Uprobe) -> None:
    """What the handler would return to is a slot that may be another task's by then."""
    with guards.without("no-deny-signal"):
        regs = hit()
        slot = regs.ip
        send_sig(SIGUSR1, current())
        finish_step(regs)

    assert delivered() == [(SIGUSR1, slot)]


def test_a_fatal_signal_ends_the_step_at_the_breakpoint(uprobe: Uprobe) -> None:
    """The instruction is not executed, and a core file shows the task where it was."""
    regs = hit()
    send_sig(SIGKILL, current())
    finish_step(regs)

    assert delivered() == [(SIGKILL, TEXT)]
    assert (uprobe.ref, in_use()) == (1, [])


def test_a_fault_of_the_instruction_is_at_its_place(uprobe: Uprobe) -> None:
    """SIGSEGV from inside the slot is delivered with the address of the probed instruction."""
    regs = hit()
    finish_step(regs, fault=True)

    assert delivered() == [(11, TEXT)]
    assert (uprobe.ref, in_use()) == (1, [])


class Full:
    """An area with every slot taken, and two who want one."""

    last: "Full"

    def __init__(self) -> None:
        self.gate = Gate()
        self.mm = MmStruct()
        file = new_file(code=MOV.ljust(8192, b"\x90"))
        map_text(self.mm, file)
        self.uprobe = registered(file, 0, recorder())
        current().mm = self.mm
        area = get_xol_area()
        assert area is not None
        self.area = area
        for _ in range(UINSNS_PER_PAGE - 2):
            assert xol_get_slot_nr(area) < UINSNS_PER_PAGE
        self.ips: list[int] = []
        Full.last = self


def steps(story: Full) -> None:
    """Hit, step, go on."""
    current().mm = story.mm
    regs = hit()
    story.ips.append(regs.ip)
    finish_step(regs)
    assert regs.ip == TEXT + 3


@both_engines
def test_who_finds_no_slot_waits_for_one(run: Any) -> None:
    """One free slot serves everybody, one after the other (H67)."""
    story = run(Full, [steps, steps, steps])

    assert len(set(story.ips)) == 1
    assert story.uprobe.ref == 1


def test_the_area_ends_with_the_address_space(mm: MmStruct, uprobe: Uprobe) -> None:
    """mmput() of the last user frees it."""
    area = get_xol_area()
    assert area is not None
    current().mm = None
    mmput(mm)

    assert is_freed(area)
