"""struct slab: one page's worth of objects of one cache.

Models:      mm/slab.h struct slab; mm/slub.c new_slab, __slab_free, discard_slab, rcu_free_slab (7.2)
Guards:      the cache's list_lock (the lock of the KmemCache object)
Invariants:  P1 inuse == objects handed to CPUs or users, P2 an object is in at most one free list,
             P3 the memory of a type-safe cache's slab is poisoned only a grace period after the slab was
             given back
Leaves out:  the frozen bit, cmpxchg of (freelist, counters): the lock stands for it
Read next:   slab/kmem_cache.py

The Python objects of pooled classes are never freed (core/struct.py), so slabs are used again: within one
boot as pages that come back from the page allocator, at the next boot as memory nobody has seen before.
"""

from typing import Any

from kmodel.core import Pooled, engine, guards, kernel_struct, untraced
from kmodel.core import access as core_access
from kmodel.core.engine import announce
from kmodel.rcu import call_rcu
from kmodel.slab.contents import build_unseen, poison_contents, zero, zero_unseen

TYPESAFE_GRACE_PERIOD = guards.register(
    "typesafe-slab-grace-period",
    "H11/H13: the slab of a SLAB_TYPESAFE_BY_RCU cache is given back only after an RCU grace period; "
    "without it a reader inside rcu_read_lock() meets memory that is no object any more",
)


@kernel_struct
class Slab(Pooled):
    """One slab. Objects are built when first handed out."""

    cache: Any = untraced(default=None)
    objects: list[Any] = untraced(factory=list)  # all that ever were on this slab, in address order
    born: int = untraced(default=0)  # how many of them exist in this life of the slab
    inuse: int = untraced(default=0)
    freelist: list[Any] = untraced(factory=list)
    seen: int = untraced(default=0)  # how many of them existed at any time since boot
    life: int = untraced(default=0)

    def kfree(self, obj: Any) -> None:
        """What core's kfree() calls: the object goes back to this slab's cache."""
        from kmodel.slab.kmem_cache import kmem_cache_free

        kmem_cache_free(self.cache, obj)


_pool: dict[tuple[type[Any], int], list[Slab]] = {}


def new_slab(cache: Any) -> Slab:
    """A slab for the cache: the longest given back, one of an earlier boot, or a new one. list_lock held."""
    if len(cache.spare) > cache.spare_slabs:
        slab = cache.spare.popleft()
    else:
        pool = _pool.get((cache.object_class, cache.objects_per_slab))
        slab = pool.pop() if pool else build_unseen(Slab)
    slab.cache = cache
    cache.slabs[slab] = None
    return slab  # type: ignore[no-any-return]


def next_object(slab: Slab) -> tuple[Any, bool]:
    """The next object that was not handed out in this life of the slab; list_lock held.

    The flag says that it holds poison, which setup_object() must remove once the lock is dropped.
    """
    if slab.born and slab.inuse == 0:
        slab.cache.nr_empty -= 1
    poisoned = slab.born < slab.seen
    if slab.born < len(slab.objects):
        obj = slab.objects[slab.born]
        if not poisoned:  # left over from another boot
            zero_unseen(obj)
            obj._k_gen, obj._k_id = 0, None
            announce(obj)
    else:
        obj = slab.cache.object_class()
        obj._k_slab = slab
        slab.objects.append(obj)
    slab.born += 1
    slab.seen = max(slab.seen, slab.born)
    slab.inuse += 1
    return obj, poisoned


def setup_object(cache: Any, obj: Any, poisoned: bool) -> None:
    """Make an object of a slab that was just allocated presentable: no poison, then the constructor."""
    if poisoned:
        zero(obj, readers=False)
    if cache.ctor is not None:
        cache.ctor(obj)


def put_object(slab: Slab, obj: Any) -> bool:
    """An object comes back to its slab; whether the slab is to be given back. list_lock held."""
    cache = slab.cache
    slab.freelist.append(obj)
    slab.inuse -= 1
    cache.partial[slab] = None
    if slab.inuse:
        return False
    cache.nr_empty += 1
    if cache.nr_empty <= cache.min_partial:
        return False
    unlink_slab(slab)
    return True


def unlink_slab(slab: Slab) -> None:
    """Take a wholly free slab out of its cache's lists; list_lock held."""
    cache = slab.cache
    cache.nr_empty -= 1
    cache.nr_discarded += 1
    cache.partial.pop(slab, None)
    cache.slabs.pop(slab)
    cache.limbo[slab] = None
    slab.freelist.clear()
    if cache.growing is slab:
        cache.growing = None


class RcuSlab:
    """The rcu_head of a slab; it remembers which life of the slab it was queued for."""

    __slots__ = ("life", "slab")

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.life = slab.life


def discard_slab(slab: Slab) -> None:
    """Give an unlinked slab back: at once, or for a type-safe cache after a grace period."""
    head = RcuSlab(slab)
    if slab.cache.typesafe_by_rcu and TYPESAFE_GRACE_PERIOD not in guards.removed:
        call_rcu(head, rcu_free_slab)
    else:
        rcu_free_slab(head)


def rcu_free_slab(head: RcuSlab) -> None:
    """The memory is no longer this cache's: whoever still looks at its objects meets poison."""
    slab = head.slab
    if slab.life != head.life:  # a boot() came between
        return
    cache = slab.cache
    for obj in slab.objects[: slab.born]:
        if cache.typesafe_by_rcu and core_access._tracer is not None:
            engine().freed(obj)  # objects of other caches were reported when they were freed
        poison_contents(obj)
    with cache._k_lock:
        cache.limbo.pop(slab, None)
        slab.born = 0
        cache.spare.append(slab)


def retire_slabs(cache: Any) -> None:
    """Boot, or the end of the cache: all its slabs become memory that nobody has seen. Nothing may run."""
    pool = _pool.setdefault((cache.object_class, cache.objects_per_slab), [])
    for slab in (*cache.slabs, *cache.limbo, *cache.spare):
        slab.cache = None
        slab.life += 1
        slab.born = slab.seen = slab.inuse = 0
        slab.freelist.clear()
        pool.append(slab)
