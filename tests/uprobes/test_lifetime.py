"""References, and the chain from the last put to the free."""

from typing import Any

import pytest

from kmodel.core import UseAfterFree, boot, guards, is_freed, kthread_run
from kmodel.rcu import (
    list_for_each_entry_rcu,
    rcu_read_lock_trace,
    rcu_read_unlock_trace,
    srcu_read_lock,
    srcu_read_unlock,
)
from kmodel.sync import refcount_read
from kmodel.uprobes import get_uprobe, lifetime, put_uprobe, tree, try_get_uprobe
from tests.uprobes.stories import Gate, both_engines, coop_seeds, failing_seed, join
from tests.uprobes.test_tree import PLACES, find, insert


def test_the_last_put_frees() -> None:
    """A uprobe is in the tree until its last reference goes, and is freed some grace periods later."""
    uprobe = insert(PLACES[0], 1)
    get_uprobe(uprobe)

    put_uprobe(uprobe)
    assert tree.uprobes() == [uprobe]
    assert not is_freed(uprobe)

    put_uprobe(uprobe)
    lifetime.wait_for_frees()
    assert tree.uprobes() == []
    assert is_freed(uprobe)


def test_try_get_refuses_a_dying_uprobe() -> None:
    """A reader that finds a uprobe with ref 0 gets no reference; the count stays 0 (U1)."""
    uprobe = insert(PLACES[0], 1)
    rcu_read_lock_trace()
    put_uprobe(uprobe)

    assert try_get_uprobe(uprobe) is None
    assert refcount_read(uprobe, "ref") == 0
    rcu_read_unlock_trace()
    lifetime.wait_for_frees()


class Story:
    """One uprobe, one who looks at it and one who drops its last reference."""

    def __init__(self) -> None:
        self.uprobe = insert(PLACES[0], 1)
        self.gate = Gate()


def touch(uprobe: Any) -> None:
    """Use it as handle_swbp does."""
    assert uprobe.offset == 1
    assert list(list_for_each_entry_rcu(uprobe.consumers)) == []
    assert uprobe.arch.ops == 0


def trace_reader(story: Story) -> None:
    rcu_read_lock_trace()
    uprobe = find(PLACES[0], 1)
    if uprobe is not None:
        for _ in range(6):
            touch(uprobe)
    rcu_read_unlock_trace()


def lease_holder(story: Story) -> None:
    idx = srcu_read_lock(lifetime.uretprobes_srcu)
    uprobe = find(PLACES[0], 1)
    if uprobe is not None:
        touch(uprobe)
        touch(uprobe)
    srcu_read_unlock(lifetime.uretprobes_srcu, idx)


def stopping_trace_reader(story: Story) -> None:
    rcu_read_lock_trace()
    uprobe = find(PLACES[0], 1)
    story.gate.stop()
    touch(uprobe)
    rcu_read_unlock_trace()


def stopping_lease_holder(story: Story) -> None:
    idx = srcu_read_lock(lifetime.uretprobes_srcu)
    uprobe = find(PLACES[0], 1)
    story.gate.stop()
    touch(uprobe)
    srcu_read_unlock(lifetime.uretprobes_srcu, idx)


def dropper(story: Story) -> None:
    put_uprobe(story.uprobe)
    lifetime.wait_for_frees()


def late_dropper(story: Story) -> None:
    insert(PLACES[0], 2)
    dropper(story)


def dropper_in_between(story: Story) -> None:
    """Drop it while the other is inside; the free may come at any time after."""
    story.gate.wait()
    put_uprobe(story.uprobe)
    story.gate.open()
    lifetime.wait_for_frees()


def freer_in_between(story: Story) -> None:
    """Drop it and wait for the free while the other is inside: possible only if nobody waits for readers."""
    story.gate.wait()
    put_uprobe(story.uprobe)
    lifetime.wait_for_frees()
    story.gate.open()


@both_engines
@pytest.mark.parametrize("other", [stopping_trace_reader, stopping_lease_holder])
def test_readers_of_both_kinds_are_waited_for(run: Any, other: Any) -> None:
    """A uprobe dropped while a hit or a return instance uses it stays readable for them (H08)."""
    run(Story, [other, dropper_in_between])

    assert tree.uprobes() == []


@pytest.mark.parametrize("other", [trace_reader, lease_holder])
def test_no_interleaving_lets_a_reader_see_a_freed_uprobe(other: Any) -> None:
    """Over many schedules a reader never touches freed memory (H08)."""
    coop_seeds(Story, [other, dropper])


@both_engines
@pytest.mark.parametrize(
    ("guard", "other"),
    [
        ("no-tasks-trace-wait", stopping_trace_reader),
        ("no-srcu-wait", stopping_lease_holder),
        ("free-without-grace-period", stopping_trace_reader),
        ("free-without-grace-period", stopping_lease_holder),
    ],
)
def test_each_link_of_the_free_chain_is_needed(run: Any, guard: str, other: Any) -> None:
    """With one wait removed, the reader it waits for meets a freed uprobe (H08)."""
    with guards.without(guard), pytest.raises(UseAfterFree):
        run(Story, [other, freer_in_between])


def test_free_without_grace_period_is_found_by_chance_too() -> None:
    """free-without-grace-period: within 200 seeds a reader touches freed memory (H08)."""
    with guards.without("free-without-grace-period"):
        failure = failing_seed(Story, [trace_reader, late_dropper])

    assert failure is not None
    assert isinstance(failure[1], UseAfterFree)


def test_a_boot_lets_frees_come_to_their_end() -> None:
    """What workers still do with uprobes of the last boot is over before the next one hands memory out."""
    gate = Gate()

    def reader() -> None:
        rcu_read_lock_trace()
        gate.stop()
        rcu_read_unlock_trace()

    task = kthread_run(reader, comm="reader", daemon=False)
    gate.wait()
    ledger = lifetime.ledger
    put_uprobe(insert(PLACES[0], 1))
    assert ledger.dying == 1

    gate.open()
    boot()

    assert ledger.dying == 0
    join(task)
