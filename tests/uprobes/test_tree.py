"""uprobes_tree: order, lockless lookups beside rotations, dead twins."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sortedcontainers import SortedDict

from kmodel.core import Pooled, boot, current, guards, kernel_struct, ptr
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.slab import kzalloc
from kmodel.sync import refcount_dec_and_test, refcount_read, refcount_set
from kmodel.uprobes import find_refcount, find_rwlock, lifetime, tree
from kmodel.uprobes.uprobe import Uprobe, init_uprobe
from tests.uprobes.stories import Gate, assert_warned, both_engines, coop_seeds, on_coop


@kernel_struct
class Place(Pooled):
    """Stands in for an inode: only its address matters to the tree."""

    number: int = 0


def new_uprobe(inode: Any, offset: int) -> Uprobe:
    uprobe = kzalloc(Uprobe)
    assert uprobe is not None
    init_uprobe(uprobe, inode, offset, 0)
    refcount_set(uprobe, "ref", 1)
    return uprobe


def insert(inode: Any, offset: int) -> Uprobe:
    return tree.insert_uprobe(new_uprobe(inode, offset))


def find(inode: Any, offset: int) -> Uprobe | None:
    rcu_read_lock_trace()
    found = tree.find_uprobe_rcu(inode, offset)
    rcu_read_unlock_trace()
    return found


PLACES = [Place(number=n) for n in range(3)]
keys = st.tuples(st.integers(0, 2), st.integers(0, 15))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.booleans(), keys), max_size=60))
def test_the_tree_agrees_with_a_sorted_dict(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    """Whatever is inserted and erased, lookups, ranges and the order are those of a SortedDict."""
    boot()
    oracle: SortedDict[tuple[int, int], Uprobe] = SortedDict()
    for add, (place, offset) in steps:
        inode = PLACES[place]
        key = (ptr(inode), offset)
        if add:
            uprobe = insert(inode, offset)
            assert oracle.setdefault(key, uprobe) is uprobe
        elif key in oracle:
            lifetime.erase_uprobe(oracle.pop(key))
        tree.check_invariants()

    assert tree.uprobes() == list(oracle.values())
    for place in PLACES:
        for offset in range(16):
            expected = oracle.get((ptr(place), offset))
            assert find(place, offset) is expected
            assert find_rwlock.find_uprobe(place, offset) is expected
            assert find_refcount.find_uprobe(place, offset) is expected
        inside = [u for (where, offset), u in oracle.items() if where == ptr(place) and 4 <= offset <= 9]
        assert set(tree.build_probe_list(place, 4, 9)) == set(inside)
        assert tree.range_has_uprobes(place, 4, 9) == bool(inside)


def test_null_and_unknown_inodes_match_nothing() -> None:
    """A lookup with NULL or a stray inode pointer compares and finds nothing (H12)."""
    boot()
    insert(PLACES[0], 7)

    assert find(None, 7) is None
    assert find(PLACES[1], 7) is None


def test_inserting_a_key_twice_returns_the_live_uprobe_with_a_reference() -> None:
    """insert_uprobe() of a known key takes a reference on the uprobe that is there."""
    boot()
    first = insert(PLACES[0], 3)

    assert insert(PLACES[0], 3) is first
    assert refcount_read(first, "ref") == 2


def test_a_dead_twin_is_replaced() -> None:
    """A uprobe found with ref 0 is erased in its successor's favour; its deferred free leaves the tree alone
    (H06, H07).
    """
    boot()
    dead = insert(PLACES[0], 3)
    assert refcount_dec_and_test(dead, "ref")

    alive = insert(PLACES[0], 3)

    assert alive is not dead
    assert not tree.uprobe_is_active(dead)
    lifetime.erase_uprobe(dead)
    assert tree.uprobes() == [alive]
    tree.check_invariants()


def test_without_the_dead_twin_rule_a_dying_uprobe_is_revived() -> None:
    """no-dead-twin: the reference count rises from 0, which refcount_t reports (H06)."""
    boot()
    dead = insert(PLACES[0], 3)
    assert refcount_dec_and_test(dead, "ref")

    with guards.without("no-dead-twin"):
        assert insert(PLACES[0], 3) is dead

    assert_warned("addition on 0")


def test_without_the_active_test_a_twin_is_erased_twice() -> None:
    """no-active-test: the deferred free of a uprobe that was replaced damages the tree (H07)."""
    boot()
    dead = insert(PLACES[0], 3)
    for offset in range(8):
        if offset != 3:
            insert(PLACES[0], offset)
    assert refcount_dec_and_test(dead, "ref")
    insert(PLACES[0], 3)

    def erase_again() -> None:
        lifetime.erase_uprobe(dead)
        tree.check_invariants()
        assert len(tree.uprobes()) == 8

    with guards.without("no-active-test"), pytest.raises((AssertionError, AttributeError)):
        erase_again()


# ------------------------------------------------------------------------------ a node hidden by a rotation


class Rotation:
    """20 and 30, 30 to the right of 20. Adding 40 rotates: 30 is above 20 then, and no longer below it."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.found: Any = "not looked"
        insert(PLACES[0], 20)
        self.hidden = insert(PLACES[0], 30)
        assert tree.uprobes_tree.rb_node.offset == 20

    def reader(self) -> None:
        self.found = find(PLACES[0], 30)

    def writer(self) -> None:
        self.gate.wait()
        insert(PLACES[0], 40)
        assert tree.uprobes_tree.rb_node is self.hidden
        self.gate.open()


