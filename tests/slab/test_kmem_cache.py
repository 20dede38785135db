"""kmem_cache: what an allocation contains, who gets a freed object next, and which frees are refused."""

from typing import Any

import pytest

from kmodel.core import (
    FREE_THREADED,
    POISON,
    CoopEngine,
    KernelBug,
    Pooled,
    Struct,
    UseAfterFree,
    atomic,
    boot,
    embedded,
    generation,
    is_freed,
    kernel_struct,
    kernel_warnings,
    untraced,
)
from kmodel.slab import (
    FREEPTR,
    KmemCache,
    fail_nth,
    fail_randomly,
    kfree,
    kmalloc_cache,
    kmem_cache_alloc,
    kmem_cache_create,
    kmem_cache_destroy,
    kmem_cache_free,
    kmem_cache_shrink,
    kmem_cache_zalloc,
    kzalloc,
    slab_options,
)


@kernel_struct
class Inner(Struct):
    """A struct by value."""

    x: int = 0


@kernel_struct
class Thing(Pooled):
    """Every kind of field."""

    start: int = 0
    key: int = 7
    ref: int = atomic(default=0)
    inner: Inner = embedded(factory=Inner)
    names: list[str] = untraced(factory=list)


@kernel_struct
class Needy(Struct):
    """Not to be built without arguments."""

    must: int


def typesafe(**options: Any) -> KmemCache:
    return kmem_cache_create("things", Thing, typesafe_by_rcu=True, freeptr_fields=("start",), **options)


def plain(**options: Any) -> KmemCache:
    return kmem_cache_create("things", Thing, **options)


def test_freed_typesafe_object_is_handed_out_next() -> None:
    """Reuse is at once and last in, first out."""
    cache = typesafe()
    a, b = kmem_cache_alloc(cache), kmem_cache_alloc(cache)
    kmem_cache_free(cache, a)
    kmem_cache_free(cache, b)

    assert [kmem_cache_alloc(cache) is b, kmem_cache_alloc(cache) is a] == [True, True]


def test_freed_typesafe_object_keeps_its_contents_but_for_the_free_pointer() -> None:
    """H36: alloc gives the fields of the last life, and garbage where the free pointer was."""
    cache = typesafe()
    a = kmem_cache_alloc(cache)
    a.start, a.key, a.ref = 0x1000, 5, 3
    kmem_cache_free(cache, a)

    assert (a.start, a.key, a.ref) == (FREEPTR, 5, 3)
    again = kmem_cache_alloc(cache)
    assert (again.start, again.key, again.ref) == (FREEPTR, 5, 3)


def test_zalloc_gives_declared_values_also_inside() -> None:
    """zalloc resets every field, embedded structs in place, bookkeeping anew."""
    cache = typesafe()
    a = kmem_cache_zalloc(cache)
    inner, names = a.inner, a.names
    a.start, a.key, a.ref, a.inner.x = 1, 2, 3, 4
    names.append("old")
    kmem_cache_free(cache, a)
    again = kmem_cache_zalloc(cache)

    assert (again.start, again.key, again.ref, again.inner.x, again.names) == (0, 7, 0, 0, [])
    assert again.inner is inner


def test_freed_object_of_another_cache_is_poisoned_also_inside() -> None:
    """Use after free meets POISON."""
    cache = plain()
    a = kmem_cache_zalloc(cache)
    kmem_cache_free(cache, a)

    assert (a.start is POISON, a.inner.x is POISON, is_freed(a)) == (True, True, True)
    with pytest.raises(UseAfterFree):
        _ = a.key + 1


def test_quarantine_keeps_poison_until_that_many_frees() -> None:
    """A freed object comes back only when `quarantine` others were freed after it, oldest first."""
    cache = plain(quarantine=3)
    things = [kmem_cache_zalloc(cache) for _ in range(4)]
    for thing in things[:3]:
        kmem_cache_free(cache, thing)
    assert kmem_cache_zalloc(cache) not in things
    kmem_cache_free(cache, things[3])

    assert kmem_cache_zalloc(cache) is things[0]
    assert things[1].key is POISON


