"""refcount_t: the table of misuse, saturation, the limited form, and what the zero test protects."""

from typing import Any

import pytest

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    KernelBug,
    Struct,
    atomic,
    boot,
    clear_warnings,
    guards,
    kernel_struct,
    kernel_warnings,
    smp_store_release,
)
from kmodel.sync import (
    REFCOUNT_MAX,
    REFCOUNT_SATURATED,
    inc_not_zero_limited_acquire,
    refcount_add,
    refcount_dec,
    refcount_dec_and_test,
    refcount_dec_if_one,
    refcount_dec_not_one,
    refcount_inc,
    refcount_inc_not_zero,
    refcount_inc_not_zero_acquire,
    refcount_read,
    refcount_set,
    refcount_sub_and_test,
)
from tests.sync.running import failures, kinds_of, on_threads, trace_of, under_seeds


@kernel_struct
class Counted(Struct):
    """Something with a reference count."""

    ref: int = atomic(default=1)
    payload: int = 7


def counted(ref: int) -> Counted:
    obj = Counted()
    refcount_set(obj, "ref", ref)
    return obj


ZERO, LEAK = "refcount_t: addition on 0; use-after-free.", "refcount_t: saturated; leaking memory."
UNDERFLOW, DEC_TO_0 = "refcount_t: underflow; use-after-free.", "refcount_t: decrement hit 0; leaking memory."
S = REFCOUNT_SATURATED

TABLE = [
    # operation, count before, result, count after, warning
    (refcount_inc, 1, None, 2, None),
    (refcount_inc, 0, None, S, ZERO),
    (refcount_inc, REFCOUNT_MAX, None, S, LEAK),
    (refcount_inc, S, None, S, LEAK),
    (refcount_inc_not_zero, 1, True, 2, None),
    (refcount_inc_not_zero, 0, False, 0, None),
    (refcount_inc_not_zero, REFCOUNT_MAX, True, S, LEAK),
    (refcount_inc_not_zero_acquire, S, True, S, LEAK),
    (refcount_inc_not_zero_acquire, 0, False, 0, None),
    (refcount_dec, 2, None, 1, None),
    (refcount_dec, 1, None, S, DEC_TO_0),
    (refcount_dec, 0, None, S, DEC_TO_0),
    (refcount_dec_and_test, 2, False, 1, None),
    (refcount_dec_and_test, 1, True, 0, None),
    (refcount_dec_and_test, 0, False, S, UNDERFLOW),
    (refcount_dec_and_test, S, False, S, UNDERFLOW),
    (refcount_dec_if_one, 1, True, 0, None),
    (refcount_dec_if_one, 2, False, 2, None),
    (refcount_dec_not_one, 2, True, 1, None),
    (refcount_dec_not_one, 1, False, 1, None),
    (refcount_dec_not_one, 0, True, 0, UNDERFLOW),
    (refcount_dec_not_one, S, True, S, None),
    (refcount_dec_not_one, S + 1, True, S, None),
]


@pytest.mark.parametrize(("operation", "before", "result", "after", "warning"), TABLE)
def test_table(operation: Any, before: int, result: Any, after: int, warning: str | None) -> None:
    """Each operation's result, the count it leaves and the warning it gives."""
    clear_warnings()
    obj = counted(before)

    assert (operation(obj, "ref"), refcount_read(obj, "ref")) == (result, after)
    assert [w.message for w in kernel_warnings()] == ([] if warning is None else [warning])
    clear_warnings()


def test_many_at_once() -> None:
    """refcount_add and refcount_sub_and_test obey the same rules for n references."""
    clear_warnings()
    obj = counted(2)
    refcount_add(obj, "ref", 3)

    assert [refcount_sub_and_test(obj, "ref", n) for n in (2, 3)] == [False, True]
    refcount_add(obj, "ref", 3)
    assert refcount_read(obj, "ref") == REFCOUNT_SATURATED
    assert [w.message for w in kernel_warnings()] == [ZERO]
    clear_warnings()


def test_a_warning_names_the_caller() -> None:
    """The ledger records where the misuse was, not where it was noticed."""
    clear_warnings()
    refcount_inc(counted(0), "ref")

    assert "test_a_warning_names_the_caller" in kernel_warnings()[0].where
    clear_warnings()


@pytest.mark.parametrize(
    ("before", "result", "after"),
    [
        (1, (True, 1), 2),
        (9, (True, 9), 10),
        (10, (False, 10), 10),
        (11, (False, 11), 11),
        (0, (False, 0), 0),
    ],
)
def test_limited(before: int, result: tuple[bool, int], after: int) -> None:
    """The limited form gives the old count and never passes its limit, without a warning."""
    clear_warnings()
    obj = counted(before)

    assert inc_not_zero_limited_acquire(obj, "ref", 10) == result
    assert refcount_read(obj, "ref") == after
    assert kernel_warnings() == ()


def test_orderings() -> None:
    """Increments are relaxed, the acquire forms acquire, decrements release and the last one adds a read
    barrier.
    """

    def thread(obj: Counted) -> None:
        refcount_inc(obj, "ref")
        refcount_inc_not_zero(obj, "ref")
        refcount_inc_not_zero_acquire(obj, "ref")
        inc_not_zero_limited_acquire(obj, "ref", 100)
        for _ in range(5):
            refcount_dec_and_test(obj, "ref")

    expected = [
        "rmw-relaxed",
        "rmw-relaxed",
        "rmw-acquire",
        "rmw-acquire",
        *["rmw-release"] * 5,
        "load-acquire",
    ]
    assert kinds_of(trace_of(0, Counted, [thread])) == expected


def test_threads_balance() -> None:
    """Four threads take and drop references; the count ends where it began."""

    def thread(obj: Counted) -> None:
        for _ in range(300):
            refcount_inc(obj, "ref")
            assert refcount_inc_not_zero(obj, "ref")
            assert not refcount_dec_and_test(obj, "ref")
            assert not refcount_dec_and_test(obj, "ref")

    assert on_threads(Counted(), [thread] * 4).ref == 1


# ------------------------------------------------------------------------------------- the zero test (H01)


@kernel_struct
class Table(Struct):
    """One slot that holds a reference, as a tree does for a lookup."""

    slot: Counted | None = None


def table() -> Table:
    boot()
    return Table(slot=Counted())


def remover(state: Table) -> None:
    obj = state.slot
    assert obj is not None
    smp_store_release(state, "slot", None)
    if refcount_dec_and_test(obj, "ref"):
        WRITE_ONCE(obj, "payload", -1)  # dead; its memory stays for a grace period


def finder(state: Table) -> None:
    obj = READ_ONCE(state, "slot")
    if obj is not None and refcount_inc_not_zero_acquire(obj, "ref"):
        if READ_ONCE(obj, "payload") != 7:
            raise KernelBug("a reference to a dead object")
        if refcount_dec_and_test(obj, "ref"):
            WRITE_ONCE(obj, "payload", -1)


def test_the_zero_test_keeps_the_dead_dead() -> None:
    """A lookup that meets a count of 0 gives up; nobody gets a reference to a dead object."""
    under_seeds(table, [remover, finder])


def test_without_the_zero_test_a_dead_object_is_used() -> None:
    """H01: with the test removed some seed hands out a reference to a dead object."""
    with guards.without("no-refcount-zero-test"):
        assert failures(table, [remover, finder]) == {KernelBug}
