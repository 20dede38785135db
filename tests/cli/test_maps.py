"""`kmodel maps`: what it prints, compares and refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kmodel.cli import main as cli
from kmodel.cli import maps
from kmodel.proc import maps_variants, show_map

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/proc/self/maps").exists(), reason="there is no /proc here"
)


def status_of(*argv):
    """The exit status, whether main returns it or argparse exits."""
    try:
        return cli.main(argv)
    except SystemExit as exited:
        return int(exited.code or 0)


@pytest.fixture
def sleeper():
    """A process in which nothing happens."""
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        yield process.pid
        process.stdin.close()
        process.wait()


@pytest.mark.parametrize("variant", maps_variants())
def test_a_process_is_printed_byte_for_byte(sleeper, variant):
    """Standard output is /proc/PID/maps, whatever is in it."""
    done = subprocess.run(
        [sys.executable, "-m", "kmodel.cli", "maps", str(sleeper), "--variant", variant],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == Path(f"/proc/{sleeper}/maps").read_bytes()
    assert done.stderr == b""


def test_own_process_is_printed(capfdbinary):
    """`kmodel maps self` says what was there when it looked."""
    assert status_of("maps", "self") == 0
    assert b"[stack]\n" in capfdbinary.readouterr().out


def test_no_difference_is_status_0(sleeper, capsys):
    """With the counts of what was compared, and the kernel's version."""
    assert status_of("maps", str(sleeper), "--check") == 0
    said = capsys.readouterr().out
    lines = Path(f"/proc/{sleeper}/maps").read_text().count("\n")
    assert said.startswith(f"process {sleeper}, {lines} mappings, ")
    assert said.endswith(f", Linux {os.uname().release}: no difference\n")


def test_a_difference_is_status_1(sleeper, capsys, monkeypatch):
    """The check can fail: a model that pads names to another column."""
    monkeypatch.setattr(show_map, "NAME_COLUMN", 70)
    assert status_of("maps", str(sleeper), "--check") == 1
    said = capsys.readouterr().out
    assert f"process {sleeper}: vma-lock: b'" in said
    assert "the kernel's b'" in said
    assert said.endswith(" differences\n")


def test_a_wrong_answer_to_a_query_is_a_difference_too(sleeper, capsys, monkeypatch):
    """The text is right, an answer is not."""
    if maps.check(sleeper).queries == 0:
        pytest.skip("this kernel has no PROCMAP_QUERY (it came with 6.11)")
    monkeypatch.setattr("kmodel.proc.query.PAGE_SIZE", 8192)
    assert status_of("maps", str(sleeper), "--check") == 1
    assert "query 0x" in capsys.readouterr().out


def test_all_processes_are_summed_up(sleeper, capsys, monkeypatch):
    """Those that may be read, those that may not, and those that kept changing."""
    answers = {
        1: maps.NotReadable(),
        2: maps.Checked(2),
        sleeper: maps.check(sleeper),
        9: maps.Checked(9, changing=True),
    }
    monkeypatch.setattr(maps.os, "listdir", lambda _path: [*map(str, answers), "stat"])

    def check(pid):
        if isinstance(answers[pid], Exception):
            raise answers[pid]
        return answers[pid]

    monkeypatch.setattr(maps, "check", check)
    assert status_of("maps", "--all") == 0
    said = capsys.readouterr().out
    assert said.startswith("3 processes, ")
    assert said.endswith(": 0 processes differ; 1 kept changing; 1 could not be read\n")
    answers[2].differences.append("something")
    assert status_of("maps", "--all") == 1
    assert "process 2: something\n" in capsys.readouterr().out


def test_a_process_that_keeps_changing_is_no_difference(sleeper, capsys, monkeypatch):
    """It is said that nothing was compared."""
    monkeypatch.setattr(show_map, "NAME_COLUMN", 70)
    texts = iter(range(1000))
    monkeypatch.setattr(
        maps,
        "_reads",
        lambda _pid, _size: [b"%08x-%08x ---p 00000000 00:00 0 \n" % (4096, 8192 + next(texts) * 4096)],
    )
    assert status_of("maps", str(sleeper), "--check") == 0
    assert "kept changing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["maps"], "kmodel maps: say PID, self or --all"),
        (["maps", "self", "--all"], "kmodel maps: say PID, self or --all"),
        (["maps", "nobody"], "'nobody' is neither a process number nor 'self'"),
        (["maps", "4194999"], "there is no process 4194999"),
        (["maps", "self", "--variant", "none"], "invalid choice: 'none'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_status_2(capsys, argv, complaint):
    """What was wrong is named."""
    assert status_of(*argv) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
