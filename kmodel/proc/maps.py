"""/proc/PID/maps: the text, read while the address space changes.

Models:      fs/proc/task_mmu.c, m_start, m_next, m_stop, proc_get_vma, lock_vma_range, get_next_vma,
             fallback_to_mmap_lock, pid_maps_open (7.2); the same before 6.17 as a variant
Guards:      each VMA's read lock while its line is written; mmap_lock only where that fails
Invariants:  T1 each line ends behind the one before, and no hole is shown that was never there (H40). What
             changed during the read may be torn between lines; a VMA that has merged with the one that was
             printed is shown with the range of both
             T2 the place after a line is its vm_end, so a VMA that grew or moved is gone on from where it was
Leaves out:  smaps, numa_maps; docs/limits.md
Read next:   mm/vma_iter.py, lock_next_vma(); proc/snapshot.py

Between two buffers nothing is held. Within one, the reader is in RCU and has the read lock of the one VMA it
prints: it holds up that VMA's writer, no other, and no page fault.
"""

import os
from collections.abc import Callable, Iterator
from errno import EAGAIN
from typing import Any, Final

import attrs

from kmodel.core import current
from kmodel.fs import task_work_run
from kmodel.mm import (
    MmStruct,
    lock_next_vma,
    mmap_read_lock,
    mmap_read_lock_killable,
    mmap_read_unlock,
    mmdrop,
    mmget_not_zero,
    mmgrab,
    mmput,
    vma_end_read,
    vma_iter_init,
    vma_iter_set,
    vma_next,
)
from kmodel.proc.seq_file import SeqFile, SeqOperations, seq_read
from kmodel.proc.show_map import get_gate_vma, show_map_vma
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

SENTINEL_VMA_END: Final = -1
SENTINEL_VMA_GATE: Final = -2


@attrs.define(eq=False)
class ProcMapsPrivate:
    """struct proc_maps_private, with its locking context: of one open file."""

    mm: Any
    variant: "MapsVariant"
    iter: Any = None
    last_pos: int = 0
    in_use: bool = False  # between start and stop, the mm is used (the kernel: priv->task)
    mmap_locked: bool = False
    locked_vma: Any = None
    # proc/snapshot.py
    mm_wr_seq: int = 0
    vma_copy: Any = None
    tries: int = 0


@attrs.frozen(eq=False)
class MapsVariant:
    """How a reader keeps what it prints from changing under it."""

    name: str
    about: str
    lock_vma_range: Callable[[ProcMapsPrivate], int]
    unlock_vma_range: Callable[[ProcMapsPrivate], None]
    get_next_vma: Callable[[ProcMapsPrivate, int], Any]
    show: Callable[[SeqFile, Any], int]


# ------------------------------------------------------------------------------------- per-VMA locks, 6.17


def _lock_vma_range(priv: ProcMapsPrivate) -> int:
    priv.locked_vma, priv.mmap_locked = None, False
    rcu_read_lock()
    return 0


def unlock_ctx_vma(priv: ProcMapsPrivate) -> None:
    """Let go of the VMA that was printed."""
    if priv.locked_vma is not None:
        vma_end_read(priv.locked_vma)
        priv.locked_vma = None


def _unlock_vma_range(priv: ProcMapsPrivate) -> None:
    if priv.mmap_locked:
        mmap_read_unlock(priv.mm)
        priv.mmap_locked = False
    else:
        unlock_ctx_vma(priv)
        rcu_read_unlock()


def _get_next_vma(priv: ProcMapsPrivate, last_pos: int) -> Any:
    if priv.mmap_locked:
        return vma_next(priv.iter)
    # Not more than one at a time: the next one's writer may hold mmap_lock and wait for this one's reader.
    unlock_ctx_vma(priv)
    vma = lock_next_vma(priv.mm, priv.iter, last_pos)
    if vma is not None and not isinstance(vma, int):
        priv.locked_vma = vma
    return vma


def fallback_to_mmap_lock(priv: ProcMapsPrivate, pos: int) -> bool:
    """A VMA has more readers than it can count: hold mmap_lock for the rest of this buffer. False if it is
    held
    already.
    """
    if priv.mmap_locked:
        return False
    rcu_read_unlock()
    mmap_read_lock(priv.mm)
    vma_iter_set(priv.iter, pos)
    priv.mmap_locked = True
    return True


def _show_map(m: SeqFile, vma: Any) -> int:
    show_map_vma(m, vma)
    return 0


VMA_LOCK: Final = MapsVariant(
    "vma-lock",
    "6.17: the read lock of each VMA while its line is printed",
    _lock_vma_range,
    _unlock_vma_range,
    _get_next_vma,
    _show_map,
)

# ------------------------------------------------------------------------------------- mmap_lock, before


