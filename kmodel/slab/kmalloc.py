"""kzalloc and kfree: one-off structs.

Models:      include/linux/slab.h kzalloc_obj, kfree (7.2)
Guards:      as any cache
Invariants:  as any cache; each class has a cache of its own, "kmalloc-<class>"
Leaves out:  size classes: a freed struct is never handed out as another type
Read next:   slab/kmem_cache.py
"""

from typing import Any

from kmodel.core import Struct, atomic, initcall, kernel_struct, kfree, untraced
from kmodel.slab.kmem_cache import KmemCache, kmem_cache_zalloc
from kmodel.slab.slab_common import all_caches, kmem_cache_create

__all__ = ["kfree", "kmalloc_cache", "kzalloc"]


@kernel_struct
class _KmallocState(Struct):
    creation: int = atomic(default=0)
    caches: dict[type[Any], KmemCache] = untraced(factory=dict)


_state = _KmallocState()


@initcall
def kmalloc_init() -> None:
    """Boot: nothing was allocated yet."""
    _state.caches.clear()


def kmalloc_cache(cls: type[Any]) -> KmemCache:
    """The cache that kzalloc(cls) uses."""
    cache = _state.caches.get(cls)
    if cache is None:
        with _state._k_lock:
            cache = _state.caches.get(cls)
            if cache is None:
                name = f"kmalloc-{cls.__name__}"
                if any(known.name == name for known in all_caches()):
                    name = f"kmalloc-{cls.__module__}.{cls.__qualname__}"
                cache = _state.caches[cls] = kmem_cache_create(name, cls)
    return cache


def kzalloc[T](cls: type[T], **values: Any) -> T | None:
    """A zeroed struct with `values` stored into it, or None when memory is out."""
    obj = kmem_cache_zalloc(kmalloc_cache(cls))
    if obj is not None:
        for name, value in values.items():
            setattr(obj, name, value)
    return obj  # type: ignore[no-any-return]
