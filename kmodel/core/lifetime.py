"""Freed memory is loud: poison, generations and kfree().

Models:      mm/slub.c poisoning (SLAB_POISON), kfree (7.2)
Guards:      whoever frees an object owns it
Invariants:  F1 an object is freed once per allocation, F2 a freed object's fields are POISON until it is
             allocated again
Leaves out:  pages and their contents; slab/ has the caches
Read next:   slab/kmem_cache.py
"""

from typing import Any

from kmodel.core.engine import engine
from kmodel.core.report import KernelBug, UseAfterFree
from kmodel.core.struct import KernelObject, raw_set


class _Poison:
    """What every field of a freed object holds; any use but copying it raises UseAfterFree."""

    __slots__ = ()

    def _fault(self, *_args: Any, **_kwargs: Any) -> Any:
        raise UseAfterFree("a field of a freed object was used")

    def __repr__(self) -> str:
        return "POISON"

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __index__ = __int__ = __len__ = (
        __iter__
    ) = _fault
    __add__ = __radd__ = __sub__ = __rsub__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = (
        _fault
    )
    __lshift__ = __rshift__ = __mul__ = __rmul__ = __neg__ = __invert__ = __call__ = __getitem__ = (
        __contains__
    ) = _fault
    __hash__ = _fault

    def __getattr__(self, name: str) -> Any:
        raise UseAfterFree(f"field {name!r} reached through a pointer that was read from a freed object")


POISON: Any = _Poison()


def is_freed(obj: KernelObject) -> bool:
    """Whether the object is with its allocator now."""
    return bool(obj._k_gen & 1)


def generation(obj: KernelObject) -> int:
    """How many times the object was freed; a reader that sees it change held a pointer into another life of
    the object."""
    return (obj._k_gen + 1) >> 1


def mark_freed(obj: KernelObject) -> None:
    """Count a free; KernelBug if the object is free already. Contents stay (type-safe caches)."""
    if obj._k_gen & 1:
        raise KernelBug(f"double free of {obj!r}")
    obj._k_gen += 1
    engine().freed(obj)


def mark_allocated(obj: KernelObject) -> None:
    """Count an allocation of an object that was freed before, or is new (generation 0)."""
    if obj._k_gen & 1:
        obj._k_gen += 1
    engine().allocated(obj)


def poison(obj: KernelObject) -> None:
    """Overwrite every watched field with POISON."""
    for name in type(obj).__k_slots__:
        raw_set(obj, name, POISON)


def kfree(obj: KernelObject | None) -> None:
    """Give an object back to the slab it came from; one that came from none is counted and poisoned.

    Freeing twice is a KernelBug; kfree(NULL) does nothing.
    """
    if obj is None:
        return
    if obj._k_slab is not None:
        obj._k_slab.kfree(obj)
        return
    mark_freed(obj)
    poison(obj)
