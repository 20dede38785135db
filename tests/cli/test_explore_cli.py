"""`kmodel explore` and `kmodel replay`."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kmodel.cli.main import main
from kmodel.cli.progress import ProgressLine, Stopper, describe, duration
from kmodel.explore.progress import Progress
from kmodel.explore.tracefile import read_trace
from kmodel.hazards import catalogue, scenarios

FILE = '''
from kmodel.core import READ_ONCE, WRITE_ONCE, smp_load_acquire, smp_store_release, guards, variables
from kmodel.hazards import Scenario

BARRIER = guards.register("test-cli-barrier", "message passing, for tests/cli")

def setup():
    return variables(data=0, flag=0)

def writer(v):
    WRITE_ONCE(v, "data", 42)
    if BARRIER in guards.removed:
        WRITE_ONCE(v, "flag", 1)
    else:
        smp_store_release(v, "flag", 1)

def reader(v):
    if smp_load_acquire(v, "flag"):
        assert READ_ONCE(v, "data") == 42, "the flag was set but the data was not there"

def message():
    return Scenario(name="message", summary="Data, then a flag.", hazards="H17", setup=setup,
                    threads=[writer, reader], without=BARRIER, breaks="assertion")

def bump(v):
    for _ in range(3):
        WRITE_ONCE(v, "data", READ_ONCE(v, "data") + 1)

def endless():
    """A search of hours."""
    return {"setup": setup, "threads": [bump] * 6, "memory": "sc"}

def unpassed():
    """No guard to remove."""
    return {"setup": setup, "threads": [reader]}

def bad_setup():
    return {"setup": lambda: variables(data=0) + 1, "threads": [reader]}

def bad_body():
    return {"setup": setup, "threads": [lambda v: undefined]}

state = []

def leaky_body(v):
    state.append(0)
    for _ in state:
        READ_ONCE(v, "data")
    WRITE_ONCE(v, "data", 1)

def leaky():
    """It remembers earlier executions."""
    return {"setup": setup, "threads": [leaky_body, leaky_body]}
'''


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of scenarios; the test runs beside it."""
    scenarios()
    monkeypatch.setattr(catalogue, "_registered", dict(catalogue._registered))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


@pytest.mark.usefixtures("file")
def test_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """A scenario that holds says PASS and what that rests on, with exit status 0."""
    status = main(["explore", "mine.py:message"])
    out = capsys.readouterr().out

    assert status == 0
    assert out.startswith("message (H17): Data, then a flag.\nmemory model lkmm\n")
    assert "PASS: nothing breaks, and everything was looked at: 2 executions in" in out


@pytest.mark.usefixtures("file")
def test_the_broken_twin(capsys: pytest.CaptureFixture[str]) -> None:
    """Without its guard the scenario fails, the timeline shows the stale read, and the exit status is 1."""
    status = main(["explore", "mine.py:message", "--broken"])
    out = capsys.readouterr().out

    assert status == 1
    assert "without test-cli-barrier" in out
    assert "FAIL: an assertion failed: the flag was set but the data was not there" in out
    assert "stale" in out
    assert "NOT AS EXPECTED" not in out


@pytest.mark.usefixtures("file")
def test_a_model_without_the_weakness(capsys: pytest.CaptureFixture[str]) -> None:
    """Under sc the broken twin passes; the catalogue speaks of another memory model, which is said."""
    status = main(["explore", "mine.py:message", "--without-guard", "--memory", "sc"])
    out = capsys.readouterr().out

    assert status == 0
    assert "memory model sc, without test-cli-barrier" in out
    assert "the catalogue says FAIL (assertion) of lkmm" in out
    assert "NOT AS EXPECTED" not in out


@pytest.mark.usefixtures("file")
def test_an_error_in_a_task_is_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception of a task is a violation of the scenario, and says where it was raised."""
    status = main(["explore", "mine.py:bad_body"])
    out = capsys.readouterr().out

    assert status == 1
    assert "FAIL: error: NameError: name 'undefined' is not defined (mine.py:41 in <lambda>)" in out


@pytest.mark.usefixtures("file")
def test_a_bound_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """A search that a bound ended says BOUNDED and which, with exit status 3."""
    status = main(["explore", "mine.py:message", "--max-executions", "1"])
    out = capsys.readouterr().out

    assert status == 3
    assert "BOUNDED" in out
    assert "PASS:" not in out


@pytest.mark.usefixtures("file")
def test_a_model_that_is_not_deterministic(capsys: pytest.CaptureFixture[str]) -> None:
    """A model that remembers earlier executions is told so, with exit status 3."""
    status = main(["explore", "mine.py:leaky"])
    out = capsys.readouterr().out

    assert status == 3
    assert "INCONCLUSIVE" in out


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("name", ["out.json", "out.html"])
def test_what_is_written_replays(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both the JSON file and the page replay, to the same violation, and name what to run."""
    option = "--json" if name.endswith("json") else "--html"

    assert main(["explore", "mine.py:message", "--broken", option, name]) == 1
    out = capsys.readouterr().out
    assert f"again: kmodel replay {name}" in out

    trace = read_trace(name)
    assert (trace["scenario"], trace["target"], trace["memory"]) == ("message", "mine.py:message", "lkmm")
    assert trace["removed_guards"] == ["test-cli-barrier"]
    assert trace["violation"]["kind"] == "assertion"

    assert main(["replay", name]) == 1
    out = capsys.readouterr().out
    assert "the flag was set but the data was not there" in out
    assert "(as when it was saved)" in out


