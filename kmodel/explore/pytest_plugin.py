"""pytest plugin: options and a mark for tests that call explore(), and the timeline of what they found.

Models:      nothing in Linux
Guards:      none; one test runs at a time in a process
Invariants:  P1 what a test says itself wins over the command line, which wins over the defaults
Read next:   explore/api.py

    @pytest.mark.explore(memory="sc", max_executions=10_000)   # defaults of this test's explore() calls
    def test_it(): assert explore(setup, a, b).passed

    @pytest.mark.explore(split=4)  # four tests, each looks at a part: for pytest -n 4, on one host or several

A failing test shows the timeline of each exploration that did not pass, and the line that runs its
execution again.
"""

import hashlib
import shlex
from collections.abc import Generator
from pathlib import Path
from typing import Any

import attrs
import pytest

from kmodel.explore import api
from kmodel.explore.events import Verdict
from kmodel.explore.split import merge
from kmodel.explore.tracefile import TraceError, read_trace


def pytest_addoption(parser: pytest.Parser) -> None:
    """The command line options."""
    group = parser.getgroup("explore", "the kmodel explorer")
    group.addoption(
        "--explore-memory",
        choices=sorted(api.ENGINES),
        help="memory model for explorations that do not name one (lkmm)",
    )
    group.addoption(
        "--explore-max-executions",
        type=int,
        metavar="N",
        help="bound for explorations that do not set one; a search it stops is BOUNDED, which is no pass",
    )
    group.addoption(
        "--explore-replay",
        metavar="FILE",
        help="run the execution in FILE again instead of searching, where a test explores the same program",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark, and read the trace that is to be replayed."""
    config.addinivalue_line(
        "markers", "explore(**defaults): runs the explorer; defaults for its explore() calls"
    )
    path = config.getoption("--explore-replay")
    if path is not None:
        try:
            api.replaying = read_trace(path)
        except (OSError, TraceError) as error:
            raise pytest.UsageError(f"--explore-replay: {error}") from error


def pytest_unconfigure(config: pytest.Config) -> None:
    """Forget it."""
    api.replaying = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Give the test's explore() calls their defaults, and collect what they find."""
    defaults: dict[str, Any] = {}
    for option, name in (("--explore-memory", "memory"), ("--explore-max-executions", "max_executions")):
        value = item.config.getoption(option)
        if value is not None:
            defaults[name] = value
    mark = item.get_closest_marker("explore")
    if mark is not None:
        defaults |= {name: value for name, value in mark.kwargs.items() if name != "split"}
        if "split" in mark.kwargs:
            part = getattr(item, "callspec").params[_PART]  # noqa: B009  # unknown to pytest.Item
            defaults["part"] = (part, mark.kwargs["split"])
    before, api.defaults = api.defaults, defaults
    recent, api.recent = api.recent, []
    try:
        return (yield)
    finally:
        item.stash[_FOUND] = api.recent
        api.defaults, api.recent = before, recent


_PART = "_explore_part"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that is to be split becomes several."""
    mark = metafunc.definition.get_closest_marker("explore")
    if mark is not None and "split" in mark.kwargs:
        parts = mark.kwargs["split"]
        metafunc.fixturenames.append(_PART)
        metafunc.parametrize(_PART, range(parts), ids=[f"part{n + 1}of{parts}" for n in range(parts)])


@pytest.fixture
def _explore_part(request: pytest.FixtureRequest) -> Any:
    return request.param


_FOUND = pytest.StashKey[Any]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Add timelines to the report of a failing test."""
    report = yield
    mark = item.get_closest_marker("explore")
    if report.when == "call" and mark is not None and "split" in mark.kwargs:
        for n, result in enumerate(item.stash.get(_FOUND, [])):
            outcomes = sorted(repr(outcome) for outcome in result.outcomes)
            facts = [result.verdict.name, result.executions, result.blocked, outcomes]
            name = (
                f"{item.nodeid.rpartition('[')[0]} (exploration {n + 1})"
                if n
                else item.nodeid.rpartition("[")[0]
            )
            report.user_properties.append(("explore", [name, *facts]))
    if report.when == "call" and report.failed:
        for result in item.stash.get(_FOUND, []):
            if result.verdict is not Verdict.PASS:
                report.sections.append((f"explored: {result.verdict.value}", _describe(item, result)))
    return report


@attrs.frozen
class _Part:
    verdict: Verdict
    executions: int
    blocked: int
    outcomes: frozenset[str]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Put the parts of split explorations together."""
    parts: dict[str, list[_Part]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == "explore" and getattr(report, "when", "") == "call":
                    name, verdict, executions, blocked, outcomes = value
                    found = _Part(Verdict[verdict], executions, blocked, frozenset(outcomes))
                    parts.setdefault(name, []).append(found)
    if parts:
        terminalreporter.section("explorations in parts")
        for name, found_parts in sorted(parts.items()):
            terminalreporter.write_line(f"{name}: {merge(found_parts)}")


def _describe(item: pytest.Item, result: Any) -> str:
    lines = [str(result)]
    if result.trace is not None:
        lines += ["", result.timeline()]
        name = hashlib.sha256(f"{item.nodeid}\n{result.program.references()}".encode()).hexdigest()[:12]
        folder = _folder(item)
        if folder is not None:
            path = folder / f"{name}.json"
            result.save(path)
            lines += [
                "",
                f"again: pytest {shlex.quote(item.nodeid)} --explore-replay {shlex.quote(str(path))}",
            ]
    return "\n".join(lines)


def _folder(item: pytest.Item) -> Path | None:
    cache: Any = getattr(item.config, "cache", None)
    if cache is None:
        return None
    return Path(cache.mkdir("explore"))
