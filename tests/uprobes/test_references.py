"""The other ways to count references on a uprobe: the epoch's arithmetic, and the tree's own reference."""

from typing import Any

import pytest

from kmodel.core import guards, is_freed, raw_get
from kmodel.mm import MmStruct
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.sync import refcount_read
from kmodel.uprobes import (
    get_uprobe,
    lifetime,
    put_uprobe,
    ref_epoch,
    ref_tree,
    references,
    tree,
    try_get_uprobe,
    uprobe_register,
    uprobe_unregister,
    uprobe_unregister_nosync,
)
from tests.uprobes.stories import Gate, both_engines, coop_seeds
from tests.uprobes.test_tree import PLACES
from tests.uprobes.world import TEXT, hit, map_text, new_file, recorder, registered


def new(offset: int = 1) -> Any:
    """A uprobe in the tree with one reference."""
    from tests.uprobes.test_tree import new_uprobe

    uprobe = new_uprobe(PLACES[0], offset)
    references.implementation.init(uprobe, 1)
    return tree.insert_uprobe(uprobe)


@pytest.fixture
def epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "implementation", ref_epoch)


@pytest.fixture
def tree_owned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "implementation", ref_tree)


# ------------------------------------------------------------------------------ the epoch


def test_every_get_and_put_moves_the_epoch(epoch: None) -> None:
    """The lower half counts references, the upper half operations."""
    uprobe = new()
    get_uprobe(uprobe)
    get_uprobe(uprobe)
    put_uprobe(uprobe)

    assert raw_get(uprobe, "ref") == (3 << 32) + 2
    assert ref_epoch.users(uprobe) == 2


def test_the_epoch_starts_again_before_the_sign(epoch: None) -> None:
    """At 2^31 operations bit 63 is set for a moment and cleared again; the count is not touched."""
    uprobe = new()
    for step, count in ((get_uprobe, 2), (put_uprobe, 1)):
        ref_epoch.init(uprobe, (((1 << 31) - 1) << 32) + (1 if count == 2 else 2))
        step(uprobe)
        assert raw_get(uprobe, "ref") == count


def test_the_last_put_destroys(epoch: None) -> None:
    """Down to zero: out of the tree at once, and freed after the grace periods."""
    uprobe = new()
    rcu_read_lock_trace()
    put_uprobe(uprobe)

    assert tree.uprobes() == []
    assert not is_freed(uprobe)
    rcu_read_unlock_trace()
    lifetime.wait_for_frees()
    assert is_freed(uprobe)


def test_zero_is_not_dead(epoch: None) -> None:
    """Who finds it under the treelock may take the count from zero: the putter then leaves it alone."""
    uprobe = new()
    original = ref_epoch._destroy
    found = []

    def find_first(u: Any, v: int) -> bool:
        if not found:
            found.extend(tree.build_probe_list(PLACES[0], 0, 9))
        return original(u, v)

    ref_epoch._destroy = find_first
    try:
        put_uprobe(uprobe)
        assert found == [uprobe]
        assert tree.uprobes() == [uprobe]
        put_uprobe(uprobe)
    finally:
        ref_epoch._destroy = original
    lifetime.wait_for_frees()
    assert is_freed(uprobe)


# ------------------------------------------------------------------------------ the tree's reference


def test_the_tree_has_a_reference(tree_owned: None) -> None:
    """One consumer, two references; users() says one."""
    file = new_file()
    uprobe = registered(file, 0x11)

    assert refcount_read(uprobe, "ref") == 2
    assert ref_tree.users(uprobe) == 1


def test_a_reader_never_sees_zero(tree_owned: None) -> None:
    """Whoever found the uprobe before it was deleted can take a reference, and keeps it by that (T1)."""
    mm = MmStruct()
    file = new_file()
    map_text(mm, file)
    uc = recorder()
    uprobe = registered(file, 0x11, uc)
    rcu_read_lock_trace()
    assert tree.find_uprobe_rcu(file.f_inode, 0x11) is uprobe
    uprobe_unregister_nosync(uprobe, uc)

    assert tree.uprobes() == []
    assert try_get_uprobe(uprobe) is uprobe
    assert refcount_read(uprobe, "ref") == 2  # the tree's is dropped after this section
    rcu_read_unlock_trace()
    lifetime_barrier()
    assert not is_freed(uprobe)
    assert refcount_read(uprobe, "ref") == 1
    put_uprobe(uprobe)
    assert is_freed(uprobe)


def lifetime_barrier() -> None:
    """Every drop that is under way is done."""
    lifetime.finish_frees()


class Lost:
    """A registers beside B, who unregisters the only other consumer of the place."""

    last: "Lost"

    def __init__(self) -> None:
        self.gate = Gate()
        self.mm = MmStruct()
        self.file = new_file()
        map_text(self.mm, self.file)
        self.old, self.uc = recorder(), recorder()
        self.uprobe = registered(self.file, 0x11, self.old)
        Lost.last = self


def reader(story: Lost) -> None:
    assert not isinstance(uprobe_register(story.file.f_inode, 0x11, 0, story.uc), int)


def unregisterer(story: Lost) -> None:
    story.gate.wait()
    uprobe_unregister(story.uprobe, story.old)
    story.gate.open()


@both_engines
@pytest.mark.parametrize("guard", [None, "no-active-recheck"])
def test_a_register_that_comes_too_late_starts_over(
    run: Any, guard: str | None, tree_owned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uprobe that A found is deleted before A has register_rwsem: A looks again. Without, A is deaf
    (T2).
    """
    from kmodel.uprobes import register
    from tests.uprobes.stories import stop_after

    stop_after(monkeypatch, register, "alloc_uprobe", lambda: Lost.last.gate)
    with guards.without(*([guard] if guard else [])):
        story = run(Lost, [reader, unregisterer])
        hits_before = len(story.uc.calls)
        hit(story.mm, TEXT + 0x11)
    assert (len(story.uc.calls) - hits_before == 1) == (guard is None)


def test_schedules_of_register_and_unregister(tree_owned: None) -> None:
    """Under many schedules whoever is registered at the end is found, and nothing else is in the tree."""

    def remover(story: Lost) -> None:
        uprobe_unregister(story.uprobe, story.old)
        lifetime.wait_for_frees()

    def check(story: Lost) -> None:
        assert len(tree.uprobes()) == 1
        hit(story.mm, TEXT + 0x11)
        assert len(story.uc.calls) == 1
        assert is_freed(story.uprobe) == (tree.uprobes() != [story.uprobe])

    coop_seeds(Lost, [reader, remover], check, seeds=range(25))
