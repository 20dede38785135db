"""file_ref: the reference count of struct file, which may be counted up after the file is dead.

Models:      include/linux/file_ref.h; fs/file.c __file_ref_put, __file_ref_put_badval (7.2)
Guards:      the word itself, by read-modify-write
Invariants:  F1 of all puts exactly one is told to release, and only after it no get succeeds until
             file_ref_init F2 a get that fails leaves no reference, though it leaves its mark: the dead zone
             is wide enough
Leaves out:  32-bit words
Read next:   fs/file_table.py

The stored value is the number of references minus one, in 64 bits:

    0 .. 0x7fff...          valid: 1 .. 2**63 references
    0x8000... .. 0xbfff...  saturation zone: the file leaks, it is never released
    0xc000... .. 0xfffe...  dead zone: released; 0xe000... is where it starts from
    0xffff...               no reference is left, and whoever took the last one is about to mark it dead

A get adds one without looking first, so it costs one instruction under any contention; a refused get on a
dead file moves the value up within the dead zone, which would take 2**61 of them to leave. It must not put
the value back: the file may have been reused meanwhile, and its new owner's count is in that word.
"""

from typing import Any, Final

from kmodel.core import (
    READ_ONCE,
    WARN,
    atomic_read,
    atomic_set,
    rmw,
    try_cmpxchg,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

FILE_REF_ONEREF: Final = 0x0000_0000_0000_0000
FILE_REF_MAXREF: Final = 0x7FFF_FFFF_FFFF_FFFF
FILE_REF_SATURATED: Final = 0xA000_0000_0000_0000
FILE_REF_RELEASED: Final = 0xC000_0000_0000_0000
FILE_REF_DEAD: Final = 0xE000_0000_0000_0000
FILE_REF_NOREF: Final = 0xFFFF_FFFF_FFFF_FFFF

_ALL_BITS: Final = 0xFFFF_FFFF_FFFF_FFFF


def _inc(value: int) -> int:
    return (value + 1) & _ALL_BITS


def _dec(value: int) -> int:
    return (value - 1) & _ALL_BITS


def file_ref_init(obj: Any, field: str, cnt: int) -> None:
    """Start a life with `cnt` references. A relaxed store, as in the kernel.

    Whoever frees the file has passed the full barriers of the last put; a reader that counts this value up
    (full barrier) and looks at its pointer again therefore sees that it no longer leads here, unless the file
    was published there anew.
    """
    atomic_set(obj, field, (cnt - 1) & _ALL_BITS)


def file_ref_get(obj: Any, field: str) -> bool:
    """Take a reference unless the last one is gone; full barrier either way."""
    return _inc(rmw(obj, field, _inc)) <= FILE_REF_MAXREF


def file_ref_inc(obj: Any, field: str) -> None:
    """Take a reference; the caller holds one already. No ordering."""
    prior = rmw(obj, field, _inc, "relaxed")
    WARN(prior > FILE_REF_MAXREF, "file_ref_inc() on a released file reference")


def file_ref_put(obj: Any, field: str) -> bool:
    """Drop a reference. True: it was the last, no get will succeed any more, and the caller must release the
    file.
    """
    # The kernel disables preemption here. Between the two steps the file may be released and reused by
    # others, which is harmless, but its slab must not be given back: a grace period waits for us. (changed:
    # docs/limits.md)
    rcu_read_lock()
    cnt = _dec(rmw(obj, field, _dec))
    last = cnt > FILE_REF_MAXREF and __file_ref_put(obj, field, cnt)
    rcu_read_unlock()
    return last


def __file_ref_put(obj: Any, field: str, cnt: int) -> bool:
    """The count went negative: was it the last reference, or was it no reference at all?"""
    if cnt == FILE_REF_NOREF:
        # Losing means that a get came between and the file lives, or that its put was faster than we are: not
        # ours to release.
        won, _seen = try_cmpxchg(obj, field, cnt, FILE_REF_DEAD)
        return won
    return __file_ref_put_badval(obj, field, cnt)


def __file_ref_put_badval(obj: Any, field: str, cnt: int) -> bool:
    if WARN(cnt >= FILE_REF_RELEASED, "imbalanced put on file reference count"):
        atomic_set(obj, field, FILE_REF_DEAD)
        return False
    if cnt > FILE_REF_MAXREF:  # a put on a saturated count: back to the middle of the zone, leak the file
        atomic_set(obj, field, FILE_REF_SATURATED)
    return False


def file_ref_put_close(obj: Any, field: str) -> bool:
    """file_ref_put for a caller who expects to hold the last reference (close): one operation instead of two
    if that is so, at the price of a look at the word first.
    """
    if atomic_read(obj, field) == FILE_REF_ONEREF:
        won, _seen = try_cmpxchg(obj, field, FILE_REF_ONEREF, FILE_REF_DEAD)
        if won:
            return True
    return file_ref_put(obj, field)


def file_ref_read(obj: Any, field: str) -> int:
    """How many references are held."""
    value = READ_ONCE(obj, field)
    return 0 if value >= FILE_REF_RELEASED else int(value) + 1


def __file_ref_read_raw(obj: Any, field: str) -> int:
    """The stored value."""
    return int(READ_ONCE(obj, field))
