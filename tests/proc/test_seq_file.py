"""seq_file: where reads end, and what becomes of records that do not fit."""

from errno import EINTR

import pytest

from kmodel.proc import SeqFile, SeqOperations, mangle_path, seq_read
from kmodel.proc.seq_file import SEQ_SKIP, seq_pad, seq_setwidth, seq_write


class Records:
    """An iterator over given records; an int is an error that show() returns."""

    def __init__(self, *records):
        self.records = records
        self.open = 0
        self.starts = 0

    def start(self, m):
        self.open += 1
        self.starts += 1
        return self.at(m)

    def at(self, m):
        return (m.index,) if m.index < len(self.records) else None

    def next(self, m, _record):
        m.index += 1
        return self.at(m)

    def stop(self, _m):
        self.open -= 1

    def show(self, m, record):
        data = self.records[record[0]]
        if isinstance(data, int):
            return data
        seq_write(m, data)
        return 0


def opened(*records, size=16):
    records = Records(*records)
    return records, SeqFile(
        SeqOperations(records.start, records.stop, records.next, records.show), None, size=size
    )


def all_reads(m, n):
    reads = []
    while data := seq_read(m, n):
        reads.append(data)
    return reads


@pytest.mark.parametrize(
    ("n", "reads"),
    [
        (100, [b"aaaaabbbbbccccc", b"ddddd"]),  # whole records, less than a buffer
        (16, [b"aaaaabbbbbccccc", b"ddddd"]),
        (15, [b"aaaaabbbbbccccc", b"ddddd"]),
        (7, [b"aaaaabb", b"bbbcccc", b"cddddd"]),
        (5, [b"aaaaa", b"bbbbb", b"ccccc", b"ddddd"]),
        (3, [b"aaa", b"aab", b"bbb", b"bcc", b"ccc", b"ddd", b"dd"]),
    ],
)
def test_where_reads_end(n, reads):
    """Q1: at the end of a record, or where the reader's buffer does; the last byte of ours stays free."""
    records, m = opened(b"aaaaa", b"bbbbb", b"ccccc", b"ddddd")
    assert all_reads(m, n) == reads
    assert records.open == 0


def test_a_record_longer_than_the_buffer_doubles_it():
    """As often as it takes, and nothing is lost."""
    records, m = opened(b"a" * 40, b"b")
    assert all_reads(m, 100) == [b"a" * 40 + b"b"]
    assert (m.size, records.open) == (64, 0)


def test_records_may_be_skipped_or_empty():
    """SEQ_SKIP and records without text leave nothing behind, wherever they are."""
    _records, m = opened(SEQ_SKIP, b"", b"a", SEQ_SKIP, b"", b"b", SEQ_SKIP)
    assert all_reads(m, 100) == [b"ab"]


def test_an_error_is_returned_when_nothing_was_read():
    """The text before it comes first."""
    records, m = opened(b"a", -EINTR, b"b")
    assert seq_read(m, 100) == b"a"
    assert seq_read(m, 100) == -EINTR
    assert records.open == 0


def test_padding_is_at_least_one_space():
    """seq_setwidth() counts from where it was called."""
    _records, m = opened()
    for text in (b"ab", b"abcdefg"):
        seq_setwidth(m, 4)
        seq_write(m, text)
        seq_pad(m, b"|")
    assert bytes(m.buf) == b"ab  |abcdefg|"


def test_only_the_named_bytes_are_escaped():
    r"""A newline is \012, a backslash stays."""
    assert mangle_path(b"/a\nb\\012 c", b"\n") == b"/a\\012b\\012 c"