def test_generation_counts_lives() -> None:
    """Each free is a new generation, in type-safe caches too."""
    cache = typesafe()
    a = kmem_cache_alloc(cache)
    seen = []
    for _ in range(3):
        seen.append(generation(a))
        kmem_cache_free(cache, a)
        a = kmem_cache_alloc(cache)

    assert seen == [0, 1, 2]


@pytest.mark.parametrize("make", [typesafe, plain])
def test_double_free_is_a_bug(make: Any) -> None:
    """A2."""
    cache = make()
    a = kmem_cache_alloc(cache)
    kmem_cache_free(cache, a)

    with pytest.raises(KernelBug, match="double free"):
        kmem_cache_free(cache, a)


def test_free_of_a_foreign_object_is_a_bug() -> None:
    """A2: neither another cache's object nor one that came from none."""
    cache, other = typesafe(), kmem_cache_create("others", Thing)
    with pytest.raises(KernelBug, match="belongs to <kmem_cache others>"):
        kmem_cache_free(cache, kmem_cache_alloc(other))
    with pytest.raises(KernelBug, match="belongs to no cache"):
        kmem_cache_free(cache, Thing())


def test_misspelt_field_is_found_at_free() -> None:
    """Where pooled objects accept any attribute, the allocator does not; elsewhere the object refuses."""
    cache = typesafe()
    a = kmem_cache_alloc(cache)
    if not FREE_THREADED:
        with pytest.raises(AttributeError, match="satrt"):
            a.satrt = 1
        return
    a.satrt = 1
    try:
        with pytest.raises(KernelBug, match="satrt"):
            kmem_cache_free(cache, a)
    finally:
        del a.satrt


def test_constructor_runs_once_per_slab_life() -> None:
    """ctor prepares new memory, not each allocation, and its objects are not poisoned."""
    made = []

    def ctor(obj: Thing) -> None:
        made.append(obj)
        obj.key = 99

    cache = plain(ctor=ctor, quarantine=0)
    a = kmem_cache_alloc(cache)
    kmem_cache_free(cache, a)

    assert (kmem_cache_alloc(cache) is a, a.key, len(made)) == (True, 99, 1)


def test_shrink_gives_slabs_back_and_their_objects_are_poisoned() -> None:
    """A whole slab goes back, and comes back as cleared memory."""
    with slab_options(spare_slabs=0):
        cache = plain(objects_per_slab=2, quarantine=0)
    things = [kmem_cache_zalloc(cache) for _ in range(4)]
    for thing in things:
        kmem_cache_free(cache, thing)
    kmem_cache_shrink(cache)
    cache.check_invariants()
    assert (cache.statistics().slabs, cache.statistics().discarded) == (0, 2)

    again = kmem_cache_alloc(cache)
    assert (again in things, again.key) == (True, 7)


def test_full_sheaf_goes_back_to_slabs_and_comes_out_again() -> None:
    """Objects beyond a CPU's capacity return to their slabs; none is lost or doubled."""
    cache = typesafe(objects_per_slab=4, sheaf_capacity=4)
    things = [kmem_cache_alloc(cache) for _ in range(40)]
    for thing in things:
        kmem_cache_free(cache, thing)
    cache.check_invariants()
    assert cache.statistics().live == 0
    again = [kmem_cache_alloc(cache) for _ in range(40)]

    assert len(set(map(id, again))) == 40
    cache.check_invariants()


def test_boot_uses_the_same_memory_again_as_new() -> None:
    """Immortal objects are recycled between boots: no old value, generation 0."""
    cache = typesafe()
    before = [kmem_cache_alloc(cache) for _ in range(20)]
    for thing in before:
        thing.key = 1
    kmem_cache_free(cache, before[0])
    boot()
    cache = typesafe()
    after = [kmem_cache_alloc(cache) for _ in range(20)]

    assert {id(t) for t in after} & {id(t) for t in before}
    assert {(t.key, t.start, generation(t)) for t in after} == {(7, 0, 0)}
    assert cache.statistics().allocs == 20


