"""Marked accesses and read-modify-write operations."""

import pytest

from kmodel.core import (
    NO_STORE,
    READ_ONCE,
    WRITE_ONCE,
    Struct,
    atomic_add_unless,
    atomic_dec_and_test,
    atomic_fetch_add,
    atomic_inc,
    atomic_inc_not_zero,
    atomic_inc_return,
    clear_bit,
    cmpxchg,
    engine,
    kernel_struct,
    kthread_run,
    rmw,
    set_bit,
    smp_cond_load_acquire,
    smp_store_release,
    test_and_clear_bit,
    test_and_set_bit,
    test_bit,
    try_cmpxchg,
    variables,
    xchg,
)


@kernel_struct
class Word(Struct):
    """A word that is not atomic."""

    value: int = 0


def test_once_accesses_move_the_value() -> None:
    """What WRITE_ONCE stores READ_ONCE loads."""
    v = variables(x=0)
    WRITE_ONCE(v, "x", 5)

    assert READ_ONCE(v, "x") == 5


def test_rmw_on_a_plain_field_is_refused() -> None:
    """A field that is not declared atomic() is refused by name."""
    with pytest.raises(TypeError, match=r"Word\.value is not declared atomic"):
        xchg(Word(), "value", 1)


def test_values_of_the_atomic_operations() -> None:
    """Each operation returns what its kernel namesake returns."""
    v = variables(x=1)

    assert xchg(v, "x", 4) == 1
    assert cmpxchg(v, "x", 3, 9) == 4
    assert cmpxchg(v, "x", 4, 2) == 4
    assert try_cmpxchg(v, "x", 7, 8) == (False, 2)
    assert try_cmpxchg(v, "x", 2, 0) == (True, 2)
    assert not atomic_inc_not_zero(v, "x")
    assert atomic_inc_return(v, "x") == 1
    assert atomic_inc_not_zero(v, "x")
    assert not atomic_add_unless(v, "x", 1, 2)
    assert atomic_fetch_add(v, "x", -1) == 2
    assert atomic_dec_and_test(v, "x")
    assert v.x == 0


def test_no_store_leaves_the_value() -> None:
    """An update that returns NO_STORE is a read."""
    v = variables(x=3)

    assert rmw(v, "x", lambda _old: NO_STORE) == 3
    assert v.x == 3


def test_bits() -> None:
    """Bit operations take the kernel's argument order and report the old bit."""
    v = variables(flags=0)
    set_bit(3, v, "flags")

    assert test_bit(3, v, "flags")
    assert test_and_set_bit(0, v, "flags") is False
    assert test_and_set_bit(0, v, "flags") is True
    assert test_and_clear_bit(3, v, "flags") is True
    clear_bit(0, v, "flags")
    assert v.flags == 0


def test_rmw_is_atomic_on_real_threads() -> None:
    """Increments from several threads are all counted, also beside marked stores to the same object."""
    v = variables(x=0, y=0)

    def add() -> None:
        for _ in range(2000):
            atomic_inc(v, "x")
            WRITE_ONCE(v, "y", 1)

    tasks = [kthread_run(add, daemon=False) for _ in range(3)]
    for task in tasks:
        engine().join(task)

    assert v.x == 6000


def test_cond_load_waits_for_a_store() -> None:
    """smp_cond_load_acquire returns the first value that satisfies its condition."""
    v = variables(x=0)
    task = kthread_run(lambda: smp_store_release(v, "x", 3), daemon=False)

    assert smp_cond_load_acquire(v, "x", lambda value: value >= 3) == 3
    engine().join(task)
