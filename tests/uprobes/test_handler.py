"""handle_swbp: what handlers see, return codes and removal, restarts, signals, and the races of the hit
path.
"""

from typing import Any

import pytest

from kmodel.core import current, guards, test_bit
from kmodel.core.task import TIF_UPROBE
from kmodel.fs import PAGE_SIZE
from kmodel.mm import MMF_HAS_UPROBES, MmStruct, munmap
from kmodel.uprobes import (
    UPROBE_HANDLER_IGNORE,
    UPROBE_HANDLER_REMOVE,
    PtRegs,
    UprobeConsumer,
    exc_int3,
    forced_signals,
    get_uprobe,
    handler,
    lifetime,
    lookup,
    put_uprobe,
    register,
    uprobe_unregister,
)
from kmodel.uprobes import breakpoint as breakpoints
from kmodel.uprobes.utask import SIGTRAP
from tests.uprobes.stories import Gate, assert_warned, both_engines, stop_after, stop_before
from tests.uprobes.world import (
    CODE,
    TEXT,
    hit,
    map_text,
    new_file,
    not_in,
    opcode,
    recorder,
    registered,
)

INT3 = 0xCC
PUSH, NOP = TEXT + 0x10, TEXT + 0x11


@pytest.fixture
def mm() -> MmStruct:
    return MmStruct()


@pytest.fixture
def file(mm: MmStruct) -> Any:
    file = new_file()
    map_text(mm, file)
    current().local.pop("forced_signals", None)
    return file


# ------------------------------------------------------------------------------ one hit


def test_a_hit_runs_every_consumer_and_emulates(mm: MmStruct, file: Any) -> None:
    """Handlers see ip at the breakpoint; afterwards the instruction was executed."""
    one, two = recorder(), recorder()
    registered(file, 0x10, one)
    registered(file, 0x10, two)

    regs = hit(mm, PUSH)

    assert (one.calls, two.calls) == ([PUSH], [PUSH])
    assert regs.ip == PUSH + 1
    assert len(regs.stack) == 1


def test_a_consumer_with_only_a_return_handler_is_passed_over(mm: MmStruct, file: Any) -> None:
    """It counts as one that returned 0: the breakpoint stays although the other wants it removed."""
    registered(file, 0x11, recorder(rc=UPROBE_HANDLER_REMOVE))
    registered(file, 0x11, UprobeConsumer(ret_handler=print))

    assert hit(mm, NOP).ip == NOP + 1
    assert opcode(mm, NOP) == INT3


def test_filters_are_not_asked_at_a_hit(mm: MmStruct, file: Any) -> None:
    """A breakpoint that another consumer wanted calls also the one whose filter refuses this mm."""
    picky = recorder(filter=not_in, not_in=mm)
    registered(file, 0x11, picky)
    registered(file, 0x11, recorder())

    hit(mm, NOP)
    assert picky.calls == [NOP]


def test_a_handler_may_send_the_task_elsewhere(mm: MmStruct, file: Any) -> None:
    """If a handler moves ip, the probed instruction is not executed."""

    def jump(uc: Any, regs: PtRegs) -> None:
        regs.ip = 0x1234

    registered(file, 0x10, recorder(then=jump))

    regs = hit(mm, PUSH)
    assert regs.ip == 0x1234
    assert regs.stack == {}


def test_an_instruction_that_is_not_emulated_is_stepped(mm: MmStruct) -> None:
    """The task goes on behind it, by its length."""
    ret = new_file("/bin/mov", b"\x48\x89\xe5".ljust(PAGE_SIZE, b"\x90"))
    map_text(mm, ret, pages=1)
    uc = recorder()
    registered(ret, 0, uc)

    assert hit(mm, TEXT).ip == TEXT + 3
    assert uc.calls == [TEXT]


def test_a_bad_return_code_warns(mm: MmStruct, file: Any) -> None:
    """Anything but 0, 1 and 2 is reported and counts as 0."""
    registered(file, 0x11, recorder(rc=3))

    hit(mm, NOP)
    assert_warned("UPROBE_HANDLER_")
    assert opcode(mm, NOP) == INT3


def test_utask_names_the_place_while_handlers_run(mm: MmStruct, file: Any) -> None:
    """current->utask->auprobe is set for handlers, and cleared afterwards."""
    seen: list[Any] = []
    uprobe = registered(file, 0x11, recorder(then=lambda uc, regs: seen.append(current().utask.auprobe)))

    hit(mm, NOP)
    assert seen == [uprobe.arch]
    assert current().utask.auprobe is None


# ------------------------------------------------------------------------------ removal


def test_removal_needs_every_consumer(mm: MmStruct, file: Any) -> None:
    """The breakpoint goes if all return REMOVE and no filter wants it any more."""
    one = recorder(rc=UPROBE_HANDLER_REMOVE, filter=not_in)
    two = recorder(rc=UPROBE_HANDLER_IGNORE, filter=not_in)
    uprobe = registered(file, 0x11, one)
    registered(file, 0x11, two)
    one.not_in = two.not_in = mm

    hit(mm, NOP)
    assert opcode(mm, NOP) == INT3

    uprobe_unregister(uprobe, two)
    one.not_in = None
    registered(file, 0x11, recorder(rc=UPROBE_HANDLER_REMOVE, filter=not_in, not_in=mm))
    one.not_in = mm
    hit(mm, NOP)
    assert opcode(mm, NOP) == CODE[0x11]