def _lock_mmap(priv: ProcMapsPrivate) -> int:
    error = mmap_read_lock_killable(priv.mm)
    priv.mmap_locked = not error
    return error


MMAP_LOCK: Final = MapsVariant(
    "mmap-lock",
    "before 6.17: mmap_lock for each buffer of text",
    _lock_mmap,
    _unlock_vma_range,
    _get_next_vma,
    _show_map,
)


def maps_variants() -> dict[str, MapsVariant]:
    """The ways to read maps, by name; the kernel's own first."""
    from kmodel.proc.snapshot import SNAPSHOT

    return {variant.name: variant for variant in (VMA_LOCK, MMAP_LOCK, SNAPSHOT)}


# ----------------------------------------------------------------------------------------------- the iterator


def m_start(m: SeqFile) -> Any:
    """Begin a buffer at m.index: the VMA there, None, or a negative errno."""
    priv: ProcMapsPrivate = m.private
    if m.index == SENTINEL_VMA_END:
        return None
    if priv.mm is None or not mmget_not_zero(priv.mm):
        return None
    error = priv.variant.lock_vma_range(priv)
    if error:
        mmput(priv.mm)
        return error
    priv.in_use = True
    # The VMA that was fetched last may not have been printed: from its beginning again.
    if m.index > 0:
        m.index = priv.last_pos
    priv.iter = vma_iter_init(priv.mm, max(m.index, 0))
    if m.index == SENTINEL_VMA_GATE:
        return get_gate_vma(priv.mm)
    return proc_get_vma(m)


def proc_get_vma(m: SeqFile) -> Any:
    """The VMA at m.index, or behind; m.index goes to its end (T2)."""
    priv: ProcMapsPrivate = m.private
    while True:
        vma = priv.variant.get_next_vma(priv, m.index)
        if not isinstance(vma, int):
            break
        if vma != -EAGAIN or not fallback_to_mmap_lock(priv, m.index):
            return vma
    priv.last_pos = m.index
    if vma is None:
        m.index = SENTINEL_VMA_GATE
        return get_gate_vma(priv.mm)
    # Its end, not its start: it may have been merged with its successor when we come back.
    m.index = vma.vm_end
    return vma


def m_next(m: SeqFile, _vma: Any) -> Any:
    """The VMA behind the one that was printed."""
    if m.index == SENTINEL_VMA_GATE:
        m.index = SENTINEL_VMA_END
        return None
    return proc_get_vma(m)


def m_stop(m: SeqFile) -> None:
    """End of the buffer: let go of everything."""
    priv: ProcMapsPrivate = m.private
    if priv.in_use:
        priv.in_use = False
        priv.variant.unlock_vma_range(priv)
        mmput(priv.mm)


def _show(m: SeqFile, vma: Any) -> int:
    return m.private.variant.show(m, vma)  # type: ignore[no-any-return]


proc_pid_maps_op: Final = SeqOperations(m_start, m_stop, m_next, _show)


# ------------------------------------------------------------------------------------------------ the file


def proc_maps_open(mm: MmStruct | None, variant: str = "vma-lock") -> SeqFile:
    """open("/proc/PID/maps"): holds the struct, not the address space. ValueError for an unknown variant."""
    chosen = maps_variants().get(variant)
    if chosen is None:
        raise ValueError(f"variant={variant!r}: must be one of {', '.join(maps_variants())}")
    if mm is not None:  # a kernel thread has none
        mmgrab(mm)
    return SeqFile(proc_pid_maps_op, ProcMapsPrivate(mm, chosen))


def proc_maps_read(m: SeqFile, n: int) -> bytes:
    """read(2): up to n bytes, none at the end. OSError(EINTR) for a killed task."""
    data = seq_read(m, n)
    if not current().held_locks:
        task_work_run()  # system calls end with it: files may have lost their last reference here
    if isinstance(data, int):
        raise OSError(-data, os.strerror(-data))
    return data


def proc_map_release(m: SeqFile) -> None:
    """close(2)."""
    if m.private.mm is not None:
        mmdrop(m.private.mm)


def proc_maps_reads(mm: MmStruct | None, size: int = 1 << 16, variant: str = "vma-lock") -> Iterator[bytes]:
    """What one read of `size` bytes after the other gives, up to the end."""
    m = proc_maps_open(mm, variant)
    try:
        while data := proc_maps_read(m, size):
            yield data
    finally:
        proc_map_release(m)


def proc_maps(mm: MmStruct | None, variant: str = "vma-lock") -> str:
    """What /proc/PID/maps says of the address space; empty when its last user is gone.

    Read like a file, a buffer at a time: between two buffers nothing is held.
    """
    return os.fsdecode(b"".join(proc_maps_reads(mm, variant=variant)))
