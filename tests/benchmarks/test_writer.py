"""The benchmark's writer, and what the command line makes of it."""

import time

import pytest

from benchmarks.harness import allowed_cpus
from benchmarks.uprobe_lookup import parse
from benchmarks.writer import Beside, Writer
from kmodel.core import boot
from kmodel.mm import MmStruct


class Scheme:
    """Something to time: it lasts until the writer has gone round three times more."""

    name = "a scheme"

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def prepare(self) -> None:
        pass

    def loop(self, prepared: None, n: int) -> None:
        began, deadline = self.writer.rounds, time.monotonic() + 10
        while self.writer.rounds < began + n and time.monotonic() < deadline:
            time.sleep(0.0001)


def test_the_writer_goes_round_beside_a_scheme_and_leaves_nothing() -> None:
    """Its rounds are counted while the scheme is timed, and what it mapped is unmapped when it ends."""
    boot()
    mm = MmStruct()
    with Writer(mm, allowed_cpus()[-1], 0.0001) as writer:
        beside = Beside(Scheme(writer), writer)
        beside.loop(beside.prepare(), 3)

    assert beside.rounds >= 3
    assert beside.seconds > 0
    assert mm.map_count == 0


def test_what_goes_wrong_in_the_writer_is_raised() -> None:
    """A writer that dies does not leave a measurement without one."""
    boot()
    writer = Writer(None, allowed_cpus()[-1], 0.0001)  # type: ignore[arg-type]

    with pytest.raises(AttributeError), writer:
        pass


def test_the_writer_has_a_processor_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a writer one thread less may hit, and its rest is a positive time."""
    monkeypatch.setattr("benchmarks.uprobe_lookup.allowed_cpus", lambda: [0, 1, 2, 3])

    assert parse([]).threads == [1, 2, 4]
    assert parse(["--writer", "1"]).threads == [1, 2]
    for wrong in (["--writer", "1", "--threads", "4"], ["--writer", "0"]):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "3 processors" in capsys.readouterr().err
