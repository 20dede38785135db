"""kernel_struct: fields, slots, poison, addresses, shared integers."""

import gc
import sys
from typing import Any

import pytest

from kmodel.core import (
    FREE_THREADED,
    POISON,
    KernelBug,
    Pooled,
    Struct,
    UseAfterFree,
    atomic,
    embedded,
    generation,
    is_freed,
    kernel_struct,
    kfree,
    mark_allocated,
    ptr,
    raw_get,
    raw_set,
    shared_int,
    slots_are_clean,
    untraced,
    variables,
)


@kernel_struct
class Inner(Struct):
    """A struct to embed."""

    depth: int = 1


@kernel_struct
class Outer(Struct):
    """One field of each kind."""

    plain: int = 0
    counter: int = atomic(default=0)
    inner: Inner = embedded(factory=Inner)
    note: str = untraced(default="")


@kernel_struct
class Derived(Outer):
    """A struct with another one at offset zero."""

    more: int = 7


@kernel_struct
class Shared(Pooled):
    """A pooled struct."""

    value: int = 0


def test_watched_fields_are_the_plain_and_atomic_ones() -> None:
    """Only plain and atomic fields are watched; embedded structs and bookkeeping are not."""
    assert set(Outer.__k_slots__) == {"plain", "counter"}
    assert set(Derived.__k_slots__) == {"plain", "counter", "more"}
    assert set(Derived.__k_atomic__) == {"counter"}


def test_embedded_structs_belong_to_one_object() -> None:
    """Two objects do not share an embedded struct."""
    assert Outer().inner is not Outer().inner


def test_misspelt_field_of_a_struct_raises() -> None:
    """Slots refuse a field that was not declared."""
    with pytest.raises(AttributeError):
        Outer().plian = 1  # type: ignore[attr-defined]


def test_misspelt_field_of_a_pooled_struct_is_noticed() -> None:
    """A pooled struct may accept a misspelt field on 3.13t, and then says that it is not clean."""
    shared = Shared()
    assert slots_are_clean(shared)

    try:
        shared.valeu = 1  # type: ignore[attr-defined]
    except AttributeError:
        assert not FREE_THREADED
    else:
        assert not slots_are_clean(shared)


def test_structs_are_equal_only_if_identical() -> None:
    """Equality is identity, as for pointers."""
    a, b = Outer(plain=1), Outer(plain=1)

    assert a == a
    assert a != b


def test_ptr_is_a_key_and_null_is_zero() -> None:
    """Addresses differ between live objects and NULL is 0."""
    a, b = Shared(), Shared()

    assert ptr(None) == 0
    assert ptr(a) != ptr(b)
    assert ptr(a) == ptr(a)


def test_kernel_struct_needs_a_base() -> None:
    """A class that derives from neither Struct nor Pooled is refused by name."""
    with pytest.raises(TypeError, match="Loose: a kernel_struct derives from Struct or Pooled"):

        @kernel_struct
        class Loose:
            """Without a base."""

            x: int = 0


def test_raw_access_reads_and_writes_fields() -> None:
    """raw_get and raw_set reach watched and unwatched fields alike."""
    outer = Outer()
    raw_set(outer, "plain", 4)
    raw_set(outer, "note", "n")

    assert (raw_get(outer, "plain"), raw_get(outer, "note")) == (4, "n")


def test_kfree_poisons_and_counts() -> None:
    """After kfree every use of a field is loud and the generation has moved."""
    outer: Any = Outer(plain=3)
    kfree(outer)

    assert is_freed(outer)
    assert generation(outer) == 1
    assert outer.plain is POISON
    for use in (
        lambda: outer.plain + 1,
        lambda: outer.plain == 3,
        lambda: bool(outer.plain),
        lambda: outer.plain.x,
    ):
        with pytest.raises(UseAfterFree):
            use()


def test_double_free_is_a_bug() -> None:
    """Freeing twice without an allocation between is reported."""
    outer = Outer()
    kfree(outer)
    with pytest.raises(KernelBug, match="double free"):
        kfree(outer)


def test_allocation_after_free_starts_a_new_life() -> None:
    """An object that is allocated again is not freed any more, but its generation tells."""
    outer = Outer()
    kfree(outer)
    mark_allocated(outer)

    assert not is_freed(outer)
    assert generation(outer) == 1


def test_shared_int_is_the_same_number() -> None:
    """shared_int changes the object, not the value, and gives one object per value."""
    big = 0x7F0000001000
    values = [shared_int(int(str(big))) for _ in range(2)]

    assert values == [big, big]
    if FREE_THREADED:
        assert values[0] is values[1]


@pytest.mark.skipif(
    not FREE_THREADED or sys.version_info[:2] != (3, 13), reason="immortal objects are 3.13t's"
)
def test_pooled_objects_are_immortal_on_free_threaded_3_13() -> None:
    """Once a thread ran, a pooled object's reference count no longer moves (what lets readers scale)."""
    import threading

    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    shared = Shared()
    before = sys.getrefcount(shared)
    holders = [shared] * 100
    gc.collect()

    assert sys.getrefcount(shared) == before
    assert len(holders) == 100


def test_variables_are_watched_and_atomic() -> None:
    """variables() makes an ad-hoc struct whose fields allow read-modify-write."""
    v = variables(x=0, y=1)

    assert (v.x, v.y) == (0, 1)
    assert set(type(v).__k_atomic__) == {"x", "y"}
    assert type(v) is type(variables(x=5, y=5))
