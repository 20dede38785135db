"""Marked accesses, read-modify-write operations and barriers, under the kernel's names.

Models:      include/asm-generic/rwonce.h, barrier.h; include/linux/atomic/*.h, rcupdate.h (7.2)
Guards:      on real threads a read-modify-write holds the object's own lock; a marked store to an atomic
             field takes it too, so
             that it cannot fall between the halves of one
Invariants:  A1 an operation is one event to a traced engine, A2 a failed cmpxchg is a relaxed load
Leaves out:  tearing (Python stores whole references), access widths, volatile versus compiler barriers
Read next:   core/engine.py, where a traced engine receives these events

Every function takes an object and a field name: `READ_ONCE(vma, "vm_lock_seq")`. Orderings, weakest first:
plain attribute
access < READ_ONCE / WRITE_ONCE < acquire / release < smp_rmb, smp_wmb < full barrier. An operation that
returns a value and has
no suffix is a full barrier; `_relaxed`, `_acquire`, `_release` are what they say; one that returns nothing is
relaxed.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kmodel.core.engine import Tracer

# The traced engine that receives events, or None on the threads engine. Set by core.engine.install only.
_tracer: "Tracer | None" = None


class _NoStore:
    __slots__ = ()

    def __repr__(self) -> str:
        return "NO_STORE"


NO_STORE: Final[Any] = _NoStore()
"""What an update function returns when the read-modify-write turns out to be only a read."""


# ------------------------------------------------------------------------------------------------ loads


def READ_ONCE(obj: Any, field: str) -> Any:
    """Load without ordering and without tearing. A pointer so obtained orders what is read through it
    (address dependency)."""
    if _tracer is None:
        return getattr(obj, field)
    return _tracer.load(obj, field, "once")


rcu_dereference = READ_ONCE
"""Load a pointer that rcu_assign_pointer published; the caller must be a reader of the RCU flavour that
protects it."""

atomic_read = READ_ONCE


def smp_load_acquire(obj: Any, field: str) -> Any:
    """Load; everything after it in program order stays after it."""
    if _tracer is None:
        return getattr(obj, field)
    return _tracer.load(obj, field, "acquire")


atomic_read_acquire = smp_load_acquire


# ------------------------------------------------------------------------------------------------ stores


def _store(obj: Any, field: str, value: Any) -> None:
    if field in obj.__k_atomic__:
        with obj._k_lock:
            setattr(obj, field, value)
    else:
        setattr(obj, field, value)


def WRITE_ONCE(obj: Any, field: str, value: Any) -> None:
    """Store without ordering and without tearing."""
    if _tracer is None:
        _store(obj, field, value)
    else:
        _tracer.store(obj, field, value, "once")


atomic_set = WRITE_ONCE
RCU_INIT_POINTER = WRITE_ONCE
"""Store a pointer that needs no publication order: NULL, or to a struct readers can already see."""


def smp_store_release(obj: Any, field: str, value: Any) -> None:
    """Store; everything before it in program order stays before it."""
    if _tracer is None:
        _store(obj, field, value)
    else:
        _tracer.store(obj, field, value, "release")


atomic_set_release = smp_store_release
rcu_assign_pointer = smp_store_release
"""Publish a pointer: a reader that dereferences it sees the struct as it was initialised before."""


def smp_store_mb(obj: Any, field: str, value: Any) -> None:
    """Store, then a full barrier (set_current_state is made of this)."""
    WRITE_ONCE(obj, field, value)
    smp_mb()


# ------------------------------------------------------------------------------------------ read-modify-write


def rmw(obj: Any, field: str, update: Callable[[Any], Any], order: str = "full") -> Any:
    """Atomically replace obj.field by update(old) and return old; an update that returns NO_STORE leaves it
    alone.

    `update` must be a pure function of its argument. `order` is "full", "relaxed", "acquire" or "release".
    The operations below
    are this one with a kernel name; use it directly for a kernel cmpxchg loop whose retries are not
    themselves of interest.
    """
    if _tracer is not None:
        return _tracer.rmw(obj, field, update, order)
    if field not in obj.__k_atomic__:
        raise TypeError(f"{type(obj).__name__}.{field} is not declared atomic()")
    with obj._k_lock:
        old = getattr(obj, field)
        new = update(old)
        if new is not NO_STORE:
            setattr(obj, field, new)
    return old


def xchg(obj: Any, field: str, value: Any) -> Any:
    """Store `value`, return what was there; full barrier."""
    return rmw(obj, field, lambda _old: value)


def xchg_relaxed(obj: Any, field: str, value: Any) -> Any:
    """xchg without ordering."""
    return rmw(obj, field, lambda _old: value, "relaxed")


def xchg_acquire(obj: Any, field: str, value: Any) -> Any:
    """xchg whose load is an acquire."""
    return rmw(obj, field, lambda _old: value, "acquire")


def xchg_release(obj: Any, field: str, value: Any) -> Any:
    """xchg whose store is a release."""
    return rmw(obj, field, lambda _old: value, "release")


def _cmpxchg(obj: Any, field: str, old: Any, new: Any, order: str) -> Any:
    return rmw(obj, field, lambda seen: new if seen == old else NO_STORE, order)


def cmpxchg(obj: Any, field: str, old: Any, new: Any) -> Any:
    """If obj.field == old, store `new` with a full barrier; return what was there. A failure orders
    nothing."""
    return _cmpxchg(obj, field, old, new, "full")


def cmpxchg_relaxed(obj: Any, field: str, old: Any, new: Any) -> Any:
    """cmpxchg without ordering."""
    return _cmpxchg(obj, field, old, new, "relaxed")


def cmpxchg_acquire(obj: Any, field: str, old: Any, new: Any) -> Any:
    """cmpxchg whose load is an acquire when it succeeds."""
    return _cmpxchg(obj, field, old, new, "acquire")


def cmpxchg_release(obj: Any, field: str, old: Any, new: Any) -> Any:
    """cmpxchg whose store is a release when it succeeds."""
    return _cmpxchg(obj, field, old, new, "release")


def try_cmpxchg(obj: Any, field: str, old: Any, new: Any, order: str = "full") -> tuple[bool, Any]:
    """(True, old) if the exchange was made, else (False, what was there instead)."""
    seen = _cmpxchg(obj, field, old, new, order)
    return (seen == old, seen)


def atomic_fetch_add(obj: Any, field: str, n: int) -> int:
    """Add `n`, return the old value; full barrier."""
    return rmw(obj, field, lambda old: old + n)  # type: ignore[no-any-return]


def atomic_fetch_add_relaxed(obj: Any, field: str, n: int) -> int:
    """atomic_fetch_add without ordering."""
    return rmw(obj, field, lambda old: old + n, "relaxed")  # type: ignore[no-any-return]


def atomic_fetch_add_acquire(obj: Any, field: str, n: int) -> int:
    """atomic_fetch_add whose load is an acquire."""
    return rmw(obj, field, lambda old: old + n, "acquire")  # type: ignore[no-any-return]


def atomic_fetch_add_release(obj: Any, field: str, n: int) -> int:
    """atomic_fetch_add whose store is a release."""
    return rmw(obj, field, lambda old: old + n, "release")  # type: ignore[no-any-return]


def atomic_fetch_sub(obj: Any, field: str, n: int) -> int:
    """Subtract `n`, return the old value; full barrier."""
    return atomic_fetch_add(obj, field, -n)


def atomic_fetch_sub_release(obj: Any, field: str, n: int) -> int:
    """Subtract `n`, return the old value; the store is a release."""
    return atomic_fetch_add_release(obj, field, -n)


def atomic_add_return(obj: Any, field: str, n: int) -> int:
    """Add `n`, return the new value; full barrier."""
    return atomic_fetch_add(obj, field, n) + n


def atomic_inc_return(obj: Any, field: str) -> int:
    """Add one, return the new value; full barrier."""
    return atomic_fetch_add(obj, field, 1) + 1


def atomic_dec_return(obj: Any, field: str) -> int:
    """Subtract one, return the new value; full barrier."""
    return atomic_fetch_add(obj, field, -1) - 1


def atomic_dec_and_test(obj: Any, field: str) -> bool:
    """Subtract one; whether the result is 0; full barrier."""
    return atomic_fetch_add(obj, field, -1) == 1


def atomic_add(obj: Any, field: str, n: int) -> None:
    """Add `n`; no ordering."""
    rmw(obj, field, lambda old: old + n, "relaxed")


def atomic_inc(obj: Any, field: str) -> None:
    """Add one; no ordering."""
    atomic_add(obj, field, 1)


def atomic_dec(obj: Any, field: str) -> None:
    """Subtract one; no ordering."""
    atomic_add(obj, field, -1)


def atomic_add_unless(obj: Any, field: str, n: int, unless: int) -> bool:
    """Add `n` unless the value is `unless`; whether it was added; full barrier when it was."""
    return rmw(obj, field, lambda old: NO_STORE if old == unless else old + n) != unless  # type: ignore[no-any-return]


def atomic_inc_not_zero(obj: Any, field: str) -> bool:
    """Add one unless the value is 0; whether it was added; full barrier when it was."""
    return atomic_add_unless(obj, field, 1, 0)


def atomic_or(obj: Any, field: str, mask: int) -> None:
    """Set the bits of `mask`; no ordering."""
    rmw(obj, field, lambda old: old | mask, "relaxed")


def atomic_andnot(obj: Any, field: str, mask: int) -> None:
    """Clear the bits of `mask`; no ordering."""
    rmw(obj, field, lambda old: old & ~mask, "relaxed")


def set_bit(nr: int, obj: Any, field: str) -> None:
    """Set bit `nr` of a flags word atomically; no ordering (the kernel's argument order)."""
    atomic_or(obj, field, 1 << nr)


def clear_bit(nr: int, obj: Any, field: str) -> None:
    """Clear bit `nr` of a flags word atomically; no ordering."""
    atomic_andnot(obj, field, 1 << nr)


def test_bit(nr: int, obj: Any, field: str) -> bool:
    """Whether bit `nr` is set; no ordering."""
    return bool(READ_ONCE(obj, field) >> nr & 1)


def test_and_set_bit(nr: int, obj: Any, field: str) -> bool:
    """Set bit `nr`, return whether it was set before; full barrier."""
    mask = 1 << nr
    return bool(rmw(obj, field, lambda old: old | mask) & mask)


def test_and_clear_bit(nr: int, obj: Any, field: str) -> bool:
    """Clear bit `nr`, return whether it was set before; full barrier."""
    mask = 1 << nr
    return bool(rmw(obj, field, lambda old: old & ~mask) & mask)


test_bit.__test__ = test_and_set_bit.__test__ = test_and_clear_bit.__test__ = False  # type: ignore[attr-defined]  # not pytest's


# ------------------------------------------------------------------------------------------------ barriers


def smp_mb() -> None:
    """Full barrier: everything before it is ordered before everything after it, on every CPU."""
    # On real threads there is nothing to do: measured on x86-64, a slots store and a later slots load are not
    # reordered, because
    # the interpreter's store takes and drops a per-object lock (docs/limits.md says what that does not
    # cover).
    if _tracer is not None:
        _tracer.fence("mb")


def smp_rmb() -> None:
    """Loads before it are ordered before loads after it; pairs with smp_wmb, a release or a full barrier of
    the writer."""
    if _tracer is not None:
        _tracer.fence("rmb")


def smp_wmb() -> None:
    """Stores before it are ordered before stores after it; pairs with smp_rmb, an acquire or a full barrier
    of the reader."""
    if _tracer is not None:
        _tracer.fence("wmb")


def smp_mb__before_atomic() -> None:
    """Make the following relaxed atomic operation ordered after everything before."""
    smp_mb()


def smp_mb__after_atomic() -> None:
    """Make everything after ordered after the preceding relaxed atomic operation."""
    smp_mb()


def data_race[T](expression: Callable[[], T]) -> T:
    """Evaluate `expression`, whose plain accesses may race by intent: no race report, no ordering either."""
    if _tracer is None:
        return expression()
    return _tracer.data_race(expression)


# ------------------------------------------------------------------------------------------------ waiting


def cpu_relax() -> None:
    """End of one turn of a busy-wait loop.

    Real threads give the processor away. A traced engine lets the task go on only once something it read in
    this turn may read
    differently, unless the turn had side effects.
    """
    if _tracer is None:
        time.sleep(0)
    else:
        _tracer.relax()


_SPINS_BEFORE_SLEEP = 200
_SLEEP_SECONDS = 50e-6


def smp_cond_load_relaxed(obj: Any, field: str, cond: Callable[[Any], bool]) -> Any:
    """Busy-wait until cond(obj.field) holds and return that value; no ordering."""
    if _tracer is not None:
        return _tracer.cond_load(obj, field, cond, "once")
    spins = 0
    while not cond(value := getattr(obj, field)):
        spins += 1
        time.sleep(0 if spins < _SPINS_BEFORE_SLEEP else _SLEEP_SECONDS)
    return value


def smp_cond_load_acquire(obj: Any, field: str, cond: Callable[[Any], bool]) -> Any:
    """Busy-wait until cond(obj.field) holds and return that value, as an acquire."""
    if _tracer is not None:
        return _tracer.cond_load(obj, field, cond, "acquire")
    return smp_cond_load_relaxed(obj, field, cond)