def test_removal_spares_a_breakpoint_that_a_filter_still_wants(mm: MmStruct, file: Any) -> None:
    """REMOVE from a consumer whose filter says yes changes nothing: filter_chain has the last word."""
    registered(file, 0x11, recorder(rc=UPROBE_HANDLER_REMOVE))

    hit(mm, NOP)
    assert opcode(mm, NOP) == INT3


def test_removal_is_for_this_mm_only(mm: MmStruct, file: Any) -> None:
    """Another address space keeps its breakpoint."""
    other = MmStruct()
    map_text(other, file)
    uc = recorder(rc=UPROBE_HANDLER_REMOVE, filter=not_in)
    registered(file, 0x11, uc)
    uc.not_in = mm

    hit(mm, NOP)
    assert (opcode(mm, NOP), opcode(other, NOP)) == (CODE[0x11], INT3)


class Newcomer:
    """All consumers want the breakpoint removed; another comes when their handlers have run."""

    last: "Newcomer"

    def __init__(self) -> None:
        self.gate = Gate()
        self.mm = MmStruct()
        self.file = new_file()
        map_text(self.mm, self.file)
        uc = recorder(rc=UPROBE_HANDLER_REMOVE, filter=not_in)
        registered(self.file, 0x11, uc)
        uc.not_in = self.mm
        self.newcomer = recorder()
        Newcomer.last = self


def reader(story: Newcomer) -> None:
    hit(story.mm, NOP)


def comes(story: Newcomer) -> None:
    story.gate.wait()
    registered(story.file, 0x11, story.newcomer)
    story.gate.open()