def test_name_is_used_once() -> None:
    """Two caches of one name are a mistake until the first is destroyed."""
    cache = typesafe()
    with pytest.raises(KernelBug, match="already exists"):
        plain()
    assert kmem_cache_destroy(cache)
    assert plain().statistics().allocs == 0


def test_destroy_warns_of_objects_in_use() -> None:
    """A cache with live objects stays."""
    cache = plain()
    a = kmem_cache_alloc(cache)
    assert not kmem_cache_destroy(cache)
    assert [w.message for w in kernel_warnings()] == ["kmem_cache_destroy things: objects remain"]
    kmem_cache_free(cache, a)
    assert kmem_cache_destroy(cache)


def test_free_pointer_must_overlay_a_watched_field() -> None:
    """A typing mistake in freeptr_fields is refused."""
    with pytest.raises(TypeError, match="'strat'"):
        kmem_cache_create("x", Thing, freeptr_fields=("strat",))


def test_kzalloc_and_kfree_use_a_cache_per_class() -> None:
    """kfree finds the cache by itself; NULL is fine."""
    a = kzalloc(Thing, key=3)
    assert a is not None
    assert (a.key, a.start) == (3, 0)
    kfree(a)
    kfree(None)
    stats = kmalloc_cache(Thing).statistics()

    assert (stats.name, stats.allocs, stats.frees, stats.live) == ("kmalloc-Thing", 1, 1, 0)
    with pytest.raises(KernelBug, match="double free"):
        kfree(a)


def test_fail_nth_fails_exactly_that_allocation() -> None:
    """Fault injection by number, for one cache."""
    cache, other = typesafe(), kmem_cache_create("others", Thing)
    with fail_nth(2, cache="things") as fault:
        kmem_cache_alloc(other)
        results = [kmem_cache_alloc(cache) is None for _ in range(4)]

    assert (results, fault.failed) == ([False, True, False, False], 1)
    assert kmem_cache_alloc(cache) is not None


def test_fail_randomly_repeats_with_its_seed() -> None:
    """Fault injection by probability is a function of the seed."""
    cache = typesafe()
    runs = []
    for _ in range(2):
        with fail_randomly(0.5, seed=4):
            runs.append([kmem_cache_alloc(cache) is None for _ in range(32)])

    assert runs[0] == runs[1]
    assert {True, False} == set(runs[0])


def test_traced_runs_allocate_the_same_objects_in_the_same_order() -> None:
    """Under a traced engine equal seeds give equal traces, whatever earlier boots left in the pools."""

    def setup() -> Any:
        boot()
        return typesafe()

    def churn(cache: Any) -> None:
        for _ in range(3):
            thing = kmem_cache_zalloc(cache)
            thing.key = 1
            kmem_cache_free(cache, thing)

    traces = []
    for _ in range(3):
        coop = CoopEngine(5)
        coop.run(setup, [churn, churn])
        traces.append(coop.trace)

    assert traces[0] == traces[1] == traces[2]


def test_traced_tasks_reuse_each_others_type_safe_objects() -> None:
    """On a traced engine a freed object can be anybody's next one."""

    def setup() -> Any:
        boot()
        return typesafe(), {}

    def churn(state: Any) -> None:
        cache, owners = state
        for _ in range(4):
            thing = kmem_cache_alloc(cache)
            owners.setdefault(thing, []).append(id(churn))
            kmem_cache_free(cache, thing)

    def other(state: Any) -> None:
        cache, owners = state
        for _ in range(4):
            thing = kmem_cache_alloc(cache)
            owners.setdefault(thing, []).append(id(other))
            kmem_cache_free(cache, thing)

    shared = 0
    for seed in range(20):
        cache, owners = CoopEngine(seed).run(setup, [churn, other])
        assert cache.statistics().live == 0
        shared += any(len(set(who)) == 2 for who in owners.values())
    assert shared > 0


def test_a_class_that_needs_arguments_is_refused() -> None:
    """Objects are built without arguments, so every field needs a value."""
    with pytest.raises(TypeError, match="must"):
        kmem_cache_create("needy", Needy)