def reader(story: Rotation) -> None:
    story.reader()


def writer(story: Rotation) -> None:
    story.writer()


@pytest.fixture
def stop_at_20(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader decides to go right at 20, and stops before it does."""
    compare = tree.uprobe_cmp_key
    stories: list[Rotation] = []
    monkeypatch.setattr(Rotation, "made", stories, raising=False)

    def stopping(key: Any, node: Uprobe) -> int:
        result = compare(key, node)
        if current().comm == "reader" and node.offset == 20:
            stories[-1].gate.stop()
        return result

    monkeypatch.setattr(tree, "uprobe_cmp_key", stopping)


def rotation() -> Rotation:
    story = Rotation()
    Rotation.made.append(story)  # type: ignore[attr-defined]
    return story


@both_engines
def test_a_node_hidden_by_a_rotation_is_found_by_the_retry(run: Any, stop_at_20: None) -> None:
    """A descent that a rotation led past the node is repeated, because uprobes_seqcount moved (H03)."""
    story = run(rotation, [reader, writer])

    assert story.found is story.hidden


@both_engines
def test_without_the_seqcount_retry_the_node_is_missed(run: Any, stop_at_20: None) -> None:
    """no-seqcount-retry: the same descent reports that there is no such uprobe (H03)."""
    with guards.without("no-seqcount-retry"):
        story = run(rotation, [reader, writer])

    assert story.found is None


class Overtaken:
    """A reader that is overtaken by a whole insertion when it has made `after` comparisons."""

    after = 0

    def __init__(self) -> None:
        self.gate = Gate()
        self.found: Any = "not looked"
        for offset in range(10, 80, 10):
            self.last = insert(PLACES[0], offset)
        Rotation.made.append(self)  # type: ignore[attr-defined]


def last_seeker(story: Overtaken) -> None:
    story.found = find(PLACES[0], 70)


last_seeker.__name__ = "reader"


def appender(story: Overtaken) -> None:
    story.gate.wait()
    insert(PLACES[0], 80)
    insert(PLACES[0], 90)
    story.gate.open()


def overtaken(monkeypatch: pytest.MonkeyPatch, after: int) -> Overtaken:
    """Run the story on the cooperative engine."""
    compare = tree.uprobe_cmp_key
    stories: list[Any] = []
    comparisons = 0

    def stopping(key: Any, node: Uprobe) -> int:
        nonlocal comparisons
        result = compare(key, node)
        if current().comm == "reader":
            comparisons += 1
            if comparisons == after:
                stories[-1].gate.stop()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Rotation, "made", stories, raising=False)
        patch.setattr(tree, "uprobe_cmp_key", stopping)
        return on_coop(after)(Overtaken, [last_seeker, appender])


def test_a_reader_overtaken_anywhere_finds_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever on its way down writers overtake the reader, it finds a uprobe that is there all the time
    (R3).
    """
    for after in (1, 2, 3):
        story = overtaken(monkeypatch, after)
        assert story.found is story.last


def test_without_the_seqcount_retry_an_overtaken_reader_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """no-seqcount-retry: at one of these places the uprobe is missed (H03, H04)."""
    with guards.without("no-seqcount-retry"):
        found = [overtaken(monkeypatch, after).found for after in (1, 2, 3)]

    assert None in found


def many_inserts(story: Rotation) -> None:
    for offset in (40, 10, 50, 60, 70):
        insert(PLACES[0], offset)
    for offset in (50, 10, 70):
        uprobe = find(PLACES[0], offset)
        assert uprobe is not None
        lifetime.erase_uprobe(uprobe)


def looker(story: Rotation) -> None:
    for _ in range(6):
        assert find(PLACES[0], 30) is story.hidden, "a uprobe that is there all the time was missed"


def test_a_uprobe_that_stays_is_always_found_while_others_come_and_go() -> None:
    """Under any interleaving a lookup finds what is in the tree throughout (R3)."""
    coop_seeds(Rotation, [looker, many_inserts], lambda _story: tree.check_invariants())
