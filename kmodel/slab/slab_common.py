"""Caches come and go: create, destroy, boot.

Models:      mm/slab_common.c kmem_cache_create, kmem_cache_destroy (7.2)
Guards:      the list of caches: slab_mutex
Invariants:  L1 one cache per name, L2 boot leaves no cache, and their memory to be used again
Leaves out:  aliases (two caches of one size are never merged), sysfs
Read next:   slab/slab.py
"""

from collections.abc import Callable
from typing import Any, cast

import attrs

from kmodel.core import WARN, KernelBug, Struct, atomic, initcall, kernel_struct, untraced
from kmodel.core import access as core_access
from kmodel.core.engine import announce
from kmodel.rcu import rcu_barrier
from kmodel.slab import options as slab_opts
from kmodel.slab.contents import build_unseen
from kmodel.slab.kmem_cache import KmemCache, kmem_cache_shrink
from kmodel.slab.slab import retire_slabs


@kernel_struct
class _SlabState(Struct):
    slab_mutex: int = atomic(default=0)
    caches: dict[str, KmemCache] = untraced(factory=dict)
    known: dict[str, KmemCache] = untraced(factory=dict)  # of every boot, to be used again


_state = _SlabState()


@initcall
def kmem_cache_init() -> None:
    """Boot: there are no caches; the memory of the last boot's is new again."""
    for cache in _state.caches.values():
        retire_slabs(cache)
    _state.caches.clear()


def kmem_cache_create(
    name: str,
    cls: type[Any],
    *,
    typesafe_by_rcu: bool = False,
    freeptr_fields: tuple[str, ...] = (),
    ctor: Callable[[Any], None] | None = None,
    objects_per_slab: int | None = None,
    sheaf_capacity: int | None = None,
    quarantine: int | None = None,
) -> KmemCache:
    """A new cache of `cls` objects, which `cls()` must be able to build.

    `freeptr_fields`: the fields that share memory with the free pointer and hold garbage while the object
    is free. `ctor` runs once when an object's slab is allocated, not at each allocation. The rest
    overrides slab/options.py.
    """
    unknown = set(freeptr_fields) - (set(cls.__k_slots__) - set(cls.__k_atomic__))
    if unknown:
        raise TypeError(f"{name}: {cls.__name__} has no plain field {sorted(unknown)[0]!r}")
    needed = [f.name for f in attrs.fields(cls) if f.init and f.default is attrs.NOTHING]
    if needed:
        raise TypeError(f"{name}: {cls.__name__}() cannot be built, it wants a value for {needed[0]!r}")
    opts = slab_opts.options
    with _state._k_lock:
        if name in _state.caches:
            raise KernelBug(f"kmem_cache of name {name!r} already exists")
        cache = _state.known.get(name)
        if cache is None:
            cache = _state.known[name] = build_unseen(KmemCache)
        else:
            _forget(cache)
        cache.name = name
        cache.object_class = cls
        cache.typesafe_by_rcu = typesafe_by_rcu
        cache.freeptr_fields = freeptr_fields
        cache.ctor = ctor
        cache.objects_per_slab = opts.objects_per_slab if objects_per_slab is None else objects_per_slab
        cache.sheaf_capacity = opts.sheaf_capacity if sheaf_capacity is None else sheaf_capacity
        held_back = opts.quarantine if quarantine is None else quarantine
        cache.sheaf_floor = 0 if typesafe_by_rcu else held_back
        cache.sheaf_limit = cache.sheaf_floor + cache.sheaf_capacity
        cache.min_partial = opts.min_partial
        cache.spare_slabs = opts.spare_slabs
        cache.users = {} if opts.store_user else None
        _state.caches[name] = cache
    announce(cache)
    return cache


def _forget(cache: KmemCache) -> None:
    # A cache of that name existed before: the same object again, empty. Its per-CPU structs stay where tasks
    # remember them.
    tracer, core_access._tracer = core_access._tracer, None
    try:
        kept = dict(cache.cpus)
        for field in attrs.fields(cast(Any, KmemCache)):
            default = field.default
            setattr(cache, field.name, default.factory() if isinstance(default, attrs.Factory) else default)  # type: ignore[arg-type]
        for cpu in kept.values():
            cpu.sheaf.clear()
            cpu.allocs = cpu.frees = cpu.reuses = 0
        cache.cpus = kept
        cache._k_id = None
    finally:
        core_access._tracer = tracer


def kmem_cache_destroy(cache: KmemCache) -> bool:
    """The end of a cache; False, with a warning, if objects of it are still in use."""
    kmem_cache_shrink(cache)
    if WARN(cache.slabs, f"kmem_cache_destroy {cache.name}: objects remain"):
        return False
    if cache.limbo:
        rcu_barrier()
    with _state._k_lock:
        del _state.caches[cache.name]
        retire_slabs(cache)
    return True


def all_caches() -> tuple[KmemCache, ...]:
    """Every cache there is, in the order of creation."""
    return tuple(_state.caches.values())
