"""Reading maps with no lock at all: copy the VMA, hold its file, and look whether anything changed.

Models:      get_vma_snapshot() of the series "mm/maps: read proc/pid/maps under RCU" (2024, never merged) as
             it was talked over in seed 001: get_file_active() for the path, a recheck before it is printed
             and one before the text is handed out
Guards:      RCU for the memory of VMAs and files; mm_lock_seq vouches for what was read (twice)
Invariants:  S1 a line is printed from a copy whose fields all were the VMA's at one moment
             S2 the path printed is of a file that is held, and that was mapped there at that moment
Leaves out:  references to anon_vma_name
Read next:   mm/mmap_lock.py, mmap_lock_speculate_retry()

A copy that fails its check is thrown away, and the reader waits for the writer by taking mmap_lock for a
moment.
The series tried again without end; here a buffer that failed SNAPSHOT_TRIES times goes on under mmap_lock.
"""

from errno import EAGAIN
from typing import Any, Final

import attrs

from kmodel.core import data_race, guards
from kmodel.fs import fput, get_file_active
from kmodel.mm import (
    mmap_lock_speculate_retry,
    mmap_lock_speculate_try_begin,
    mmap_read_lock_killable,
    mmap_read_unlock,
    vma_iter_set,
    vma_next,
)
from kmodel.proc.maps import MapsVariant, ProcMapsPrivate, proc_get_vma
from kmodel.proc.seq_file import SEQ_SKIP, SeqFile, seq_cut
from kmodel.proc.show_map import get_gate_vma, show_map_vma
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

SNAPSHOT_TRIES: Final = 16

_FILE = guards.register(
    "maps-snapshot-file-ref",
    "S2: the copied vm_file is not held; by the time its path is printed it is another file's",
)
_RECHECK = guards.register(
    "maps-snapshot-recheck",
    "S1: the copy is not checked before it is used; its fields are of two moments, or of two VMAs",
)
_FINAL = guards.register(
    "maps-snapshot-final-recheck",
    "S1: the text is handed out unchecked; what it says of the heap is of another moment than the rest",
)


@attrs.define(eq=False)
class VmaSnapshot:
    """The fields of a VMA that its line is made of; private to the reader."""

    vm_start: int
    vm_end: int
    vm_mm: Any
    vm_flags: int
    vm_pgoff: int
    vm_ops: Any
    vm_private_data: Any
    anon_name: str | None
    vm_file: Any = None
    file_held: bool = False


def _copy(vma: Any) -> VmaSnapshot:
    # The series' memcpy(): plain loads that race with a writer on purpose.
    return VmaSnapshot(
        vma.vm_start,
        vma.vm_end,
        vma.vm_mm,
        vma.vm_flags,
        vma.vm_pgoff,
        vma.vm_ops,
        vma.vm_private_data,
        vma.anon_name,
        vma.vm_file,
    )


def get_vma_snapshot(priv: ProcMapsPrivate, vma: Any) -> int:
    """Copy the VMA to priv.vma_copy and hold its file: 0, -EAGAIN (it changed: look it up again), -EINTR."""
    copy = data_race(lambda: _copy(vma))
    if _FILE not in guards.removed:
        # Not get_file_rcu(), which would try for ever if the file is on its way out: the recheck judges.
        copy.vm_file = get_file_active(vma, "vm_file")
        copy.file_held = copy.vm_file is not None
    # RMB: pairs with WMB after the writer's seq++. Only now is it known that the file was opened for this
    # mapping, and that it has a path.
    if _RECHECK in guards.removed or not mmap_lock_speculate_retry(priv.mm, priv.mm_wr_seq):
        priv.vma_copy = copy
        return 0
    priv.vma_copy = copy
    put_vma_snapshot(priv)
    return _sample_again(priv) or -EAGAIN


def put_vma_snapshot(priv: ProcMapsPrivate) -> None:
    """Let go of the copy's file."""
    copy, priv.vma_copy = priv.vma_copy, None
    if copy is not None and copy.file_held:
        fput(copy.vm_file)


def _sample_again(priv: ProcMapsPrivate) -> int:
    """_wait_for_writer() from inside RCU, which is left, and entered again if mmap_lock is not kept."""
    rcu_read_unlock()
    error = _wait_for_writer(priv)
    if not priv.mmap_locked:
        rcu_read_lock()
    return error


def _wait_for_writer(priv: ProcMapsPrivate) -> int:
    """A new sample, taken while no writer can be at work: 0 or -EINTR. Outside RCU. Keeps mmap_lock if it was
    tried too often.
    """
    error = mmap_read_lock_killable(priv.mm)
    if error:
        return error
    priv.mm_wr_seq = mmap_lock_speculate_try_begin(priv.mm)[1]
    priv.tries += 1
    priv.mmap_locked = priv.tries > SNAPSHOT_TRIES
    if not priv.mmap_locked:
        mmap_read_unlock(priv.mm)
    return 0


def _lock_vma_range(priv: ProcMapsPrivate) -> int:
    priv.mmap_locked, priv.vma_copy, priv.tries = False, None, 0
    began, priv.mm_wr_seq = mmap_lock_speculate_try_begin(priv.mm)
    error = 0 if began else _wait_for_writer(priv)
    if not error:
        rcu_read_lock()
    return error


def _unlock_vma_range(priv: ProcMapsPrivate) -> None:
    put_vma_snapshot(priv)
    if priv.mmap_locked:
        priv.mmap_locked = False
        mmap_read_unlock(priv.mm)
    else:
        rcu_read_unlock()


def _get_next_vma(priv: ProcMapsPrivate, last_pos: int) -> Any:
    put_vma_snapshot(priv)
    while True:
        vma = vma_next(priv.iter)
        if vma is None or priv.mmap_locked:
            return vma
        error = get_vma_snapshot(priv, vma)
        if not error:
            return priv.vma_copy
        if error != -EAGAIN:
            return error
        vma_iter_set(priv.iter, last_pos)


def _show_map(m: SeqFile, vma: Any) -> int:
    """Print the copy; should it be out of date by then, print what is there now instead."""
    priv: ProcMapsPrivate = m.private
    before = len(m.buf)
    while True:
        show_map_vma(m, vma)
        if priv.mmap_locked or vma is get_gate_vma(priv.mm) or _FINAL in guards.removed:
            return 0
        put_vma_snapshot(priv)
        if not mmap_lock_speculate_retry(priv.mm, priv.mm_wr_seq):
            return 0
        seq_cut(m, before)
        error = _sample_again(priv)
        if error:
            return error
        m.index = priv.last_pos
        vma_iter_set(priv.iter, m.index)
        vma = proc_get_vma(m)
        if isinstance(vma, int):
            return vma
        if vma is None:
            return SEQ_SKIP


SNAPSHOT: Final = MapsVariant(
    "snapshot",
    "2024, not merged: a copy of each VMA, checked by mm_lock_seq",
    _lock_vma_range,
    _unlock_vma_range,
    _get_next_vma,
    _show_map,
)
