"""What an allocator writes into the objects it manages: zeroes, poison, the free pointer.

Models:      mm/slub.c, memset at allocation, set_freepointer, init_object / POISON_FREE (7.2)
Guards:      whoever allocates or frees the object owns it; readers of a type-safe cache may look on
Invariants:  C1 zeroing gives every field the value its class declares, embedded structs included and in place
Leaves out:  red zones, poison of the bytes between fields
Read next:   slab/kmem_cache.py

A memset is a series of stores that a traced engine sees, because a reader of a type-safe cache may meet it
half done. Poison is not: it is the model's own way to make a use of freed memory loud.
"""

from collections.abc import Callable
from typing import Any

import attrs

from kmodel.core import POISON, WRITE_ONCE
from kmodel.core import access as core_access


@attrs.frozen(eq=False)
class Layout:
    """The fields of one kernel_struct class, sorted by how they are zeroed."""

    names: tuple[tuple[str, Any], ...]  # every watched field, with its default: a value or an attrs.Factory
    setters: tuple[Callable[[Any, Any], None], ...]  # their slots
    constants: tuple[tuple[Callable[[Any, Any], None], Any], ...]  # the slots of those with a value
    recipes: tuple[tuple[Callable[[Any, Any], None], Callable[[], Any]], ...]  # and of those with a factory
    unwatched: tuple[tuple[str, Any], ...]
    embedded: tuple[str, ...]
    has_atomics: bool


_layouts: dict[type[Any], Layout] = {}


def layout_of(cls: type[Any]) -> Layout:
    """The layout of a kernel_struct class (computed once)."""
    known = _layouts.get(cls)
    if known is not None:
        return known
    slots = cls.__k_slots__
    fields = [f for f in attrs.fields(cls) if f.name not in cls.__k_embedded__]
    values: dict[str, Any] = {f.name: None if f.default is attrs.NOTHING else f.default for f in fields}
    watched = [(name, value) for name, value in values.items() if name in slots]
    layout = Layout(
        names=tuple(watched),
        setters=tuple(slots[name].__set__ for name, _ in watched),
        constants=tuple((slots[name].__set__, value) for name, value in watched if not _is_recipe(value)),
        recipes=tuple((slots[name].__set__, value.factory) for name, value in watched if _is_recipe(value)),
        unwatched=tuple((name, value) for name, value in values.items() if name not in slots),
        embedded=cls.__k_embedded__,
        has_atomics=bool(cls.__k_atomic__),
    )
    _layouts[cls] = layout
    return layout


def _is_recipe(value: Any) -> bool:
    return isinstance(value, attrs.Factory)  # type: ignore[arg-type]


def _fresh(value: Any) -> Any:
    return value.factory() if _is_recipe(value) else value


def _zero_slots(obj: Any, layout: Layout) -> None:
    for setter, value in layout.constants:
        setter(obj, value)
    for setter, factory in layout.recipes:
        setter(obj, factory())


def zero_unseen(obj: Any) -> None:
    """Give every field its declared value without any engine seeing it: the object is new memory."""
    layout = layout_of(type(obj))
    _zero_slots(obj, layout)
    for name, value in layout.unwatched:
        setattr(obj, name, _fresh(value))
    for name in layout.embedded:
        zero_unseen(getattr(obj, name))


def build_unseen(cls: type[Any]) -> Any:
    """An object of the allocator's own, which no engine names: whether it had to be built depends on
    earlier boots.
    """
    tracer, core_access._tracer = core_access._tracer, None
    try:
        return cls()
    finally:
        core_access._tracer = tracer


def zero(obj: Any, *, readers: bool) -> None:
    """memset(obj, 0): give every field its declared value. `readers`: lockless ones may look on (type-safe
    caches).
    """
    layout = layout_of(type(obj))
    if core_access._tracer is None:
        if layout.has_atomics:
            with obj._k_lock:  # a spurious reference taken by a late reader is a read-modify-write
                _zero_slots(obj, layout)
        else:
            _zero_slots(obj, layout)
    else:
        store = WRITE_ONCE if readers else setattr
        for name, value in layout.names:
            store(obj, name, _fresh(value))
    for name, value in layout.unwatched:
        setattr(obj, name, _fresh(value))
    for name in layout.embedded:
        zero(getattr(obj, name), readers=readers)


def poison_contents(obj: Any) -> None:
    """Fill every watched field with POISON, embedded structs included."""
    layout = layout_of(type(obj))
    for setter in layout.setters:
        setter(obj, POISON)
    for name in layout.embedded:
        poison_contents(getattr(obj, name))


FREEPTR = 0x5A5A_A5A5_5A5A_A000
"""What a freed object's free pointer reads as: a number like any other, which nothing marks as garbage."""


def set_freepointer(obj: Any, fields: tuple[str, ...], value: Any) -> None:
    """The free list's link overwrites the fields it shares memory with; a reader may see it happen."""
    if core_access._tracer is None:
        for name in fields:
            setattr(obj, name, value)
    else:
        for name in fields:
            WRITE_ONCE(obj, name, value)
