"""refcount_t: a reference counter that saturates instead of wrapping, so that misuse leaks memory and never
frees it early.

Models:      include/linux/refcount.h; lib/refcount.c, refcount_warn_saturate (7.2)
Guards:      the counter is an atomic() field of the counted object; every function takes (object, field name)
Invariants:  F1 a count at 0 rises only by refcount_set, F2 a saturated count never reaches 0 again, F3 every
             misuse WARNs
Leaves out:  the arithmetic of two overflows at once (the kernel's saturation zone is 2^30 wide for that)
Read next:   seqcount.py

Orderings: an increment is relaxed, because whoever increments already owns a reference or has another reason
why the object lives. inc_not_zero adds only a control dependency, so *loads* after it are not ordered: a
reader that must re-validate an object it found (slab memory can be somebody else's by then) uses an _acquire
form, H35. A decrement is a release, and the one that reaches 0 an acquire too: everything every holder did
happens before the object is freed.
"""

from typing import Any, Final

from kmodel.core import (
    NO_STORE,
    READ_ONCE,
    WARN,
    WRITE_ONCE,
    atomic_fetch_add_relaxed,
    guards,
    rmw,
    smp_load_acquire,
    smp_store_release,
)

INT_MAX: Final = (1 << 31) - 1
REFCOUNT_MAX: Final = INT_MAX
REFCOUNT_SATURATED: Final = -(1 << 30)
"""0xc0000000 as a signed int: halfway down the negative numbers, as far as can be from 0 in both directions.
"""

_INC_NOT_ZERO = guards.register(
    "no-refcount-zero-test", "H01, H02, H25: a reader takes a reference on an object whose last one is gone"
)


