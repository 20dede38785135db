"""RCU lists: contents against a Python list, readers during changes, and the corruption checks."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmodel.core import KernelBug, UseAfterFree, guards, kernel_struct, kfree, variables
from kmodel.rcu import (
    INIT_LIST_HEAD,
    ListHead,
    list_add,
    list_add_rcu,
    list_add_tail_rcu,
    list_del,
    list_del_init,
    list_del_rcu,
    list_empty,
    list_first_or_null_rcu,
    list_for_each_entry,
    list_for_each_entry_rcu,
    list_is_singular,
    list_replace_rcu,
    rcu_read_lock,
    rcu_read_unlock,
    synchronize_rcu,
)
from kmodel.rcu.rculist import check_invariants
from tests.rcu.scenarios import SEEDS, run_everywhere, run_seed, use_after_free


@kernel_struct
class Entry(ListHead):
    """An entry with a number."""

    number: int = 0


def numbers(head: ListHead) -> list[int]:
    return [entry.number for entry in list_for_each_entry_rcu(head)]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "tail", "del", "replace", "init"]), st.integers(0, 9)), max_size=30
    )
)
def test_against_an_oracle(operations: list[tuple[str, int]]) -> None:
    """Every operation does to the list what its like does to a Python list, and L1 holds after each."""
    head, oracle = ListHead(), list[Entry]()
    for n, (operation, where) in enumerate(operations):
        entry = Entry(number=n)
        if operation == "add":
            list_add_rcu(entry, head)
            oracle.insert(0, entry)
        elif operation == "tail" or not oracle:
            list_add_tail_rcu(entry, head)
            oracle.append(entry)
        elif operation == "replace":
            list_replace_rcu(oracle[where % len(oracle)], entry)
            oracle[where % len(oracle)] = entry
        else:
            victim = oracle.pop(where % len(oracle))
            (list_del_rcu if operation == "del" else list_del_init)(victim)
            assert list_empty(victim) == (operation == "init")
        assert check_invariants(head) == len(oracle)
        assert list(list_for_each_entry_rcu(head)) == oracle == list(list_for_each_entry(head))
        assert list_empty(head) == (not oracle)
        assert list_is_singular(head) == (len(oracle) == 1)
        assert list_first_or_null_rcu(head) is (oracle[0] if oracle else None)


def test_the_locked_walk_survives_removal() -> None:
    """list_for_each_entry allows the entry it yielded to be removed."""
    head = ListHead()
    for n in range(4):
        list_add(Entry(number=n), head)
    for entry in list_for_each_entry(head):
        if entry.number % 2:
            list_del(entry)
    assert numbers(head) == [2, 0]
    INIT_LIST_HEAD(head)
    assert list_empty(head)


def test_corruption_is_reported() -> None:
    """Removing twice, and adding between entries that are not neighbours, is a KernelBug."""
    head, entry = ListHead(), Entry()
    list_add(entry, head)
    list_del_rcu(entry)
    with pytest.raises(KernelBug, match="removed before"):
        list_del_rcu(entry)
    stranger = Entry()
    entry.prev = entry.next = head
    with pytest.raises(KernelBug, match="do not know it"):
        list_del(entry)
    head.next = stranger
    with pytest.raises(KernelBug, match="list_add corruption"):
        list_add(Entry(), head)


def walk_while_changing() -> tuple[Any, list[Any]]:
    def reader(v: Any) -> None:
        for _ in range(3):
            rcu_read_lock()
            v.walks = (*v.walks, tuple(numbers(v.head)))
            rcu_read_unlock()

    def updater(v: Any) -> None:
        for number in (2, 1):
            victim = next(e for e in list_for_each_entry(v.head) if e.number == number)
            list_del_rcu(victim)
            synchronize_rcu()
            kfree(victim)
        list_add_rcu(Entry(number=9), v.head)

    return three_entries, [reader, updater]


def three_entries() -> Any:
    v = variables(head=None, walks=())
    v.head = ListHead()
    for n in (1, 2, 3):
        list_add_tail_rcu(Entry(number=n), v.head)
    return v


def test_readers_see_one_of_the_states() -> None:
    """L2: a walk during removals and an insertion yields the entries of some moment, and ends."""
    for final in run_everywhere(*walk_while_changing()):
        assert numbers(final.head) == [9, 3]
        for walk in final.walks:
            assert walk in {(1, 2, 3), (1, 3), (3,), (9, 3)}


def test_removal_that_cuts_the_readers_way_is_caught() -> None:
    """The broken twin of L2: poisoning next as well leaves a reader at the removed entry nowhere to go."""
    setup, threads = walk_while_changing()
    with guards.without("list-del-keeps-next"):
        assert any(fails(seed, setup, threads) for seed in SEEDS)


def fails(seed: int, setup: Any, threads: Any) -> bool:
    try:
        run_seed(seed, setup, threads)
    except (UseAfterFree, AttributeError):
        return True
    return False


def test_publishing_before_initialising_is_caught() -> None:
    """H05, the broken twin: an entry published with the links of its former life leads readers astray."""

    def setup() -> Any:
        v = three_entries()
        v.walks = Entry(number=5)
        v.walks.next = v.walks.prev = kill(Entry())
        return v

    def kill(entry: Entry) -> Entry:
        kfree(entry)
        return entry

    def reader(v: Any) -> None:
        numbers(v.head)

    def updater(v: Any) -> None:
        list_add_rcu(v.walks, v.head)

    assert not any(use_after_free(seed, setup, [reader, updater]) for seed in SEEDS)
    with guards.without("list-init-before-publish"):
        assert any(use_after_free(seed, setup, [reader, updater]) for seed in SEEDS)
