"""The ledgers: who was allocated, who was freed, who is left.

Models:      mm/slub.c slab_debug=FU, /proc/slabinfo, the "Objects remaining" report of kmem_cache_destroy
             (7.2)
Guards:      a count takes every lock of the cache, so it is exact at any time
Invariants:  A1 allocs == frees + live
Leaves out:  a walk through memory for references (kmemleak)
Read next:   nothing
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs

from kmodel.slab.kmem_cache import KmemCache
from kmodel.slab.slab_common import all_caches


@attrs.frozen
class SlabStatistics:
    """A cache's counters at one instant. `live` is counted from the slabs, not from the other two."""

    name: str
    allocs: int
    frees: int
    live: int
    reuses: int
    slabs: int
    discarded: int
    waiting_for_grace_period: int


@attrs.frozen
class Leak:
    """An object that is allocated now."""

    cache: str
    obj: Any
    life: int
    allocated_at: str | None


@contextmanager
def _all_locks(cache: KmemCache) -> Iterator[None]:
    while True:
        with ExitStack() as held:
            cpus = dict(cache.cpus)
            for _number, cpu in sorted(cpus.items()):
                held.enter_context(cpu._k_lock)
            held.enter_context(cache._k_lock)
            if len(cpus) == len(cache.cpus):  # a CPU that came meanwhile has a sheaf we have not locked
                yield
                return


def _live(cache: KmemCache) -> list[Any]:
    free = {id(obj) for cpu in cache.cpus.values() for obj in cpu.sheaf}
    free |= {id(obj) for slab in cache.slabs for obj in slab.freelist}
    return [obj for slab in cache.slabs for obj in slab.objects[: slab.born] if id(obj) not in free]


def statistics(cache: KmemCache) -> SlabStatistics:
    """The cache's counters, consistent with each other."""
    with _all_locks(cache):
        cpus = cache.cpus.values()
        return SlabStatistics(
            name=cache.name,
            allocs=sum(cpu.allocs for cpu in cpus),
            frees=sum(cpu.frees for cpu in cpus),
            live=len(_live(cache)),
            reuses=sum(cpu.reuses for cpu in cpus),
            slabs=len(cache.slabs),
            discarded=cache.nr_discarded,
            waiting_for_grace_period=len(cache.limbo),
        )


def check_invariants(cache: KmemCache) -> None:
    """A1, P1 and P2."""
    stats = statistics(cache)
    assert stats.allocs == stats.frees + stats.live, f"A1: {stats}"
    with _all_locks(cache):
        in_sheaves = [obj for cpu in cache.cpus.values() for obj in cpu.sheaf]
        in_slabs = [obj for slab in cache.slabs for obj in slab.freelist]
        free = [id(obj) for obj in in_sheaves + in_slabs]
        assert len(free) == len(set(free)), f"P2: {cache.name}: an object is free twice"
        for slab in cache.slabs:
            out = slab.born - len(slab.freelist)
            assert slab.inuse == out, f"P1: {cache.name}: inuse {slab.inuse}, but {out} objects are out"
            assert bool(slab.freelist) == (slab in cache.partial), f"P1: {cache.name}: partial list is wrong"
        empty = sum(slab.inuse == 0 for slab in cache.slabs)
        assert cache.nr_empty == empty, f"P1: {cache.name}: nr_empty {cache.nr_empty}, counted {empty}"


def live_objects(cache: KmemCache) -> list[Any]:
    """The objects that are allocated now, in address order."""
    with _all_locks(cache):
        return _live(cache)


def leaks(*, ignore: tuple[str, ...] = ()) -> list[Leak]:
    """Every object allocated now, of every cache not in `ignore`."""
    return [
        Leak(cache.name, obj, obj._k_gen >> 1, None if cache.users is None else cache.users.get(obj))
        for cache in all_caches()
        if cache.name not in ignore
        for obj in live_objects(cache)
    ]


def leak_report(*, ignore: tuple[str, ...] = ()) -> str:
    """One line per object that is still allocated; the empty string when nothing leaked."""
    return "\n".join(
        f"{leak.cache}: {leak.obj!r} (life {leak.life}) not freed"
        + (f", allocated at {leak.allocated_at}" if leak.allocated_at else "")
        for leak in leaks(ignore=ignore)
    )
