"""The pytest plugin: marks, options, and what a failing test shows."""

import re
from typing import Any

import pytest

pytest_plugins = ["pytester"]

TEST = """
import pytest
from kmodel.core import READ_ONCE, WRITE_ONCE, variables
from kmodel.explore import explore

def bump(v):
    WRITE_ONCE(v, "x", READ_ONCE(v, "x") + 1)

def check(v):
    assert v.x == 2, "an update was lost"

{mark}
def test_it():
    result = explore(lambda: variables(x=0), bump, bump, final=check)
    print("memory", result.memory, "executions", result.executions, "verdict", result.verdict.name)
    assert {condition}
"""


def run(pytester: Any, *arguments: str, mark: str = "", condition: str = "result.passed") -> Any:
    pytester.makepyfile(TEST.format(mark=mark, condition=condition))
    return pytester.runpytest_inprocess(
        "-p", "kmodel.explore.pytest_plugin", "-p", "no:xdist", "-rP", *arguments
    )


def test_failures_show_the_timeline_and_can_be_replayed(pytester: pytest.Pytester) -> None:
    """A failing test prints the timeline and the line that runs its execution again, which does."""
    result = run(pytester)

    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert "explored: FAIL" in text
    assert "READ_ONCE(x) = 0" in text
    line = re.search(r"again: pytest (\S+) --explore-replay (\S+)", text)
    assert line is not None
    again = pytester.runpytest_inprocess(
        "-p", "kmodel.explore.pytest_plugin", "-p", "no:xdist", "-rP", line[1], "--explore-replay", line[2]
    )
    again.assert_outcomes(failed=1)
    assert "executions 1 verdict FAIL" in again.stdout.str()


def test_options_and_marks(pytester: pytest.Pytester) -> None:
    """The command line gives defaults, a mark overrides them."""
    options = ["--explore-memory", "sc", "--explore-max-executions", "1"]
    result = run(pytester, *options, condition="True")
    result.stdout.fnmatch_lines(["memory sc executions 1 verdict BOUNDED"])

    marked = '@pytest.mark.explore(memory="tso", max_executions=50)'
    result = run(pytester, *options, mark=marked, condition="True")
    result.stdout.fnmatch_lines(["memory tso executions * verdict FAIL"])


def test_a_bad_replay_file(pytester: pytest.Pytester) -> None:
    """A file that is no trace is a usage error in one line."""
    pytester.makefile(".json", x="{}")
    result = run(pytester, "--explore-replay", "x.json")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--explore-replay: x.json is not a trace*"])


SPLIT = """
import pytest
from kmodel.core import READ_ONCE, WRITE_ONCE, variables
from kmodel.explore import explore

def bump(v):
    WRITE_ONCE(v, "x", READ_ONCE(v, "x") + 1)

@pytest.mark.explore(split=3, memory="sc")
def test_it():
    assert explore(lambda: variables(x=0), *[bump] * 4, outcome=lambda v: v.x).passed
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_parts(pytester: pytest.Pytester, workers: list[str]) -> None:
    """A split test is several tests; the summary has their sum, the same with and without workers."""
    pytester.makepyfile(SPLIT)
    plugins = ["-p", "kmodel.explore.pytest_plugin"]
    result = pytester.runpytest_subprocess(*plugins, *workers)

    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["test_parts.py::test_it: PASS in 3 parts: 576 executions*, 4 outcomes"])
