"""kmem_cache: an allocator of objects of one struct, with SLAB_TYPESAFE_BY_RCU.

Models:      include/linux/slab.h, mm/slub.c: kmem_cache_alloc/free/shrink, per-CPU sheaves
             (7.2)
Guards:      a CPU's sheaf: its local lock; slabs and their free lists: list_lock, taken inside the local lock
Invariants:  A1 allocs == frees + live objects, A2 an object is freed once per allocation and to its own
             cache, A3 the free object that was freed last on this CPU is handed out first (type-safe caches),
             A4 in other caches a freed object stays poisoned until `quarantine` later frees
Leaves out:  barns and NUMA nodes, kmalloc size classes, memcg accounting, bulk interfaces
Read next:   slab/slab_common.py, slab/slab.py, then fs/file.py for the recipe that readers of a type-safe
             cache follow

SLAB_TYPESAFE_BY_RCU in one paragraph: a freed object may be somebody else's at once. Only the slab it lies
on waits for a grace period. So a reader inside rcu_read_lock() always looks at an object of this type, but
perhaps not at the one it meant; it takes a reference that a free object refuses, and then looks again
whether it is still the one.

Under a traced engine all CPUs share one sheaf, so that an object freed by one task can be reused by any
other, and each allocation or free of a type-safe object is one event on the cache's `nr_free`. Other
caches never reuse an object there: every use after free meets a freed object, in every execution.
"""

import sys
from collections import deque
from typing import TYPE_CHECKING, Any

from kmodel.core import (
    NO_STORE,
    KernelBug,
    Pooled,
    Struct,
    atomic,
    current,
    engine,
    kernel_struct,
    rmw,
    untraced,
)
from kmodel.core import access as core_access
from kmodel.slab import failslab
from kmodel.slab.contents import FREEPTR, build_unseen, poison_contents, set_freepointer, zero
from kmodel.slab.slab import (
    Slab,
    discard_slab,
    new_slab,
    next_object,
    put_object,
    setup_object,
    unlink_slab,
)

if TYPE_CHECKING:
    from kmodel.slab.leaks import SlabStatistics


@kernel_struct
class KmemCacheCpu(Struct):
    """One CPU's objects of a cache; its lock (a local_lock, so never contended for long) is the struct's
    own.
    """

    local_lock: int = atomic(default=0)
    sheaf: deque[Any] = untraced(factory=deque)
    allocs: int = untraced(default=0)
    frees: int = untraced(default=0)
    reuses: int = untraced(default=0)


@kernel_struct
class KmemCache(Pooled):
    """An allocator of objects of one class."""

    # The one word a traced engine sees: objects free now. A hint (a slab given back is not subtracted).
    nr_free: int = atomic(default=0)

    # constant after kmem_cache_create
    name: str = untraced(default="")
    object_class: Any = untraced(default=None)
    typesafe_by_rcu: bool = untraced(default=False)
    freeptr_fields: tuple[str, ...] = untraced(default=())
    freeptr: Any = untraced(default=FREEPTR)
    ctor: Any = untraced(default=None)
    objects_per_slab: int = untraced(default=16)
    sheaf_capacity: int = untraced(default=32)
    sheaf_floor: int = untraced(default=0)  # the quarantine: objects of the sheaf that may not be handed out
    sheaf_limit: int = untraced(default=32)
    min_partial: int = untraced(default=2)
    spare_slabs: int = untraced(default=2)

    # list_lock
    slabs: dict[Slab, None] = untraced(factory=dict)
    partial: dict[Slab, None] = untraced(factory=dict)
    limbo: dict[Slab, None] = untraced(factory=dict)  # waiting for a grace period
    spare: deque[Slab] = untraced(factory=deque)
    growing: Slab | None = untraced(default=None)
    nr_empty: int = untraced(default=0)
    nr_discarded: int = untraced(default=0)
    cpus: dict[int, KmemCacheCpu] = untraced(factory=dict)

    users: dict[Any, str] | None = untraced(default=None)  # where live objects were allocated, if asked for

    def __repr__(self) -> str:
        return f"<kmem_cache {self.name}>"

    def statistics(self) -> "SlabStatistics":
        """Counters that are consistent with each other."""
        from kmodel.slab.leaks import statistics

        return statistics(self)

    def check_invariants(self) -> None:
        """A1, P1 and P2, at any time."""
        from kmodel.slab.leaks import check_invariants

        check_invariants(self)


# CPU number of the sheaf that all tasks of a traced engine share.
_TRACED_CPU = -1


def this_cpu_slab(cache: KmemCache) -> KmemCacheCpu:
    """The calling CPU's part of the cache."""
    if core_access._tracer is not None:
        return cache.cpus.get(_TRACED_CPU) or _new_cpu(cache, _TRACED_CPU)
    task = current()
    try:
        return task.percpu[cache]  # type: ignore[no-any-return]
    except KeyError:
        mine = task.percpu[cache] = cache.cpus.get(task.cpu) or _new_cpu(cache, task.cpu)
        return mine


def _new_cpu(cache: KmemCache, number: int) -> KmemCacheCpu:
    with cache._k_lock:
        return cache.cpus.setdefault(number, build_unseen(KmemCacheCpu))


# ------------------------------------------------------------------------------------------------ allocation


def _take_one(nr_free: int) -> Any:
    return nr_free - 1 if nr_free > 0 else NO_STORE


def _give_one(nr_free: int) -> int:
    return nr_free + 1


