"""Oleg's first race: a lookup that takes references, and the plain increment that revives a dying uprobe
(H01).
"""

from typing import Any

import pytest

from kmodel.core import clear_warnings, current, guards
from kmodel.sync import REFCOUNT_SATURATED, refcount_read
from kmodel.uprobes import SCHEMES, find_refcount, lifetime, put_uprobe, tree
from tests.uprobes.stories import Gate, assert_warned, both_engines, coop_seeds, failing_seed
from tests.uprobes.test_tree import PLACES, insert


class Story:
    """X drops the last reference of U while T is between finding U and taking a reference."""

    last: "Story"

    def __init__(self) -> None:
        self.gate = Gate()
        self.uprobe = insert(PLACES[0], 1)
        self.got: Any = "not looked"
        self.ref = 0
        Story.last = self


def reader(story: Story) -> None:
    story.got = find_refcount.find_uprobe(PLACES[0], 1)
    if story.got is not None:
        story.ref = refcount_read(story.got, "ref")


def unregisterer(story: Story) -> None:
    story.gate.wait()
    put_uprobe(story.uprobe)
    story.gate.open()
    lifetime.wait_for_frees()


@pytest.fixture
def stop_after_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """T stops when rb_find_rcu has found the node."""
    descend = find_refcount.rb_find_rcu

    def stopping(*args: Any) -> Any:
        node = descend(*args)
        if current().comm == "reader":
            Story.last.gate.stop()
        return node

    monkeypatch.setattr(find_refcount, "rb_find_rcu", stopping)


@both_engines
def test_a_dying_uprobe_gives_no_reference(run: Any, stop_after_descent: None) -> None:
    """inc-not-zero refuses: the lookup finds nothing, ref stays 0 (H01, U1)."""
    story = run(Story, [reader, unregisterer])

    assert story.got is None
    assert tree.uprobes() == []


@both_engines
def test_with_a_plain_get_a_dying_uprobe_is_revived(run: Any, stop_after_descent: None) -> None:
    """plain-get: ref goes up from 0; refcount_t warns and saturates, but the free is on its way (H01)."""
    with guards.without("plain-get"):
        story = run(Story, [reader, unregisterer])

    assert story.got is story.uprobe
    assert story.ref == REFCOUNT_SATURATED
    assert_warned("addition on 0")


def chance_reader(story: Story) -> None:
    uprobe = find_refcount.find_uprobe(PLACES[0], 1)
    if uprobe is not None:
        assert refcount_read(uprobe, "ref") > 0, "a reference on a dying uprobe"
        assert uprobe.offset == 1
        put_uprobe(uprobe)


def chance_putter(story: Story) -> None:
    put_uprobe(story.uprobe)


def patient_putter(story: Story) -> None:
    put_uprobe(story.uprobe)
    lifetime.wait_for_frees()


def test_no_interleaving_revives_a_uprobe() -> None:
    """Under many schedules a reference is good, and the uprobe is freed once (U1)."""
    coop_seeds(Story, [chance_reader, chance_reader, patient_putter], seeds=range(25))


def test_with_a_plain_get_some_interleaving_revives_one() -> None:
    """plain-get: within 300 seeds a lookup takes a reference on a dying uprobe (H01)."""
    with guards.without("plain-get"):
        failure = failing_seed(Story, [chance_reader, chance_putter], seeds=range(300))
    clear_warnings()

    assert failure is not None


def test_all_schemes_find_the_same() -> None:
    """Every scheme calls the handler once per hit and looks up the same uprobe."""
    from kmodel.mm import MmStruct
    from kmodel.uprobes import PtRegs
    from tests.uprobes.world import TEXT, map_text, new_file, recorder, registered

    mm = MmStruct()
    file = new_file()
    map_text(mm, file)
    uc = recorder()
    uprobe = registered(file, 0x11, uc)
    current().mm = mm
    for scheme in SCHEMES.values():
        uc.calls.clear()
        regs = PtRegs(ip=TEXT + 0x12)
        scheme.handle_swbp(regs)
        assert (uc.calls, regs.ip) == ([TEXT + 0x11], TEXT + 0x12)
        assert scheme.lookup(TEXT + 0x11, current()) is uprobe
        assert scheme.lookup(TEXT + 0x13, current()) is None
        assert refcount_read(uprobe, "ref") == 1
