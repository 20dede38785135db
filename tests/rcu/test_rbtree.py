"""The red-black tree: against a sorted list, its colour rules after every operation, and what a lockless
reader may see.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sortedcontainers import SortedDict, SortedList

from kmodel.core import CoopEngine, access, boot, guards, kernel_struct, raw_get, raw_set
from kmodel.rcu import rbtree
from kmodel.rcu.rbtree import (
    RB_CLEAR_NODE,
    RB_EMPTY_NODE,
    RB_EMPTY_ROOT,
    RbNode,
    RbRoot,
    check_invariants,
    rb_erase,
    rb_first,
    rb_last,
    rb_next,
    rb_nodes,
    rb_prev,
)
from kmodel.rcu.rbtree_find import (
    rb_add,
    rb_find,
    rb_find_add_rcu,
    rb_find_first,
    rb_find_rcu,
    rb_next_match,
)
from kmodel.sync.seqcount import (
    Seqcount,
    raw_write_seqcount_begin,
    raw_write_seqcount_end,
    read_seqcount_begin,
    read_seqcount_retry,
)


@kernel_struct
class Item(RbNode):
    """A node with a key and something to tell equal keys apart."""

    key: int = 0
    tag: int = 0


def key_of(item: Item) -> int:
    return raw_get(item, "key")  # type: ignore[no-any-return]


def cmp_key(key: int, item: Item) -> int:
    return key - item.key


def cmp_items(a: Item, b: Item) -> int:
    return a.key - b.key


def less(a: Item, b: Item) -> bool:
    return a.key < b.key


def tree_of(*keys: int) -> tuple[RbRoot, dict[int, Item]]:
    root = RbRoot()
    items = {key: Item(key=key) for key in keys}
    for item in items.values():
        assert rb_find_add_rcu(item, root, cmp_items) is None
    return root, items


PROFILE = settings(max_examples=60, derandomize=True, deadline=None)


@PROFILE
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=60))
def test_unique_keys_against_an_oracle(operations: list[tuple[bool, int]]) -> None:
    """Adding and erasing unique keys agrees with SortedDict, and the invariants hold after
    every operation.
    """
    root = RbRoot()
    oracle: SortedDict[int, Item] = SortedDict()
    for add, key in operations:
        found = rb_find(key, root, cmp_key)
        assert found is oracle.get(key)
        assert rb_find_rcu(key, root, cmp_key) is found
        if add:
            item = Item(key=key)
            assert rb_find_add_rcu(item, root, cmp_items) is found
            oracle.setdefault(key, item)
        elif found is not None:
            rb_erase(found, root)
            del oracle[key]
        assert check_invariants(root, key_of) == len(oracle)
        assert list(rb_nodes(root)) == list(oracle.values())
        assert RB_EMPTY_ROOT(root) == (not oracle)


@PROFILE
@given(st.lists(st.integers(0, 5), max_size=40), st.randoms(use_true_random=False))
def test_equal_keys_against_an_oracle(keys: list[int], rng: Any) -> None:
    """rb_add keeps equal keys in order of arrival; rb_find_first and rb_next_match walk exactly them, also
    while erasing.
    """
    root = RbRoot()
    oracle: Any = SortedList(key=lambda item: (item.key, item.tag))
    for tag, key in enumerate(keys):
        item = Item(key=key, tag=tag)
        rb_add(item, root, less)
        oracle.add(item)
        check_invariants(root, key_of)
    while oracle:
        for key in range(6):
            matches = []
            node = rb_find_first(key, root, cmp_key)
            while node is not None:
                matches.append(node)
                node = rb_next_match(key, node, cmp_key)
            assert matches == [item for item in oracle if item.key == key]
        victim = oracle.pop(rng.randrange(len(oracle)))
        rb_erase(victim, root)
        check_invariants(root, key_of)


def test_order_walks_both_ways() -> None:
    """rb_first, rb_next, rb_last and rb_prev give the keys in order, and a cleared node has no neighbours."""
    root, items = tree_of(5, 1, 9, 3, 7)
    node, forward = rb_first(root), []
    while node is not None:
        forward.append(node.key)
        node = rb_next(node)
    node, back = rb_last(root), []
    while node is not None:
        back.append(node.key)
        node = rb_prev(node)
    assert forward == [1, 3, 5, 7, 9] == back[::-1]
    rb_erase(items[5], root)
    assert not RB_EMPTY_NODE(items[5])
    RB_CLEAR_NODE(items[5])
    assert RB_EMPTY_NODE(items[5])
    assert rb_next(items[5]) is None


def test_check_invariants_can_fail() -> None:
    """Each of B1 to B4 is really checked."""
    for field, value, label in [("key", 99, "B1"), ("rb_color", 0, "B[23]"), ("rb_parent", None, "B4")]:
        root, items = tree_of(4, 2, 6, 1, 3)
        raw_set(items[2], field, value)
        raw_set(items[1], "rb_color", 0)
        with pytest.raises(AssertionError, match=label):
            check_invariants(root, key_of)


# ----------------------------------------------------------------------------------------- B5, store by store


def loop_in(items: list[Item]) -> bool:
    """Whether some reader, standing at any node in or out of the tree, could go down for ever."""
    done: set[int] = set()

    def descends(node: Any, above: frozenset[int]) -> bool:
        if node is None or node.tag in done:
            return False
        if node.tag in above:
            return True
        above |= {node.tag}
        if descends(node.rb_left, above) or descends(node.rb_right, above):
            return True
        done.add(node.tag)
        return False

    return any(descends(item, frozenset()) for item in items)


def loops_during(seed_keys: list[int], monkeypatch: pytest.MonkeyPatch) -> int:
    items = [Item(key=key, tag=tag) for tag, key in enumerate(seed_keys)]
    loops = 0

    def checked(store: Any) -> Any:
        def one(obj: Any, field: str, value: Any) -> None:
            nonlocal loops
            store(obj, field, value)
            loops += loop_in(items)

        return one

    monkeypatch.setattr(rbtree, "WRITE_ONCE", checked(access.WRITE_ONCE))
    monkeypatch.setattr(rbtree, "rcu_assign_pointer", checked(access.rcu_assign_pointer))
    root = RbRoot()
    for item in items:
        rb_add(item, root, less)
    for item in items[::2]:
        rb_erase(item, root)
    return loops


SHUFFLED = [(key * 37) % 61 for key in range(48)]


def test_no_store_makes_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """B5: after every single child store of many inserts and erases, every descent from every node still
    ends.
    """
    assert loops_during(SHUFFLED, monkeypatch) == 0


def test_a_rotation_in_the_wrong_order_makes_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin of B5: linking down before cutting gives readers a circle."""
    with guards.without("rb-detach-first"):
        assert loops_during(SHUFFLED, monkeypatch) > 0


