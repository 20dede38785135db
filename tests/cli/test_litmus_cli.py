"""`kmodel litmus`."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kmodel.cli.main import main

BOTH = {"x": 1, "y": 1}
STORE_BUFFERING: dict[str, Any] = {
    "name": "sb",
    "vars": ["x", "y"],
    "threads": [
        [["W", "x", 1, "once"], ["R", "r0", "y", "once"]],
        [["W", "y", 1, "once"], ["R", "r0", "x", "once"]],
    ],
    "allowed": [{**BOTH, "0:r0": a, "1:r0": b} for a in (0, 1) for b in (0, 1)],
}
FENCED: dict[str, Any] = {
    "name": "sb-mb",
    "vars": ["x", "y"],
    "threads": [[thread[0], ["F", "mb"], thread[1]] for thread in STORE_BUFFERING["threads"]],
    "allowed": [{**BOTH, "0:r0": a, "1:r0": b} for a in (0, 1) for b in (0, 1) if a or b],
}


def _file(folder: Path, *tests: dict[str, Any]) -> str:
    path = folder / "tests.json"
    path.write_text(json.dumps({"tests": tests}))
    return str(path)


def test_tests_that_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests whose states are those allowed are a line each, and the exit status is 0."""
    status = main(["litmus", _file(tmp_path, STORE_BUFFERING, FENCED)])
    lines = capsys.readouterr().out.splitlines()

    assert status == 0
    assert lines[0].startswith("agrees     sb               4 of 4 states")
    assert lines[1].startswith("agrees     sb-mb            3 of 3 states")
    assert lines[-1] == "AGREE"


def test_a_forbidden_and_a_missing_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state that is seen but not allowed, and one that is allowed but not seen, are marked in the table."""
    wrong = {**STORE_BUFFERING, "allowed": [*FENCED["allowed"], {**BOTH, "0:r0": 7, "1:r0": 7}]}
    status = main(["litmus", _file(tmp_path, wrong, FENCED)])
    out = capsys.readouterr().out

    assert status == 1
    assert "DISAGREES  sb               3 of 4 states, 1 FORBIDDEN, 1 MISSING" in out
    assert "0     0     1  1  yes   no       <-- FORBIDDEN" in out
    assert "7     7     1  1  no    yes      <-- MISSING" in out
    assert "DISAGREE: sb\n" in out


def test_one_test_with_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--test runs only that test and shows every state."""
    status = main(["litmus", _file(tmp_path, STORE_BUFFERING, FENCED), "--test", "*-mb"])
    out = capsys.readouterr().out

    assert status == 0
    assert "0:r0  1:r0  x  y  seen  allowed" in out
    assert out.count("yes   yes") == 3
    assert "1 of 1 tests" in out


def test_under_a_stronger_model_states_may_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """sc cannot show store buffering; that is no disagreement, and the table says why."""
    status = main(["litmus", _file(tmp_path, STORE_BUFFERING), "--memory", "sc", "--test", "sb"])
    out = capsys.readouterr().out

    assert status == 0
    assert "3 of 4 states" in out
    assert "(not under sc)" in out


def test_a_bound_is_no_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A search that a bound ended has exit status 3, and its missing states are not held against it."""
    status = main(["litmus", _file(tmp_path, STORE_BUFFERING), "--max-executions", "1"])
    out = capsys.readouterr().out

    assert status == 3
    assert out.startswith("bounded    sb               1 of 4 states, 1 executions")
    assert "NOTHING DISAGREES, but 1 of them hit a bound" in out
    assert "AGREE\n" not in out


def test_without_a_list_of_allowed_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A test that does not say what is allowed is run and its states shown."""
    test = {key: value for key, value in STORE_BUFFERING.items() if key != "allowed"}
    status = main(["litmus", _file(tmp_path, test), "--test", "sb"])
    out = capsys.readouterr().out

    assert status == 0
    assert out.startswith("ran        sb               4 states")


def test_compressed_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A gzipped file is read as it is."""
    path = tmp_path / "tests.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"tests": [FENCED]}).encode()))

    assert main(["litmus", str(path)]) == 0
    assert "AGREE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "more", "told"),
    [
        (None, [], "No such file"),
        ("{", [], "is not a litmus file"),
        ('{"tests": []}', [], "has no tests"),
        (json.dumps({"tests": [FENCED]}), ["--test", "mp"], "has no test mp"),
        (json.dumps({"tests": [{**FENCED, "threads": [[["Q"]]]}]}), [], "test sb-mb"),
        (json.dumps({"tests": [{**FENCED, "threads": [[["R", "r0", "z", "once"]]]}]}), [], "test sb-mb"),
    ],
)
def test_bad_usage_is_one_line(
    content: str | None, more: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be run is one line on standard error and exit status 2."""
    path = tmp_path / "tests.json"
    if content is not None:
        path.write_text(content)
    status = main(["litmus", str(path), *more])
    captured = capsys.readouterr()

    assert status == 2
    assert told in captured.err
    assert captured.err.count("\n") == 1
