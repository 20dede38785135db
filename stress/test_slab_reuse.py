"""Type-safe reuse on real threads: readers with the recipe, writers that free and reuse as fast as they can.

Run it for longer: KMODEL_STRESS_SECONDS=600 python -m pytest stress/test_slab_reuse.py
"""

import random
import time
from typing import Any

import attrs
import pytest

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    Pooled,
    Struct,
    atomic,
    boot,
    engine,
    generation,
    kernel_struct,
    kernel_warnings,
    kthread_run,
    rcu_assign_pointer,
    rcu_dereference,
)
from kmodel.rcu import rcu_barrier, rcu_read_lock, rcu_read_unlock
from kmodel.slab import kmem_cache_alloc, kmem_cache_create, kmem_cache_free, slab_options
from kmodel.sync import refcount_dec_and_test, refcount_inc_not_zero_acquire, refcount_set_release

SLOTS = 6
WRITERS = 3


@kernel_struct
class Entry(Pooled):
    """What a slot points to; value == 3 * key in every life."""

    link: int = 0
    key: int = 0
    value: int = 0
    ref: int = atomic(default=0)


@kernel_struct
class Slot(Struct):
    """A published pointer, changed by one writer."""

    entry: Any = None


@attrs.define
class Tally:
    """What a reader met."""

    found: int = 0
    refused: int = 0
    stranger: int = 0
    freed_seen: int = 0
    errors: list[str] = attrs.field(factory=list)


def put(cache: Any, entry: Entry) -> None:
    """Drop a reference; the last one frees."""
    if refcount_dec_and_test(entry, "ref"):
        kmem_cache_free(cache, entry)


def write(cache: Any, slots: list[Slot], mine: int, seed: int, deadline: float) -> None:
    """Replace entries of the own slots; what one slot lets go comes back in another."""
    choose = random.Random(seed)
    own = range(mine, SLOTS, WRITERS)
    while time.monotonic() < deadline:
        number = choose.choice(own)
        old = slots[number].entry
        publish(cache, slots[number], choose.randrange(1000) * SLOTS + number)
        put(cache, old)
        if choose.random() < 0.05:
            time.sleep(0)


def publish(cache: Any, slot: Slot, key: int) -> None:
    """A new entry: all fields, then the reference count, then the pointer."""
    entry = kmem_cache_alloc(cache)
    WRITE_ONCE(entry, "key", key)
    entry.value = 3 * key
    refcount_set_release(entry, "ref", 1)
    rcu_assign_pointer(slot, "entry", entry)


def read(cache: Any, slots: list[Slot], seed: int, deadline: float, tally: Tally) -> None:
    """Look entries up; a reference that passed the second look holds the entry in one life."""
    choose = random.Random(seed)
    while time.monotonic() < deadline:
        number = choose.randrange(SLOTS)
        rcu_read_lock()
        entry = rcu_dereference(slots[number], "entry")
        before = generation(entry)
        taken = refcount_inc_not_zero_acquire(entry, "ref")
        rcu_read_unlock()
        if not taken:
            tally.refused += 1
            continue
        if READ_ONCE(entry, "key") % SLOTS != number:
            tally.stranger += 1
            put(cache, entry)
            continue
        held = generation(entry)
        tally.freed_seen += held != before
        key = entry.key
        if entry.value != 3 * key or key % SLOTS != number:
            tally.errors.append(f"{entry!r}: key {key}, value {entry.value}, slot {number}")
        if generation(entry) != held:
            tally.errors.append(f"{entry!r} was freed while a reference was held")
        tally.found += 1
        put(cache, entry)


@pytest.mark.parametrize("objects_per_slab", [4, 1])
def test_references_hold_one_life(objects_per_slab: int, seconds: float, seed: int) -> None:
    """No reader with a checked reference sees its object change life; counts balance; the races were met."""
    boot()
    with slab_options(objects_per_slab=objects_per_slab, sheaf_capacity=2, min_partial=0, spare_slabs=2):
        cache = kmem_cache_create("entries", Entry, typesafe_by_rcu=True, freeptr_fields=("link",))
    slots = [Slot() for _ in range(SLOTS)]
    for n, slot in enumerate(slots):
        publish(cache, slot, n)
    deadline = time.monotonic() + seconds
    tallies = [Tally() for _ in range(3)]
    tasks = [kthread_run(write, cache, slots, n, seed + n, deadline, daemon=False) for n in range(WRITERS)]
    tasks += [
        kthread_run(read, cache, slots, seed + 100 + n, deadline, tally, daemon=False)
        for n, tally in enumerate(tallies)
    ]
    while time.monotonic() < deadline:
        time.sleep(0.2)
        cache.check_invariants()
    for task in tasks:
        assert engine().join(task, timeout=30)
    for slot in slots:
        put(cache, slot.entry)
    rcu_barrier()

    assert [error for tally in tallies for error in tally.errors] == []
    assert kernel_warnings() == ()
    cache.check_invariants()
    stats = cache.statistics()
    assert (stats.live, stats.waiting_for_grace_period) == (0, 0)
    print(stats, *tallies)
    assert sum(tally.found for tally in tallies) > 0
    assert sum(tally.refused + tally.stranger for tally in tallies) > 0, "no reader met a freed object"
    assert stats.reuses > 0