# ------------------------------------------------------------------------------------------- lockless readers


def search_while_inserting(seed: int, guarded: bool) -> bool:
    """Whether a reader finds a key that is there all the time, while a writer's inserts rotate the tree."""
    found: list[bool] = []

    def setup() -> tuple[RbRoot, Seqcount]:
        boot()
        return tree_of(10, 20, 30, 40)[0], Seqcount()

    def writer(state: tuple[RbRoot, Seqcount]) -> None:
        root, seqcount = state
        for key in (50, 60, 70):
            item = Item(key=key)
            raw_write_seqcount_begin(seqcount)
            rb_find_add_rcu(item, root, cmp_items)
            raw_write_seqcount_end(seqcount)

    def search(root: RbRoot, seqcount: Seqcount) -> bool:
        while True:
            seq = read_seqcount_begin(seqcount) if guarded else 0
            node = rb_find_rcu(40, root, cmp_key)
            # a miss may be false: only an unchanged seqcount makes it final
            if node is not None or not guarded or not read_seqcount_retry(seqcount, seq):
                return node is not None

    def reader(state: tuple[RbRoot, Seqcount]) -> None:
        found.extend(search(*state) for _ in range(6))

    def final(state: tuple[RbRoot, Seqcount]) -> None:
        assert check_invariants(state[0], key_of) == 7

    CoopEngine(seed).run(setup, [writer, reader], final)
    return all(found)


def test_a_rotation_hides_a_key_from_lockless_readers() -> None:
    """H03: without the seqcount some interleaving reports a present key as absent; with it, the same seed
    does not.
    """
    missed = next(seed for seed in range(200) if not search_while_inserting(seed, guarded=False))
    assert search_while_inserting(missed, guarded=True)


def test_the_seqcount_retry_finds_it_always() -> None:
    """H03, guarded: over many interleavings a present key is always found."""
    assert all(search_while_inserting(seed, guarded=True) for seed in range(51))


def search_while_publishing(seed: int) -> Any:
    """What a reader gets for a key whose node, with left-over links from an earlier life, is
    being inserted.
    """
    got: list[Any] = []

    def setup() -> tuple[RbRoot, Item]:
        boot()
        root, _items = tree_of(10)
        stale = Item(key=99)
        return root, Item(key=20, rb_left=stale, rb_right=stale)

    def writer(state: tuple[RbRoot, Item]) -> None:
        rb_find_add_rcu(state[1], state[0], cmp_items)

    def reader(state: tuple[RbRoot, Item]) -> None:
        got.append(rb_find_rcu(99, state[0], cmp_key))

    CoopEngine(seed).run(setup, [writer, reader])
    return got[0]


def test_insert_initialises_before_it_publishes() -> None:
    """H05: a reader never follows the links that a new node's memory held before."""
    assert [search_while_publishing(seed) for seed in range(51)] == [None] * 51


def test_insert_that_publishes_first_is_caught() -> None:
    """H05, the broken twin: published before initialised, the node leads a reader to what is
    not in the tree.
    """
    with guards.without("rb-init-before-publish"):
        assert any(search_while_publishing(seed) is not None for seed in range(51))
