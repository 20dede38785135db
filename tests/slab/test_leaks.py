"""Ledgers: exact counts, also from several threads, and reports that name the object."""

import random
from typing import Any

from kmodel.core import Pooled, engine, kernel_struct, kthread_run
from kmodel.slab import (
    all_caches,
    kmem_cache_alloc,
    kmem_cache_create,
    kmem_cache_free,
    leak_report,
    leaks,
    slab_options,
)


@kernel_struct
class Item(Pooled):
    """Whose it is."""

    owner: int = 0


def test_leak_report_names_object_cache_life_and_place() -> None:
    """What is still allocated is listed with where it came from, and nothing else is."""
    with slab_options(store_user=True):
        cache = kmem_cache_create("items", Item)
    kept, freed = kmem_cache_alloc(cache), kmem_cache_alloc(cache)
    kmem_cache_free(cache, freed)
    report = leak_report()

    assert report.startswith(f"items: {kept!r} (life 0) not freed, allocated at ")
    assert "test_leak_report_names_object_cache_life_and_place" in report
    assert [(leak.cache, leak.obj) for leak in leaks()] == [("items", kept)]
    assert leak_report(ignore=("items",)) == ""
    kmem_cache_free(cache, kept)
    assert leak_report() == ""


def test_all_caches_lists_what_was_created() -> None:
    """Caches are listed in the order of creation."""
    before = all_caches()
    cache = kmem_cache_create("items", Item)

    assert all_caches() == (*before, cache)


def test_counts_balance_with_several_threads() -> None:
    """A1, P1, P2 while threads allocate here and free there; no object has two owners."""
    cache = kmem_cache_create("items", Item, typesafe_by_rcu=True, objects_per_slab=4, sheaf_capacity=4)
    handed_over: list[Any] = []

    def churn(number: int) -> None:
        mine: list[Any] = []
        choose = random.Random(number)
        for _ in range(400):
            if mine and choose.random() < 0.5:
                item = mine.pop()
                assert item.owner == number, "two owners"
                if choose.random() < 0.2:
                    handed_over.append(item)
                else:
                    kmem_cache_free(cache, item)
            elif handed_over and choose.random() < 0.5:
                try:
                    kmem_cache_free(cache, handed_over.pop())
                except IndexError:
                    continue
            else:
                item = kmem_cache_alloc(cache)
                item.owner = number
                mine.append(item)
        for item in mine:
            assert item.owner == number, "two owners"
            kmem_cache_free(cache, item)

    tasks = [kthread_run(churn, n, daemon=False) for n in range(4)]
    cache.check_invariants()
    for task in tasks:
        engine().join(task)
    for item in handed_over:
        kmem_cache_free(cache, item)
    cache.check_invariants()

    stats = cache.statistics()
    assert (stats.live, stats.allocs) == (0, stats.frees)
    assert stats.reuses > 0
