"""The command line: what it accepts, what it refuses, and with which words and exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kmodel
from kmodel.cli import main as cli
from kmodel.cli import stress
from kmodel.torture import AIMED_AT


def status_of(*argv: str) -> int:
    """The exit status, whether main returns it or argparse exits."""
    try:
        return cli.main(argv)
    except SystemExit as exited:
        return int(exited.code or 0)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`kmodel --version` prints the package's version."""
    assert status_of("--version") == 0
    assert capsys.readouterr().out == f"kmodel {kmodel.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "kmodel: the following arguments are required: COMMAND"),
        (["dance"], "kmodel: argument COMMAND: invalid choice: 'dance'"),
        (["stress", "--seconds", "0"], "kmodel stress: argument --seconds: 0: between 0 and 604800"),
        (["stress", "--seconds", "soon"], "'soon' is not a number of seconds"),
        (["stress", "--threads", "1"], "argument --threads: 1: from 2 to 512 threads"),
        (["stress", "--seed", "-1"], "argument --seed: -1: a seed is a number from 0"),
        (["stress", "--pid", "x"], "argument --pid: 'x' is not a number"),
        (["stress", "--pid", "1", "--maps", "f"], "--maps: not allowed with argument --pid"),
        (["stress", "--pid", "4194999"], "kmodel stress: there is no process 4194999"),
        (["stress", "--maps", "/nonexistent/maps"], "/nonexistent/maps cannot be read: No such file"),
        (["stress", "--break", "everything"], "--break everything: no such guard; --break list names them"),
        (["stress", "--probe", "main"], "probe 'main': expected PATH:SYMBOL"),
        (["stress", "--probe", "/nonexistent:main"], "there is no file /nonexistent"),
        (["stress", "--json", "/nonexistent/report"], "--json /nonexistent/report: No such file"),
    ],
)
def test_bad_usage_is_one_line_and_exit_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], complaint: str
) -> None:
    """What was wrong is named, in one line on standard error."""
    assert status_of(*argv) == 2

    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


def test_guards_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """`kmodel guards` and `--break list` name every guard, among them those the stress is aimed at."""
    assert status_of("guards", "--json") == 0
    guards = json.loads(capsys.readouterr().out)
    assert status_of("guards") == 0
    table = capsys.readouterr().out
    assert status_of("stress", "--break", "list") == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}

    assert set(guards) >= AIMED_AT
    assert listed == set(guards)
    assert all(name in table for name in AIMED_AT)
    assert {name for name, about in guards.items() if about["stress"]} == set(AIMED_AT)


def test_a_gil_switched_back_on_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a free-threaded build that lost its freedom the command says so and exits with 2."""
    monkeypatch.setattr(stress, "gil_was_reenabled", lambda: True)

    assert status_of("stress") == 2
    assert "GIL switched on" in capsys.readouterr().err


def test_nothing_on_the_way_to_a_run_switches_the_gil_on() -> None:
    """Importing the whole command leaves the GIL as the interpreter was built."""
    code = (
        "from kmodel.cli.main import build_parser; import kmodel.core as core, sys; build_parser(); "
        "sys.exit(core.gil_was_reenabled())"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_whoever_reads_the_output_may_leave(tmp_path: Path) -> None:
    """A closed pipe ends the command without a traceback."""
    code = "import sys; from kmodel.cli.main import main; sys.exit(main(['guards']))"

    done = subprocess.run(
        f'{sys.executable} -c "{code}" | true',
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stderr == ""


def test_ctrl_c_while_the_command_is_still_loading() -> None:
    """Whoever presses Ctrl-C at once gets one line, not the traceback of an import."""
    code = (
        "import sys\n"
        "from kmodel.cli.main import main\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'kmodel.mm': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "sys.exit(main(['guards']))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stderr) == (130, "interrupted\n")