def kmem_cache_alloc(cache: KmemCache) -> Any:
    """An object, or None when memory is out (fault injection).

    Its contents are whatever the last user left: in a type-safe cache the old values (H36), elsewhere
    POISON, except that a cache with a constructor finds the object as the constructor or its last user
    left it.
    """
    if failslab.attr is not None and failslab.should_failslab(cache.name):
        return None
    grow = core_access._tracer is not None and (
        not cache.typesafe_by_rcu or rmw(cache, "nr_free", _take_one, "acquire") == 0
    )
    cpu = this_cpu_slab(cache)
    poisoned = None
    with cpu._k_lock:
        sheaf = cpu.sheaf
        cpu.allocs += 1
        if len(sheaf) > cache.sheaf_floor and not grow:
            obj = sheaf.pop() if cache.typesafe_by_rcu else sheaf.popleft()
            cpu.reuses += 1
        else:
            obj, poisoned = _refill(cache, cpu, grow)
    if poisoned is not None:
        setup_object(cache, obj, poisoned)
    if obj._k_gen & 1:
        obj._k_gen += 1
    if core_access._tracer is not None:
        engine().allocated(obj)
    if cache.users is not None:
        cache.users[obj] = _call_site()
    return obj


def _refill(cache: KmemCache, cpu: KmemCacheCpu, grow: bool) -> tuple[Any, bool | None]:
    """An object for a CPU that has none: from a partial slab, else one that never was. Local lock held.

    The second value is None for an object that had an earlier user, else whether its memory must be
    cleared of poison.
    """
    with cache._k_lock:
        if cache.partial and not grow:
            slab = next(reversed(cache.partial))
            if slab.inuse == 0:
                cache.nr_empty -= 1
            # A type-safe CPU takes all there is, so that the next allocations need no list_lock.
            count = len(slab.freelist) if cache.typesafe_by_rcu and cache.sheaf_capacity else 1
            slab.inuse += count
            obj = slab.freelist.pop()
            for _ in range(count - 1):
                cpu.sheaf.appendleft(slab.freelist.pop())
            if not slab.freelist:
                del cache.partial[slab]
            cpu.reuses += 1
            return obj, None
        if cache.growing is None or cache.growing.born >= cache.objects_per_slab:
            cache.growing = new_slab(cache)
        return next_object(cache.growing)


def kmem_cache_zalloc(cache: KmemCache) -> Any:
    """kmem_cache_alloc, then every field zeroed, one store after the other, before anybody else may know
    the object.

    "Before anybody else may know" does not hold in a type-safe cache: a reader of the object's last life
    can watch.
    """
    obj = kmem_cache_alloc(cache)
    if obj is not None and generation_of(obj):  # memory that is new reads as zero already
        zero(obj, readers=cache.typesafe_by_rcu)
    return obj


def generation_of(obj: Any) -> int:
    """How many lives the object had before this one."""
    return int(obj._k_gen) >> 1


def _call_site() -> str:
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and "/kmodel/slab/" in frame.f_code.co_filename:
        frame = frame.f_back
    where = frame.f_code.co_filename.rpartition("/kmodel/")[2].rpartition("/tests/")[2]
    return f"{where}:{frame.f_lineno} {frame.f_code.co_name} by {current()!r}"


# ------------------------------------------------------------------------------------------------ free


def kmem_cache_free(cache: KmemCache, obj: Any) -> None:
    """The object is free: type-safe, it may be another's at once and keeps its contents but for the free
    pointer; else
    it is poisoned."""
    slab = obj._k_slab
    if slab is None or slab.cache is not cache:
        owner = "no cache" if slab is None else repr(slab.cache)
        raise KernelBug(f"{obj!r} is freed to {cache!r}, but belongs to {owner}")
    if obj._k_gen & 1:
        raise KernelBug(f"double free of {obj!r} to {cache!r}")
    if getattr(obj, "__dict__", None):
        raise KernelBug(f"{obj!r} has fields it does not declare: {sorted(obj.__dict__)}")
    if cache.users is not None:
        cache.users.pop(obj, None)
    traced = core_access._tracer is not None
    if cache.typesafe_by_rcu:
        set_freepointer(obj, cache.freeptr_fields, cache.freeptr)
        obj._k_gen += 1
    else:
        obj._k_gen += 1
        if traced:
            engine().freed(obj)
        if cache.ctor is None:  # the next user relies on what the constructor set up
            poison_contents(obj)
    if traced and cache.typesafe_by_rcu:
        rmw(cache, "nr_free", _give_one, "release")
    cpu = this_cpu_slab(cache)
    discard: list[Slab] = []
    with cpu._k_lock:
        cpu.frees += 1
        cpu.sheaf.append(obj)
        if len(cpu.sheaf) > cache.sheaf_limit and (not traced or cache.typesafe_by_rcu):
            discard = _flush(cache, cpu, cache.sheaf_floor + cache.sheaf_capacity // 2)
    for slab in discard:
        discard_slab(slab)


def _flush(cache: KmemCache, cpu: KmemCacheCpu, keep: int) -> list[Slab]:
    """Give the CPU's oldest objects back to their slabs until `keep` are left; which slabs to give back.
    Local lock held.
    """
    discard = []
    with cache._k_lock:
        while len(cpu.sheaf) > keep:
            obj = cpu.sheaf.popleft()
            if put_object(obj._k_slab, obj):
                discard.append(obj._k_slab)
    return discard


def kmem_cache_shrink(cache: KmemCache) -> None:
    """Give back every slab without an object in use (what memory pressure makes the kernel do)."""
    discard: list[Slab] = []
    for cpu in list(cache.cpus.values()):
        with cpu._k_lock:
            discard += _flush(cache, cpu, 0)
    with cache._k_lock:
        for slab in [s for s in cache.slabs if s.inuse == 0 and s.born]:
            unlink_slab(slab)
            discard.append(slab)
    for slab in discard:
        discard_slab(slab)
