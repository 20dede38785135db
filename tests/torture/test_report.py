"""The verdict of a run, and how it is written down."""

import json
import os
from pathlib import Path
from typing import Any

import attrs
import pytest

from kmodel.torture.oracle import Violation
from kmodel.torture.report import HARD_PATHS, SHORT_RUN_SECONDS, Report, check_writable

VIOLATION = Violation("P1", "wrong", "hit/0", 1.5, ("fact",), ("step",))


def report(**changes: Any) -> Report:
    """A clean report of a run long enough, with changes."""
    clean = Report(
        seed=7,
        threads=8,
        seconds=10.0,
        elapsed=10.0,
        source="own process",
        python="3.13",
        parallel=True,
        removed_guards=(),
        probes={},
        counts=dict.fromkeys(HARD_PATHS, 1),
        ledger={},
        violations=(),
    )
    return attrs.evolve(clean, **changes)


@pytest.mark.parametrize(
    ("changes", "verdict", "status"),
    [
        ({}, "clean", 0),
        ({"violations": (VIOLATION,)}, "violation", 1),
        ({"counts": {}}, "incomplete", 1),
        ({"counts": {}, "elapsed": SHORT_RUN_SECONDS - 0.1}, "clean", 0),
        ({"counts": {}, "violations": (VIOLATION,)}, "violation", 1),
    ],
)
def test_the_verdict(changes: dict[str, Any], verdict: str, status: int) -> None:
    """A violation is one whatever else; hard paths must be met unless the run was short."""
    judged = report(**changes)

    assert (judged.verdict, judged.exit_status) == (verdict, status)


def test_json_has_everything() -> None:
    """The report for machines: verdict, counts, violations with their steps."""
    content = json.loads(report(violations=(VIOLATION,)).as_json())

    assert content["verdict"] == "violation"
    assert content["seed"] == 7
    assert content["violations"][0]["timeline"] == ["step"]
    assert content["hard_paths_not_met"] == []


def test_a_place_that_cannot_be_written_is_found_out_early(tmp_path: Path) -> None:
    """A missing folder, or a folder in place of the file."""
    check_writable(str(tmp_path / "fine.json"))
    for path in (tmp_path / "missing" / "report.json", tmp_path):
        with pytest.raises(OSError, match=r"No such file|is a directory"):
            check_writable(str(path))
    assert os.listdir(tmp_path) == []


def test_a_device_can_be_written_whatever_is_beside_it(tmp_path: Path) -> None:
    """A pipe, also behind a link, is written to later and not replaced; nothing is left beside it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")

    check_writable(str(tmp_path / "link"))

    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]
