"""seq_file: a text of records that is made while it is read, a buffer at a time.

Models:      fs/seq_file.c, seq_read_iter, seq_write, seq_pad, seq_path, mangle_path; include/linux/seq_file.h
             (7.2)
Guards:      one reader at a time has the file (the kernel: m->lock)
Invariants:  Q1 a read ends at the end of a record, or where the reader's buffer does: what is left over is
             handed out by the next one
             Q2 between start() and stop() the iterator may hold locks, between reads it holds none
Leaves out:  lseek and pread (traverse), splice, faults of the reader's memory
Read next:   proc/maps.py

A record that does not fit any more is thrown away and made again for the next read; one that does not fit an
empty buffer doubles it.
"""

from collections.abc import Callable
from typing import Any, Final

import attrs

from kmodel.mm import PAGE_SIZE

SEQ_SKIP: Final = 1


@attrs.frozen(eq=False)
class SeqOperations:
    """struct seq_operations. The iterator's place is m.index; start and next give a record, None at the end,
    or
    a negative errno; show 0, SEQ_SKIP or a negative errno.
    """

    start: Callable[["SeqFile"], Any]
    stop: Callable[["SeqFile"], None]
    next: Callable[["SeqFile", Any], Any]
    show: Callable[["SeqFile", Any], int]


@attrs.define(eq=False)
class SeqFile:
    """struct seq_file: of one open file, and so of one task at a time."""

    op: SeqOperations
    private: Any
    buf: bytearray = attrs.field(factory=bytearray)
    size: int = PAGE_SIZE
    index: int = 0
    pad_until: int = 0
    overflowed: bool = False
    # what the last read left of the buffer
    left: bytes = b""


# ------------------------------------------------------------------------------------------------ writing


def seq_has_overflowed(m: SeqFile) -> bool:
    """Whether something did not fit. The last byte of the buffer is never used."""
    return m.overflowed


def seq_write(m: SeqFile, data: bytes) -> None:
    """Append the bytes, or note that they do not fit."""
    if m.overflowed or len(m.buf) + len(data) >= m.size:
        m.overflowed = True
    else:
        m.buf += data


def seq_setwidth(m: SeqFile, width: int) -> None:
    """The next seq_pad() fills up to this many bytes from here."""
    m.pad_until = len(m.buf) + width


def seq_pad(m: SeqFile, char: bytes) -> None:
    """Spaces up to the width, then `char`."""
    seq_write(m, b" " * (m.pad_until - len(m.buf)))
    seq_write(m, char)


def mangle_path(path: bytes, escape: bytes) -> bytes:
    r"""The path with each byte that is in `escape` written as \ooo; a backslash itself is not escaped."""
    if not any(byte in escape for byte in path):
        return path
    return b"".join(b"\\%03o" % byte if byte in escape else bytes((byte,)) for byte in path)


def seq_cut(m: SeqFile, length: int) -> None:
    """Take back what was written behind `length`."""
    del m.buf[length:]
    m.overflowed = False


# ------------------------------------------------------------------------------------------------ reading


def seq_read(m: SeqFile, n: int) -> bytes | int:
    """read(2) of up to n bytes: empty at the end, or a negative errno."""
    copied = m.left[:n]
    m.left = m.left[n:]
    if m.left or len(copied) == n:
        return copied
    error = _fill(m, n - len(copied))
    more = bytes(m.buf[: n - len(copied)])
    m.left = bytes(m.buf[len(more) :])
    seq_cut(m, 0)
    copied += more
    return copied if copied or not error else error


def _fill(m: SeqFile, wanted: int) -> int:
    """Records from m.index on into the empty buffer, until `wanted` bytes are there or it is full: an errno
    if
    it ended early. The place is then behind the last record that was kept.
    """
    record = _first(m)
    if record is None or isinstance(record, int):
        m.op.stop(m)
        seq_cut(m, 0)
        return 0 if record is None else record
    while True:
        kept = len(m.buf)
        record = m.op.next(m, record)
        if record is None or isinstance(record, int):
            break
        if kept >= wanted:
            break
        shown = m.op.show(m, record)
        if shown > 0:
            seq_cut(m, kept)
        elif shown < 0 or m.overflowed:
            seq_cut(m, kept)
            break
    m.op.stop(m)
    return 0


def _first(m: SeqFile) -> Any:
    """Start, and show records until one has put something in the buffer; that one, None or an errno."""
    record = m.op.start(m)
    while record is not None and not isinstance(record, int):
        shown = m.op.show(m, record)
        if shown < 0:
            return shown
        if shown > 0:
            seq_cut(m, 0)
        if not m.overflowed:
            if m.buf:
                return record
            record = m.op.next(m, record)
            continue
        m.op.stop(m)
        seq_cut(m, 0)
        m.size <<= 1
        record = m.op.start(m)
    return record