@both_engines
@pytest.mark.parametrize("guard", [None, "no-removal-recheck"])
def test_removal_beside_a_new_consumer(run: Any, guard: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filters are asked again under register_rwsem, so a newcomer's breakpoint stays; without that it
    goes (H55).
    """
    stop_before(monkeypatch, handler, "remove_unwanted", lambda: Newcomer.last.gate)
    with guards.without(*([guard] if guard else [])):
        story = run(Newcomer, [reader, comes])

    assert opcode(story.mm, NOP) == (CODE[0x11] if guard else INT3)


# ------------------------------------------------------------------------------ no uprobe


def test_a_foreign_breakpoint_is_sigtrap(mm: MmStruct) -> None:
    """An int3 that the file itself holds is not ours: SIGTRAP, and ip stays behind it."""
    map_text(mm, new_file("/bin/debugged", b"\xcc" * PAGE_SIZE), pages=1)
    current().local.pop("forced_signals", None)

    assert hit(mm, TEXT).ip == TEXT + 1
    assert forced_signals() == [SIGTRAP]


def test_a_breakpoint_that_went_away_is_executed_again(mm: MmStruct, file: Any) -> None:
    """A task that trapped before an unregister goes back to the restored instruction (P10)."""
    uc = recorder()
    uprobe_unregister(registered(file, 0x11, uc), uc)
    lifetime.wait_for_frees()

    assert hit(mm, NOP).ip == NOP
    assert uc.calls == []
    assert forced_signals() == []


def test_a_dying_uprobe_is_still_good_for_emulation(mm: MmStruct, file: Any) -> None:
    """Until it left the tree a uprobe without consumers is found; the instruction is executed, nobody is
    called (R4).
    """
    uc = recorder()
    uprobe = registered(file, 0x10, uc)
    get_uprobe(uprobe)
    uprobe_unregister(uprobe, uc)

    regs = hit(mm, PUSH)
    assert regs.ip == PUSH + 1
    assert len(regs.stack) == 1
    assert uc.calls == []
    put_uprobe(uprobe)


def test_an_unmapped_breakpoint_is_executed_again(mm: MmStruct, file: Any) -> None:
    """Where nothing is mapped any more the task re-executes and will get its SIGSEGV."""
    registered(file, 0x11)
    munmap(mm, TEXT, 2 * PAGE_SIZE)

    assert hit(mm, NOP).ip == NOP
    assert forced_signals() == []


class Installation:
    """A task executes the breakpoint's address while it is being installed."""

    last: "Installation"

    def __init__(self) -> None:
        self.gate = Gate()
        self.mm = MmStruct()
        self.file = new_file()
        map_text(self.mm, self.file)
        self.signals: list[int] = []
        self.uc = recorder()
        Installation.last = self


def hits(story: Installation) -> None:
    hit(story.mm, NOP)
    story.signals = forced_signals()


hits.__name__ = "reader"


def installs_at_once(story: Installation) -> None:
    story.gate.wait()
    registered(story.file, 0x11, story.uc)
    story.gate.open()


def installs(story: Installation) -> None:
    """Begin while the other is between its lookup and its trap test; with the guard, end only after that."""
    story.gate.wait()
    if "no-install-write-lock" not in guards.removed:
        story.gate.open()
    registered(story.file, 0x11, story.uc)
    story.gate.open()


@both_engines
@pytest.mark.parametrize("guard", [None, "no-install-write-lock"])
def test_install_beside_a_lookup(run: Any, guard: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between "no uprobe" and the trap test no breakpoint of ours appears, thanks to mmap_lock for writing
    (H50).
    """
    stop_before(monkeypatch, lookup, "is_trap_at_addr", lambda: Installation.last.gate)
    with guards.without(*([guard] if guard else [])):
        story = run(Installation, [hits, installs])

    assert story.signals == ([SIGTRAP] if guard else [])


# ------------------------------------------------------------------------------ a uprobe that is not prepared


class Unprepared:
    """A breakpoint of an old uprobe was hit; its successor is found, whose instruction is copied only
    later.
    """

    last: "Unprepared"

    def __init__(self) -> None:
        self.gate = Gate()
        self.mm = MmStruct()
        self.file = new_file()
        map_text(self.mm, self.file)
        self.old = recorder()
        self.old_uprobe = registered(self.file, 0x10, self.old)
        self.new = recorder()
        self.regs: Any = None
        Unprepared.last = self


def trapped(story: Unprepared) -> None:
    """Trapped at the old breakpoint; by the time the lookup runs, the new uprobe is in the tree and not
    prepared.
    """
    story.gate.wait()
    story.regs = hit(story.mm, PUSH)
    story.gate.open()


def replaces(story: Unprepared) -> None:
    uprobe_unregister(story.old_uprobe, story.old)
    registered(story.file, 0x10, story.new)


replaces.__name__ = "reader"


@both_engines
@pytest.mark.parametrize("guard", [None, "no-copy-insn-test"])
def test_hit_of_an_unprepared_uprobe(run: Any, guard: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until UPROBE_COPY_INSN is set the task only re-executes; without the test it runs on unset arch data
    (H46).
    """
    original = register.build_map_info

    def stopping(mapping: Any, offset: int, is_register: bool) -> Any:
        if is_register and current().comm == "reader":
            Unprepared.last.gate.stop()
        return original(mapping, offset, is_register)

    monkeypatch.setattr(register, "build_map_info", stopping)
    with guards.without(*([guard] if guard else [])):
        story = run(Unprepared, [replaces, trapped])

    if guard is None:
        assert story.regs.ip == PUSH
        assert story.new.calls == []
    else:
        # The push was lost: nothing said that it should be emulated.
        assert story.new.calls == [PUSH]
        assert story.regs.stack == {}


# ------------------------------------------------------------------------------ the exception itself


def test_the_notifier_claims_traps_only_where_uprobes_are(mm: MmStruct, file: Any) -> None:
    """Without MMF_HAS_UPROBES a trap is SIGTRAP at once; with it handle_swbp decides."""
    current().mm = mm
    exc_int3(PtRegs(ip=NOP + 1))
    assert forced_signals() == [SIGTRAP]

    uc = recorder()
    registered(file, 0x11, uc)
    regs = PtRegs(ip=NOP + 1)
    exc_int3(regs)
    assert uc.calls == [NOP]
    assert regs.ip == NOP + 1
    assert forced_signals() == [SIGTRAP]
    assert not test_bit(TIF_UPROBE, current(), "thread_info_flags")


class FirstProbe:
    """The first breakpoint of an mm is hit as soon as it is written."""

    last: "FirstProbe"

    def __init__(self) -> None:
        self.gate = Gate()
        self.mm = MmStruct()
        self.file = new_file()
        map_text(self.mm, self.file)
        self.signals: list[int] = []
        FirstProbe.last = self


def traps(story: FirstProbe) -> None:
    story.gate.wait()
    current().mm = story.mm
    regs = PtRegs(ip=NOP + 1)
    story.gate.open()
    exc_int3(regs)
    story.signals = forced_signals()


def first(story: FirstProbe) -> None:
    registered(story.file, 0x11)


first.__name__ = "reader"


def quick_traps(story: FirstProbe) -> None:
    """Trap while the installer is stopped right behind the write."""
    story.gate.wait()
    current().mm = story.mm
    if test_bit(MMF_HAS_UPROBES, story.mm, "flags"):
        story.gate.open()  # ours: the handler waits for the installer's mmap_lock
    exc_int3(PtRegs(ip=NOP + 1))
    story.signals = forced_signals()
    story.gate.open()


@both_engines
@pytest.mark.parametrize("guard", [None, "no-has-uprobes-first"])
def test_the_first_breakpoint_is_announced_before_it_is_written(
    run: Any, guard: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMF_HAS_UPROBES is set before the write, else the first hit is SIGTRAP (H51)."""
    stop_after(monkeypatch, breakpoints, "set_swbp", lambda: FirstProbe.last.gate)
    with guards.without(*([guard] if guard else [])):
        story = run(FirstProbe, [first, quick_traps])

    assert story.signals == ([SIGTRAP] if guard else [])
