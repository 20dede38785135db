"""What the model says when something is wrong: BUG(), WARN() and the errors of the oracles.

Models:      include/asm-generic/bug.h, WARN / WARN_ON_ONCE; lib/bug.c (7.2)
Guards:      the ledger of warnings has a lock of its own
Invariants:  R1 a warning is counted every time and logged the first time only
Leaves out:  taint flags, oops decoding
Read next:   core/struct.py
"""

import logging
import sys
import threading

import attrs

log = logging.getLogger("kmodel")


class KernelBug(AssertionError):
    """The model did what would be a BUG(), an oops or silent corruption in a kernel."""


class UseAfterFree(KernelBug):
    """A freed (poisoned) object or value was used."""


class LockingBug(KernelBug):
    """A lock rule was broken: not held where required, wrong context, wrong order."""


@attrs.frozen
class Warning_:
    """One WARN site that fired: its text, the code that called WARN and how often it fired."""

    message: str
    where: str
    count: int


_ledger_lock = threading.Lock()
_ledger: dict[tuple[str, str], int] = {}


def _caller(depth: int) -> str:
    frame = sys._getframe(depth)
    return f"{frame.f_code.co_filename.rpartition('/kmodel/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"


def WARN(condition: object, message: str, *, depth: int = 2) -> bool:
    """Record a kernel warning if `condition` holds; return whether it held.

    Every occurrence is counted, the first of each message and site is logged, as WARN_ONCE would print it.
    A stress run or an exploration that ends with entries in `kernel_warnings()` did not end clean.
    """
    if not condition:
        return False
    site = (message, _caller(depth))
    with _ledger_lock:
        count = _ledger.get(site, 0) + 1
        _ledger[site] = count
    if count == 1:
        log.warning("WARNING: %s at %s", *site)
    return True


def WARN_ON_ONCE(condition: object, message: str = "WARN_ON_ONCE") -> bool:
    """WARN under the name most call sites use; the ledger already logs each site once."""
    return WARN(condition, message, depth=3)


def BUG_ON(condition: object, message: str) -> None:
    """Raise KernelBug if `condition` holds."""
    if condition:
        raise KernelBug(message)


def kernel_warnings() -> tuple[Warning_, ...]:
    """All warnings since the last `clear_warnings()`, in the order in which they first fired."""
    with _ledger_lock:
        return tuple(Warning_(message, where, count) for (message, where), count in _ledger.items())


def clear_warnings() -> None:
    """Forget all warnings (the start of a run)."""
    with _ledger_lock:
        _ledger.clear()
