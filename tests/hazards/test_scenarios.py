"""Every scenario of the catalogue, explored with its guard and without."""

import re
from pathlib import Path
from typing import Any

import attrs
import pytest

from kmodel.core import clear_warnings
from kmodel.explore import Result, Verdict
from kmodel.hazards import Scenario, scenarios, table

pytestmark = pytest.mark.explore

DOCS = Path(__file__).parents[2] / "docs" / "hazards.md"
LINES = 90
"""A timeline that is longer than this does not help anybody ..."""
WHOLE_CALLS = {
    "registration": 300,
    "breakpoints": 150,
    "maps": 110,
    "references": 130,
    "return_probes": 110,
    "xol": 160,
}
"""... except in modules whose tasks are whole registrations, forks, mmap(2), frees, sleeps and wake-ups."""

CATALOGUE = list(scenarios().values())
every_scenario = pytest.mark.parametrize("scenario", CATALOGUE, ids=lambda s: s.name)

_guarded: dict[Any, Result] = {}


@pytest.fixture(autouse=True)
def _no_warnings_left() -> Any:
    """The kernel warnings of broken twins are theirs."""
    yield
    clear_warnings()


def guarded(scenario: Scenario) -> Result:
    """The scenario as it is; those that differ only in the guard they go without are explored once."""
    key = (
        scenario.setup,
        scenario.threads,
        scenario.final,
        scenario.memory,
        tuple(sorted(scenario.options.items())),
    )
    if key not in _guarded:
        _guarded[key] = scenario.explore()
    return _guarded[key]


@every_scenario
def test_with_the_guard(scenario: Scenario) -> None:
    """Everything is looked at and nothing breaks; or a bound is hit, and the result says which."""
    result = guarded(scenario)

    assert (scenario.expected, str(result)) == (result.verdict, str(result))
    if result.verdict is Verdict.BOUNDED:
        assert result.reason is not None
        assert set(scenario.options) & {"max_executions", "preemptions"}, "a bound that was asked for"


@every_scenario
def test_without_the_guard(scenario: Scenario) -> None:
    """It breaks, in the way the catalogue says, and shows how in few lines."""
    result = scenario.explore(broken=True)

    assert (scenario.expected_broken, str(result)) == (result.verdict, str(result))
    if result.violation is None:
        return
    assert scenario.breaks == result.violation.kind
    # ... and one can see how: the timeline fits on a page or two, and says what is wrong.
    lines = result.timeline().splitlines()
    limit = WHOLE_CALLS.get(scenario.setup.__module__.rpartition(".")[2], LINES)
    assert len(lines) <= limit, "\n".join(lines)
    assert any("***" in line for line in lines)


def test_names_and_summaries_are_fit_to_print() -> None:
    """A summary is one sentence; a name is lower case with hyphens; every hazard has its number."""
    for scenario in CATALOGUE:
        assert scenario.summary.endswith("."), scenario.name
        assert len(scenario.summary) <= 110, scenario.name
        assert set(scenario.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"), scenario.name
        assert all(h[0] == "H" and h[1:].isdigit() and len(h) == 3 for h in scenario.hazards), scenario.name
        assert scenario.can_break, scenario.name


def test_the_table_of_the_documentation_has_every_scenario() -> None:
    """docs/hazards.md: hazards, guards, memory models and verdicts are those of the catalogue."""
    rows = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 10 and cells[1].startswith("`"):
            rows[cells[1].strip("`")] = cells
    expected = {
        s.name: (" ".join(s.hazards), s.memory, str(s.expected and s.expected.value)) for s in CATALOGUE
    }
    actual = {name: (cells[0], cells[3], cells[4].split(" ")[0]) for name, cells in rows.items()}

    assert expected == actual
    for scenario in CATALOGUE:
        assert all(f"`{guard}`" in rows[scenario.name][2] for guard in scenario.without), scenario.name


def test_every_hazard_is_shown_or_said_to_be_elsewhere() -> None:
    """Each of H01 to H76 has a scenario, or a line in docs/hazards.md that says where it is, or is known to
    come.
    """
    text = DOCS.read_text()
    section = text.partition("## Hazards without a row")[2].partition("\n## ")[0]
    elsewhere = set(re.findall(r"^\| (H\d\d) \|", section, re.MULTILINE))
    shown = {hazard for scenario in CATALOGUE for hazard in scenario.hazards}
    missing = {f"H{n:02}" for n in range(1, 77)} - shown - elsewhere

    assert missing == set(), sorted(missing)
    for path in re.findall(r"\]\(([^)]+)\)", section):
        assert (DOCS.parent / path).exists(), path


def test_the_table_is_printed_by_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """python -m kmodel.hazards.table NAME prints the row, and its exit status says: as expected."""
    status = table.main(["seqcount-retry"])
    printed = capsys.readouterr().out.splitlines()

    assert status == 0
    assert printed[0].startswith("| hazard | scenario |")
    assert "| H03 H10 | `seqcount-retry` | `no-read-seqcount-retry` | sc | PASS | 11 |" in printed[2]


def test_a_surprise_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails if a scenario does not do what the catalogue says."""
    known = scenarios()["seqcount-rmb"]
    wrong = attrs.evolve(known, memory="sc")
    monkeypatch.setattr(table, "find_scenario", lambda _name: wrong)

    assert table.main(["seqcount-rmb"]) == 1
    assert "not as the catalogue says: seqcount-rmb" in capsys.readouterr().err
