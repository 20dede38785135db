"""How large slabs and their lists are, and the knobs that make rare things common.

Models:      mm/slub.c, slub_min_objects, sheaf_capacity, slab_debug=U on the kernel command line (7.2)
Guards:      `options` is replaced, never mutated; a cache reads it when it is created
Invariants:  none
Leaves out:  orders of pages, NUMA
Read next:   slab/kmem_cache.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs


@attrs.frozen
class SlabOptions:
    """Defaults for caches created from now on."""

    objects_per_slab: int = 16
    sheaf_capacity: int = 32
    """How many freed objects a CPU keeps for itself; 0 gives every one back to its slab at once."""
    min_partial: int = 2
    """How many wholly free slabs a cache keeps before it gives them back."""
    quarantine: int = 32
    """In caches that are not type-safe, how many later frees (per CPU) pass before an object is handed out
    again.
    """
    spare_slabs: int = 2
    """How many given-back slabs stay poisoned and unused before the oldest is used again."""
    store_user: bool = False
    """Remember where each live object was allocated (slab_debug=U)."""


options = SlabOptions()


@contextmanager
def slab_options(**changes: Any) -> Iterator[SlabOptions]:
    """Create caches, or boot(), inside the block with other options: `slab_options(objects_per_slab=4)`
    for stress.
    """
    global options
    before = options
    options = attrs.evolve(before, **changes)
    try:
        yield options
    finally:
        options = before
