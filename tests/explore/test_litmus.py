"""The outcome sets of generated litmus tests equal herd7's."""

from pathlib import Path
from typing import Any

import pytest

from kmodel.explore import Verdict
from kmodel.explore.litmus import LitmusError, judge, read_litmus, run_litmus, states

LITMUS = Path(__file__).parent.parent / "data" / "litmus.json.gz"
TESTS = read_litmus(LITMUS)


@pytest.mark.parametrize("family", ["ring", "mp_like", "seqlock", "rcu", "lock"])
def test_outcomes_are_the_allowed_ones(family: str) -> None:
    """Every test of the family shows exactly what the kernel's model (without load buffering) allows."""
    tests = [test for test in TESTS if test["name"].startswith(f"{family}-")]
    wrong = {}
    for test in tests:
        judgement = judge(test)
        if judgement.forbidden or judgement.missing or judgement.result.verdict is not Verdict.PASS:
            wrong[test["name"]] = judgement

    assert len(tests) > 10
    assert wrong == {}


def test_tso_is_between_sc_and_lkmm() -> None:
    """What sc shows tso shows, and what tso shows the kernel's model allows."""
    strictly_weaker = 0
    for test in TESTS[::3]:
        sc = run_litmus(test, "sc").outcomes
        tso = run_litmus(test, "tso").outcomes
        assert sc <= tso <= states(test["allowed"]), test["name"]
        strictly_weaker += sc < tso

    assert strictly_weaker > 0


def test_reduction_changes_nothing_here() -> None:
    """Small tests have the same outcomes with every interleaving tried."""
    small = [t for t in TESTS if sum(map(len, t["threads"])) <= 4][:8]
    for test in small:
        assert run_litmus(test, strategy="brute").outcomes == run_litmus(test).outcomes, test["name"]


def test_a_bound_is_no_disagreement() -> None:
    """A test that a bound stopped may lack outcomes, and says BOUNDED."""
    largest = max(TESTS, key=lambda test: len(test["allowed"]))
    judgement = judge(largest, max_executions=2)

    assert judgement.result.verdict is Verdict.BOUNDED
    assert judgement.missing
    assert judgement.agrees


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"tests": 3}', "\x1f\x8b"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    """A file that holds no litmus tests is told so in one line."""
    path: Any = tmp_path / "x.json"
    path.write_text(text)

    with pytest.raises(LitmusError, match="not a litmus file"):
        read_litmus(path)
