"""Readers of a type-safe cache: with the recipe, without it, and the grace period of the slab."""

from typing import Any

import pytest

from kmodel.core import (
    POISON,
    READ_ONCE,
    WRITE_ONCE,
    CoopEngine,
    KernelBug,
    Pooled,
    Struct,
    atomic,
    boot,
    guards,
    kernel_struct,
    rcu_assign_pointer,
    rcu_dereference,
    smp_cond_load_acquire,
    smp_store_release,
)
from kmodel.explore import Verdict, explore
from kmodel.rcu import rcu_barrier, rcu_read_lock, rcu_read_unlock, synchronize_rcu
from kmodel.slab import (
    kmem_cache_alloc,
    kmem_cache_create,
    kmem_cache_free,
    slab_options,
)
from kmodel.sync import refcount_dec_and_test, refcount_inc_not_zero_acquire, refcount_set_release

SEEDS = range(30)


@kernel_struct
class Node(Pooled):
    """An entry of a table of one."""

    link: int = 0
    key: int = 0
    value: int = 0
    ref: int = atomic(default=0)


@kernel_struct
class Table(Struct):
    """One published pointer."""

    slot: Any = None
    turn: int = 0
    cache: Any = None


def insert(table: Table, key: int) -> None:
    """Initialise everything, the reference count last; then publish."""
    node = kmem_cache_alloc(table.cache)
    WRITE_ONCE(node, "key", key)  # readers look at it without a reference
    node.value = key * 100
    refcount_set_release(node, "ref", 1)
    rcu_assign_pointer(table, "slot", node)


def put(table: Table, node: Node) -> None:
    if refcount_dec_and_test(node, "ref"):
        kmem_cache_free(table.cache, node)


def remove(table: Table) -> None:
    node = table.slot
    rcu_assign_pointer(table, "slot", None)
    put(table, node)


def lookup(table: Table, key: int, *, revalidate: bool, pause: bool = False) -> Node | None:
    """The node of `key` with a reference, or None. `pause`: let the writer run in the worst place."""
    rcu_read_lock()
    node = rcu_dereference(table, "slot")
    if node is not None and READ_ONCE(node, "key") != key:
        node = None
    if pause:
        WRITE_ONCE(table, "turn", 1)
        smp_cond_load_acquire(table, "turn", is_two)
    if node is not None and not refcount_inc_not_zero_acquire(node, "ref"):
        node = None
    rcu_read_unlock()
    if revalidate and node is not None and READ_ONCE(node, "key") != key:
        put(table, node)
        return None
    return node  # type: ignore[no-any-return]


def is_one(turn: int) -> bool:
    return turn == 1


def is_two(turn: int) -> bool:
    return turn == 2


def setup() -> Table:
    boot()
    cache = kmem_cache_create("nodes", Node, typesafe_by_rcu=True, freeptr_fields=("link",))
    table = Table(cache=cache)
    insert(table, 1)
    return table


def replace(table: Table) -> None:
    remove(table)
    insert(table, 2)
    remove(table)
    insert(table, 1)


def replace_in_the_pause(table: Table) -> None:
    smp_cond_load_acquire(table, "turn", is_one)
    remove(table)
    insert(table, 2)
    smp_store_release(table, "turn", 2)


def reader(table: Table, *, revalidate: bool, pause: bool) -> None:
    node = lookup(table, 1, revalidate=revalidate, pause=pause)
    if node is not None:
        assert (node.key, node.value) == (1, 100), "wrong node"
        put(table, node)


def reader_with_recipe(table: Table) -> None:
    for _ in range(2):
        reader(table, revalidate=True, pause=False)


def paused_reader_with_recipe(table: Table) -> None:
    reader(table, revalidate=True, pause=True)


def paused_reader_without_recheck(table: Table) -> None:
    reader(table, revalidate=False, pause=True)


def final(table: Table) -> None:
    table.cache.check_invariants()
    assert table.cache.statistics().live == 1


def test_reader_that_checks_again_never_sees_another_node() -> None:
    """Inc-not-zero and a second look at the key are enough, whatever is reused meanwhile."""
    reuses = 0
    for seed in SEEDS:
        table = CoopEngine(seed).run(setup, [reader_with_recipe, replace], final)
        reuses += table.cache.statistics().reuses
    assert reuses > len(SEEDS)


def test_reader_that_checks_again_backs_out_of_a_reused_object() -> None:
    """The worst case on purpose: the object is freed and reused between the first look and the reference."""
    for seed in range(5):
        table = CoopEngine(seed).run(setup, [paused_reader_with_recipe, replace_in_the_pause], final)
        assert table.slot.key == 2


def test_reader_without_the_second_look_is_caught() -> None:
    """Broken twin of the worst case."""
    with pytest.raises(AssertionError, match="wrong node"):
        CoopEngine(0).run(setup, [paused_reader_without_recheck, replace_in_the_pause], final)


# ------------------------------------------------------------------------------------------------ whole slabs


def setup_small() -> Table:
    """Every free empties a slab, and every empty slab goes back."""
    boot()
    with slab_options(objects_per_slab=1, sheaf_capacity=0, min_partial=0, spare_slabs=2):
        cache = kmem_cache_create("nodes", Node, typesafe_by_rcu=True, freeptr_fields=("link",))
    table = Table(cache=cache)
    insert(table, 1)
    return table


def patient_reader(table: Table) -> None:
    rcu_read_lock()
    node = rcu_dereference(table, "slot")
    if node is not None:
        for _ in range(6):
            assert node.key in (1, 2)  # comparing POISON raises UseAfterFree
    rcu_read_unlock()


def remove_and_wait(table: Table) -> None:
    remove(table)
    synchronize_rcu()


def read_while_removed() -> None:
    for seed in SEEDS:
        CoopEngine(seed).run(setup_small, [patient_reader, remove_and_wait])


def test_slab_stays_until_readers_have_left() -> None:
    """P3: no reader inside rcu_read_lock meets poison."""
    read_while_removed()


def test_slab_given_back_without_grace_period_is_caught() -> None:
    """Broken twin: with the guard removed a reader meets poison."""
    with guards.without("typesafe-slab-grace-period"), pytest.raises(KernelBug):
        read_while_removed()


def test_slab_is_poisoned_after_the_grace_period() -> None:
    """A reader that kept its pointer too long is loud."""
    table = setup_small()
    node = table.slot
    remove(table)
    rcu_barrier()

    assert node.key is POISON
    assert table.cache.statistics().waiting_for_grace_period == 0


# ------------------------------------------------------------------------------------------------ explored


def reader_once(table: Table) -> None:
    reader(table, revalidate=True, pause=False)


def reader_once_without_recheck(table: Table) -> None:
    reader(table, revalidate=False, pause=False)


def replace_once(table: Table) -> None:
    remove(table)
    insert(table, 2)


@pytest.mark.explore
@pytest.mark.parametrize(
    ("body", "verdict"), [(reader_once, Verdict.PASS), (reader_once_without_recheck, Verdict.FAIL)]
)
def test_every_interleaving_of_reader_and_reuse(body: Any, verdict: Verdict) -> None:
    """The recipe under the kernel's memory model, exhausted; its broken twin is found."""
    assert explore(setup, body, replace_once, final=final, memory="lkmm").verdict is verdict