def _signed(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _inc(old: int) -> int:
    return old + 1 if old != INT_MAX else -(1 << 31)


def _inc_unless_zero(old: int) -> Any:
    return NO_STORE if old == 0 else _inc(old)


def _dec(old: int) -> int:
    return old - 1 if old != -(1 << 31) else INT_MAX


def _dec_if_one(old: int) -> Any:
    return 0 if old == 1 else NO_STORE


def _dec_unless_one(old: int) -> Any:
    return NO_STORE if old in (0, 1, REFCOUNT_SATURATED) else _dec(old)


def _saturate(obj: Any, field: str, what: str) -> None:
    # A second step after the addition, as in the kernel: for a moment others can see the wrong value, which
    # is why the saturated one is so far from 0.
    WRITE_ONCE(obj, field, REFCOUNT_SATURATED)
    WARN(True, f"refcount_t: {what}", depth=4)


def refcount_set(obj: Any, field: str, n: int) -> None:
    """Set the count, without ordering: the object is not reachable yet."""
    WRITE_ONCE(obj, field, n)


def refcount_set_release(obj: Any, field: str, n: int) -> None:
    """Set the count last of all fields of a reused object: pairs with the _acquire increments of readers
    (H36).
    """
    smp_store_release(obj, field, n)


def refcount_read(obj: Any, field: str) -> int:
    """The count at some moment."""
    return READ_ONCE(obj, field)  # type: ignore[no-any-return]


def refcount_add(obj: Any, field: str, n: int) -> None:
    """Add `n` references; the caller holds one."""
    old = rmw(obj, field, lambda seen: _signed(seen + n), "relaxed")
    if old == 0:
        _saturate(obj, field, "addition on 0; use-after-free.")
    elif old < 0 or old + n > INT_MAX:
        _saturate(obj, field, "saturated; leaking memory.")


def refcount_inc(obj: Any, field: str) -> None:
    """Add a reference; the caller holds one.

    From 0 it saturates: the object must never be freed a second time (H72).
    """
    old = rmw(obj, field, _inc, "relaxed")
    if 0 < old < INT_MAX:
        return
    _saturate(obj, field, "saturated; leaking memory." if old else "addition on 0; use-after-free.")


def _inc_not_zero(obj: Any, field: str, order: str) -> bool:
    old = rmw(obj, field, _inc_unless_zero, order)
    if 0 < old < INT_MAX:
        return True
    if old == 0:
        return _resurrected(obj, field)
    _saturate(obj, field, "saturated; leaking memory.")
    return True


def _resurrected(obj: Any, field: str) -> bool:
    """The zero test failed. False, unless somebody wants to see what becomes of the object otherwise."""
    if _INC_NOT_ZERO not in guards.removed:
        return False
    atomic_fetch_add_relaxed(obj, field, 1)
    return True


def refcount_inc_not_zero(obj: Any, field: str) -> bool:
    """Add a reference unless there is none left; whether it was added.

    Relaxed: later loads are not ordered after it.
    """
    return _inc_not_zero(obj, field, "relaxed")


def refcount_inc_not_zero_acquire(obj: Any, field: str) -> bool:
    """refcount_inc_not_zero, and what follows is ordered after it: pairs with refcount_set_release of the
    object's next life.
    """
    return _inc_not_zero(obj, field, "acquire")


def inc_not_zero_limited_acquire(obj: Any, field: str, limit: int) -> tuple[bool, int]:
    """Add a reference unless the count is 0 or the result would pass `limit`; (whether it was added, the old
    count).

    Models __refcount_inc_not_zero_limited_acquire. A refusal is no misuse and does not WARN: the VMA lock
    keeps its writer's flag above the limit, and readers fall back (H28, H37).
    """
    old = rmw(obj, field, lambda seen: NO_STORE if seen == 0 or seen >= limit else seen + 1, "acquire")
    if old == 0:
        return _resurrected(obj, field), 0
    if old >= limit:
        return False, old
    if old < 0:
        _saturate(obj, field, "saturated; leaking memory.")
    return True, old


def refcount_sub_and_test(obj: Any, field: str, n: int) -> bool:
    """Drop `n` references; True for the caller that dropped the last one and must free the object."""
    return _sub(obj, field, rmw(obj, field, lambda seen: _signed(seen - n), "release"), n)


def refcount_dec_and_test(obj: Any, field: str) -> bool:
    """Drop a reference; True for the caller that dropped the last one and must free the object."""
    old = rmw(obj, field, _dec, "release")
    if old > 1:
        return False
    return _sub(obj, field, old, 1)


def __refcount_dec_and_test(obj: Any, field: str) -> tuple[bool, int]:
    """refcount_dec_and_test that also gives the old count (the kernel's `oldp`)."""
    old = rmw(obj, field, _dec, "release")
    return _sub(obj, field, old, 1), old


def _sub(obj: Any, field: str, old: int, n: int) -> bool:
    if old == n > 0:
        # The kernel's smp_acquire__after_ctrl_dep(): the test of the count together with a read barrier is an
        # acquire. Here our own 0 is read back as one, which orders the same: everybody else's release
        # decrement before whatever the caller does to the object, loads and stores.
        smp_load_acquire(obj, field)
        return True
    if old <= 0 or old < n:
        _saturate(obj, field, "underflow; use-after-free.")
    return False


def refcount_dec(obj: Any, field: str) -> None:
    """Drop a reference that is certainly not the last one."""
    if rmw(obj, field, _dec, "release") <= 1:
        _saturate(obj, field, "decrement hit 0; leaking memory.")


def refcount_dec_if_one(obj: Any, field: str) -> bool:
    """1 to 0 or nothing; whether it happened. The release form of "am I the only holder"."""
    return rmw(obj, field, _dec_if_one, "release") == 1  # type: ignore[no-any-return]


def refcount_dec_not_one(obj: Any, field: str) -> bool:
    """Drop a reference unless it is the last one (or the count is saturated: then True, and it stays).

    At 0 it WARNs and, alone among these functions, leaves the count as it is.
    """
    old = rmw(obj, field, _dec_unless_one, "release")
    WARN(old == 0, "refcount_t: underflow; use-after-free.")
    return bool(old != 1)