@pytest.mark.usefixtures("file")
def test_a_replayed_trace_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Replaying and saving again gives an equal document, but for how it was found."""
    assert main(["explore", "mine.py:message", "--broken", "--json", "a.json"]) == 1
    assert main(["replay", "a.json", "--json", "b.json"]) == 1
    first, second = read_trace("a.json"), read_trace("b.json")
    first.pop("search", None)
    second.pop("search", None)

    assert first == second


def test_a_repaired_program(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the program was repaired a replay says that nothing breaks, or that it is another program now."""
    assert main(["explore", "mine.py:message", "--broken", "--json", "a.json"]) == 1
    file.write_text(FILE.replace('"flag"):\n        assert', '"flag"):\n        assert True or'))
    capsys.readouterr()
    status = main(["replay", "a.json"])
    out = capsys.readouterr().out

    assert status in (0, 3)
    assert "nothing breaks any more" in out or "cannot be repeated" in out


@pytest.mark.usefixtures("file")
def test_json_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json - only the document is on standard output."""
    assert main(["explore", "mine.py:message", "--broken", "--json", "-"]) == 1
    captured = capsys.readouterr()

    assert json.loads(captured.out)["format"] == "kmodel-trace-1"
    assert "FAIL" in captured.err


@pytest.mark.usefixtures("file")
def test_nothing_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    """If nothing breaks no file is written, and that is said."""
    assert main(["explore", "mine.py:message", "--json", "a.json", "--html", "a.html"]) == 0
    assert "no execution that breaks anything was found, so none was written" in capsys.readouterr().out
    assert not Path("a.json").exists()
    assert not Path("a.html").exists()


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["explore"], "name a scenario or FILE.py:FUNCTION"),
        (["explore", "no-such-thing"], "there is no scenario 'no-such-thing'"),
        (["explore", "gone.py:f"], "there is no file gone.py"),
        (["explore", "mine.py:mesage"], "did you mean message?"),
        (["explore", "mine.py:unpassed", "--broken"], "unpassed has no broken twin"),
        (["explore", "mine.py:message", "--break", "nothing"], "--break nothing: no such guard"),
        (["explore", "mine.py:message", "--strategy", "luck"], "luck"),
        (
            ["explore", "mine.py:message", "--json", "/no/such/folder/a.json"],
            "--json /no/such/folder/a.json: No such",
        ),
        (
            ["explore", "mine.py:bad_setup"],
            "mine.py:bad_setup cannot be explored: TypeError: unsupported operand",
        ),
        (["replay", "gone.json"], "gone.json: No such file"),
        (["replay", "mine.py"], "mine.py is not a trace: it is not JSON"),
    ],
)
def test_bad_usage_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be run is one line on standard error and exit status 2."""
    status = main(arguments)
    captured = capsys.readouterr()

    assert status == 2
    assert told in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--memory", "alpha"],
        ["--max-executions", "0"],
        ["--seconds", "nan"],
        ["--seconds", "-1"],
        ["--preemptions", "-1"],
        ["--preemptions", "x"],
    ],
)
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Options outside their range are refused with exit status 2 in one line."""
    with pytest.raises(SystemExit) as caught:
        main(["explore", "x", *arguments])

    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    """--list prints a line for each scenario of the catalogue."""
    assert main(["explore", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert [line.split()[0] for line in lines] == list(scenarios())
    assert all(line.endswith(found.summary) for line, found in zip(lines, scenarios().values(), strict=True))


@pytest.mark.slow
def test_ctrl_c_gives_what_there_is(file: Path) -> None:
    """Ctrl-C ends a long search with a summary of what was looked at, and no pass."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kmodel.cli", "explore", "mine.py:endless"],
        cwd=file.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    while "memory model" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)

    assert process.returncode == 3
    assert "BOUNDED: nothing breaks so far, but not everything was looked at (" in out
    assert "executions in" in out
    assert "Traceback" not in err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_in_place_on_a_terminal() -> None:
    """On a terminal progress is one line, rewritten and finally taken away; short searches show none."""
    out = _Terminal()
    line = ProgressLine(Stopper(), out)
    line(Progress(10, 0, 0.5, 0.5))

    assert out.getvalue() == ""

    line(Progress(1000, 5, 2.0, 0.25))
    line.clear()

    assert out.getvalue() == (
        "\r\033[K1,000 executions in 2.0 s, 502/s (5 cut short as redundant), at least 6.0 s left\r\033[K"
    )


def test_progress_elsewhere_is_a_line_now_and_then() -> None:
    """Into a file progress is whole lines, ten seconds apart."""
    out = io.StringIO()
    line = ProgressLine(Stopper(), out)
    for n in range(5):
        line(Progress(1000 + n, 0, 2.0, None))
    line.clear()

    assert out.getvalue() == "1,000 executions in 2.0 s, 500/s\n"


def test_the_first_ctrl_c_asks_the_second_insists() -> None:
    """The first Ctrl-C makes progress say stop, a second is a KeyboardInterrupt; then all is as before."""
    stopper = Stopper()
    line = ProgressLine(stopper, io.StringIO())
    before = signal.getsignal(signal.SIGINT)
    with stopper.listening():
        assert line(Progress(1, 0, 0.1, None)) is True
        signal.raise_signal(signal.SIGINT)
        assert line(Progress(1, 0, 0.1, None)) is False
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.012, "12 ms"), (3.21, "3.2 s"), (125, "2 min"), (7200, "2.0 h"), (86400 * 3, "3 days")],
)
def test_durations_are_in_a_fitting_unit(seconds: float, text: str) -> None:
    """Times are shown in the unit a person would choose."""
    assert duration(seconds) == text


def test_an_estimate_is_called_one() -> None:
    """What is left is a lower bound, and left out where it cannot be told."""
    assert describe(Progress(100, 0, 1.0, 0.5)).endswith(", at least 1.0 s left")
    assert "left" not in describe(Progress(100, 0, 1.0, None))
