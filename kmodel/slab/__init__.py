"""The slab allocator: caches, type-safe reuse, poison, ledgers, fault injection."""

from kmodel.slab.contents import FREEPTR
from kmodel.slab.failslab import FaultAttr, fail_nth, fail_randomly, should_failslab
from kmodel.slab.kmalloc import kfree, kmalloc_cache, kzalloc
from kmodel.slab.kmem_cache import (
    KmemCache,
    kmem_cache_alloc,
    kmem_cache_free,
    kmem_cache_shrink,
    kmem_cache_zalloc,
)
from kmodel.slab.leaks import Leak, SlabStatistics, leak_report, leaks, live_objects
from kmodel.slab.options import SlabOptions, slab_options
from kmodel.slab.slab_common import all_caches, kmem_cache_create, kmem_cache_destroy

__all__ = [
    "FREEPTR",
    "FaultAttr",
    "KmemCache",
    "Leak",
    "SlabOptions",
    "SlabStatistics",
    "all_caches",
    "fail_nth",
    "fail_randomly",
    "kfree",
    "kmalloc_cache",
    "kmem_cache_alloc",
    "kmem_cache_create",
    "kmem_cache_destroy",
    "kmem_cache_free",
    "kmem_cache_shrink",
    "kmem_cache_zalloc",
    "kzalloc",
    "leak_report",
    "leaks",
    "live_objects",
    "should_failslab",
    "slab_options",
]
