"""The explorer's benchmark beside other tools: arguments, and tools that are not installed."""

import json
import sys
from typing import Any

import pytest

from benchmarks import explorer, explorer_peers


def test_a_tools_python_that_is_no_program_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """--tools-python names a program, or the run ends before anything is measured."""
    with pytest.raises(SystemExit) as ended:
        explorer.main(["--only-tools", "--tools-python", "/nonexistent/python"])

    assert ended.value.code == 2
    assert "/nonexistent/python is not a program" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["loom refcount 1", "kmodel peterson 1", "kmodel refcount x"])
def test_an_unknown_tool_case_or_time_is_refused(arguments: str) -> None:
    """A tool, a case or a time that there is not ends with the usage."""
    with pytest.raises(SystemExit) as ended:
        explorer_peers.main(arguments.split())

    assert ended.value.code == 2


def test_a_tool_that_is_not_installed_gets_no_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the tools the table says that they were not run and how to get them, and holds no rate."""
    monkeypatch.setitem(explorer.TOOLS, "frontrun", "no_such_module_1")
    monkeypatch.setitem(explorer.TOOLS, "interleave-test", "no_such_module_2")
    figures: dict[str, Any] = {}

    explorer.tools(figures, sys.executable, 0.0)

    out = capsys.readouterr().out
    for tool in ("frontrun", "interleave-test"):
        assert f"{tool}: not run" in out
        assert f"pip install {tool}" in out
    assert "/s" not in out
    assert not figures


@pytest.mark.parametrize(("case", "executions"), [("lost-update", 36), ("refcount", 9)])
def test_kmodel_exhausts_the_cases(case: str, executions: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each case passes under the explorer, in as many executions as there are classes."""
    assert explorer_peers.main(["kmodel", case, "0.001"]) == 0

    figures = json.loads(capsys.readouterr().out)
    assert figures["executions"] == executions * figures["searches"]
