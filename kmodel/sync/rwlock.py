"""rwlock_t: many readers or one writer, spinning, fair between them.

Models:      include/asm-generic/qrwlock.h, kernel/locking/qrwlock.c (7.2)
Guards:      `cnts` by read-modify-write; whoever must wait queues up on `wait_lock` and waits at its head
Invariants:  W1 never a writer and a reader, W2 never two writers, W3 a waiting writer stops new readers (no
             starvation)
Leaves out:  readers in interrupts, which may overtake a waiting writer; the byte store of the unlock (a word
             operation here)
Read next:   seqcount.py, whose SeqcountRwlock is tied to one of these

The word: bits 0-7 a writer holds it, bit 8 a writer waits at the head, from bit 9 the readers.
"""

from typing import Any, Final

from kmodel.core import (
    NO_STORE,
    KernelBug,
    Struct,
    atomic,
    embedded,
    kernel_struct,
    lock_acquire,
    lock_release,
    raw_get,
    rmw,
    smp_cond_load_acquire,
    smp_cond_load_relaxed,
)
from kmodel.sync.spinlock import SpinLock, spin_lock, spin_unlock

_QW_LOCKED: Final = 0xFF
_QW_WAITING: Final = 0x100
_QW_WMASK: Final = 0x1FF
_QR_BIAS: Final = 0x200


@kernel_struct
class RwLock(Struct):
    """rwlock_t (struct qrwlock)."""

    cnts: int = atomic(default=0)
    wait_lock: SpinLock = embedded(factory=SpinLock)


# Updates of `cnts`, at module level: a shared nested function would be contended on free-threaded Python.


def _add_reader(old: int) -> int:
    return old + _QR_BIAS


def _sub_reader(old: int) -> int:
    return old - _QR_BIAS


def _add_reader_unless_writer(old: int) -> Any:
    return NO_STORE if old & _QW_WMASK else old + _QR_BIAS


def _lock_if_free(old: int) -> Any:
    return NO_STORE if old else _QW_LOCKED


def _lock_if_only_waiting(old: int) -> Any:
    return _QW_LOCKED if old == _QW_WAITING else NO_STORE


def _set_waiting(old: int) -> int:
    return old | _QW_WAITING


def _clear_writer(old: int) -> int:
    return old & ~_QW_LOCKED


def _no_writer(cnts: int) -> bool:
    return not cnts & _QW_LOCKED


def _only_waiting(cnts: int) -> bool:
    return cnts == _QW_WAITING


def read_lock(lock: RwLock) -> None:
    """Enter as a reader. ACQUIRE: pairs with the release in write_unlock()."""
    if rmw(lock, "cnts", _add_reader, "acquire") & _QW_WMASK:
        _read_lock_slowpath(lock)
    lock_acquire(lock, "read", atomic=True)


def _read_lock_slowpath(lock: RwLock) -> None:
    # A writer is inside or waits: take the share back, or the writer could never see the readers gone, and
    # queue behind it.
    rmw(lock, "cnts", _sub_reader, "relaxed")
    spin_lock(lock.wait_lock)
    # At the head now, so a waiting writer is impossible; one that is inside ends. ACQUIRE: as in read_lock().
    rmw(lock, "cnts", _add_reader, "relaxed")
    smp_cond_load_acquire(lock, "cnts", _no_writer)
    spin_unlock(lock.wait_lock)


def read_trylock(lock: RwLock) -> bool:
    """Enter as a reader if no writer holds or waits for the lock."""
    if rmw(lock, "cnts", _add_reader_unless_writer, "acquire") & _QW_WMASK:
        return False
    lock_acquire(lock, "read", atomic=True)
    return True


def read_unlock(lock: RwLock) -> None:
    """Leave as a reader. RELEASE: what was read stays before the next writer's changes."""
    lock_release(lock, atomic=True)
    rmw(lock, "cnts", _sub_reader, "release")


def write_lock(lock: RwLock) -> None:
    """Enter as the writer. ACQUIRE: pairs with the releases in read_unlock() and write_unlock()."""
    if rmw(lock, "cnts", _lock_if_free, "acquire"):
        _write_lock_slowpath(lock)
    lock_acquire(lock, "write", atomic=True)


def _write_lock_slowpath(lock: RwLock) -> None:
    spin_lock(lock.wait_lock)
    if rmw(lock, "cnts", _lock_if_free, "acquire"):
        rmw(lock, "cnts", _set_waiting, "relaxed")  # W3: from here new readers queue behind us
        while True:
            smp_cond_load_relaxed(lock, "cnts", _only_waiting)
            # A reader that is about to take its share back may sit between the look and the exchange: then
            # look again.
            if rmw(lock, "cnts", _lock_if_only_waiting, "acquire") == _QW_WAITING:
                break
    spin_unlock(lock.wait_lock)


def write_trylock(lock: RwLock) -> bool:
    """Enter as the writer if nobody holds or waits for the lock."""
    if rmw(lock, "cnts", _lock_if_free, "acquire"):
        return False
    lock_acquire(lock, "write", atomic=True)
    return True


def write_unlock(lock: RwLock) -> None:
    """Leave as the writer. RELEASE: pairs with the acquires of whoever enters next."""
    lock_release(lock, atomic=True)
    rmw(lock, "cnts", _clear_writer, "release")


def check_rwlock(lock: RwLock) -> None:
    """KernelBug unless the word makes sense (for tests and oracles, at any moment)."""
    cnts = raw_get(lock, "cnts")
    if cnts < 0 or cnts & _QW_LOCKED not in (0, _QW_LOCKED):
        raise KernelBug(f"{lock!r}: cnts is {cnts:#x}")
