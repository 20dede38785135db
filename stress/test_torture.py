"""`kmodel stress` itself: clean as it is, and caught with any of the guards it aims at taken away.

Each run is a process of its own, because a run that was broken leaves tasks behind that nothing can stop.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

from kmodel.torture import AIMED_AT, HARD_PATHS, SHORT_RUN_SECONDS

CATCH_SECONDS = 30


def stress(*arguments: str, timeout: float) -> tuple[int, dict[str, Any], str]:
    """Run `kmodel stress`; its exit status, its JSON report, and what it showed."""
    command = [sys.executable, "-m", "kmodel.cli", "stress", "--json", "-", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout + 60, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_run_is_clean_and_meets_the_hard_paths(seconds: float, seed: int) -> None:
    """The model as it is: no violation, every ledger balances, and the run was hard."""
    length = max(seconds, SHORT_RUN_SECONDS + 1)
    status, report, shown = stress("--seconds", f"{length}", "--seed", f"{seed}", timeout=length)

    assert report["violations"] == [], shown
    assert (status, report["verdict"]) == (0, "clean"), shown
    assert report["hard_paths_not_met"] == []
    assert set(report["hard_paths"]) == set(HARD_PATHS)
    assert set(report["ledger"].values()) == {0}
    assert report["counts"]["handler_call"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("guard", sorted(AIMED_AT))
def test_without_a_guard_the_oracle_finds_out(guard: str, seed: int) -> None:
    """Each guard's twin without it is a violation within 30 s, shown with the steps that led to it."""
    status, report, shown = stress(
        "--break", guard, "--seconds", f"{CATCH_SECONDS}", "--seed", f"{seed}", timeout=CATCH_SECONDS
    )

    assert (status, report["verdict"]) == (1, "violation"), shown
    assert report["elapsed"] < CATCH_SECONDS
    first = report["violations"][0]
    assert first["facts"] or first["timeline"], "the offending sequence is shown"
    assert first["property"] in shown
