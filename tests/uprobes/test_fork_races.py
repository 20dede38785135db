"""H48: registration beside fork, with dup_mmap_sem and without."""

from typing import Any

import pytest

from kmodel.core import guards
from kmodel.mm import MmStruct, fork
from kmodel.uprobes import register, uprobe_unregister
from tests.uprobes.stories import Gate, coop_seeds
from tests.uprobes.world import CODE, TEXT, hit, map_text, new_file, opcode, recorder, registered

INT3 = 0xCC
SEEDS = range(6)


class Story:
    """A process that maps a file, and a registrar who stops between the scan of i_mmap and the write."""

    probed = False
    armed = False
    now: Any = None

    def __init__(self) -> None:
        self.gate = Gate()
        self.mm = MmStruct()
        self.file = new_file()
        map_text(self.mm, self.file)
        self.child: Any = None
        self.uc = recorder()
        self.uprobe = registered(self.file, 0x10, self.uc) if self.probed else None
        Story.now = self


class Probed(Story):
    """The file has a uprobe already."""

    probed = True


@pytest.fixture
def scan_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """build_map_info() stops when it is done, where the fork may get in."""
    real = register.build_map_info

    def stopping(*args: Any) -> Any:
        info = real(*args)
        story = getattr(Story, "now", None)
        if guards.any_removed and story is not None and story.child is None and story.armed:
            story.gate.stop()
        return info

    monkeypatch.setattr(register, "build_map_info", stopping)


def registers(story: Any) -> None:
    story.armed = True
    story.uprobe = registered(story.file, 0x10, story.uc)


def unregisters(story: Any) -> None:
    story.armed = True
    uprobe_unregister(story.uprobe, story.uc)


def forks(story: Any) -> None:
    if guards.any_removed:
        story.gate.wait()
    child = fork(story.mm)
    story.gate.open()
    story.child = child


def both_have_it(story: Any) -> None:
    assert opcode(story.mm, TEXT + 0x10) == INT3
    assert opcode(story.child, TEXT + 0x10) == INT3, "the child lacks the breakpoint"


def none_has_it(story: Any) -> None:
    assert opcode(story.mm, TEXT + 0x10) == CODE[0x10]
    assert opcode(story.child, TEXT + 0x10) == CODE[0x10], "the child keeps an orphan breakpoint"


@pytest.mark.parametrize(
    ("setup", "registrar", "final"),
    [(Story, registers, both_have_it), (Probed, unregisters, none_has_it)],
    ids=["register", "unregister"],
)
def test_fork_beside_registration(setup: Any, registrar: Any, final: Any, scan_stops: None) -> None:
    """P9: whichever comes first, parent and child agree; without dup_mmap_sem the child that was linked after
    the scan is forgotten.
    """
    coop_seeds(setup, [registrar, forks], final, seeds=SEEDS)
    with guards.without("no-dup-mmap-sem"), pytest.raises(AssertionError, match="the child"):
        coop_seeds(setup, [registrar, forks], final, seeds=SEEDS)


def test_a_child_is_hit_by_inherited_breakpoints() -> None:
    """A hit in the child reaches the handler, and unregistering removes the breakpoint from both."""
    story = Probed()
    child = fork(story.mm)
    for mm in (story.mm, child):
        hit(mm, TEXT + 0x10)
    assert len(story.uc.calls) == 2
    uprobe_unregister(story.uprobe, story.uc)
    assert [opcode(mm, TEXT + 0x10) for mm in (story.mm, child)] == [CODE[0x10]] * 2
