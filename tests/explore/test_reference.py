"""The explorer against a second opinion that shares no code with it, on random litmus tests."""

import random
from typing import Any

import pytest

from kmodel.explore import Verdict
from kmodel.explore.litmus import read_litmus, run_litmus, states
from tests.explore.reference import Lkmm, buffered
from tests.explore.test_litmus import LITMUS

SEEDS = range(15)


def program(seed: int, kind: str) -> dict[str, Any]:
    """Two or three threads over two variables, small enough to visit every state."""
    rng = random.Random(f"{kind} {seed}")
    threads = []
    for i in range(rng.choice([2, 2, 3])):
        events: list[list[Any]] = []
        for j in range(rng.choice([2, 2, 3])):
            name, value, register = rng.choice("xy"), 10 * i + j + 1, f"r{j}"
            events.append(
                rng.choice(
                    [
                        ["W", name, value, rng.choice(["once", "once", "release"])],
                        ["R", register, name, rng.choice(["once", "once", "acquire"])],
                        ["R", register, name, "once"],
                        ["X", register, name, value, rng.choice(["full", "relaxed", "acquire", "release"])]
                        if rng.random() < 0.4
                        else ["W", name, value, "once"],
                    ]
                )
            )
        extra = rng.random()
        if kind == "fence" and extra < 0.6:
            events.insert(1, ["F", rng.choice(["mb", "rmb", "wmb"])])
        elif kind == "lock" and extra < 0.8:
            events.insert(0, ["L", "lock"])
            events.insert(rng.choice([2, len(events)]), ["L", "unlock"])
        elif kind == "rcu" and extra < 0.5:
            events = [["RCU", "lock"], *events, ["RCU", "unlock"]]
        elif kind == "rcu" and extra < 0.9:
            events.insert(1, ["RCU", "sync"])
        threads.append(events)
    return {"name": f"{kind}-{seed}", "vars": ["x", "y"], "threads": threads}


@pytest.mark.parametrize("kind", ["fence", "lock", "rcu"])
def test_lkmm(kind: str) -> None:
    """Under lkmm the outcomes are those of the rules, taken literally: none extra, none missing."""
    for seed in SEEDS:
        test = program(seed, kind)
        result = run_litmus(test)
        assert (result.verdict, result.outcomes) == (Verdict.PASS, Lkmm(test).finals()), test


@pytest.mark.parametrize("memory", ["sc", "tso"])
@pytest.mark.parametrize("kind", ["fence", "lock"])
def test_with_and_without_store_buffers(memory: str, kind: str) -> None:
    """Under tso and sc the outcomes are those of a machine with store buffers and of one without."""
    for seed in SEEDS:
        test = program(seed, kind)
        result = run_litmus(test, memory)
        wanted = buffered(test, tso=memory == "tso")
        assert (result.verdict, result.outcomes) == (Verdict.PASS, wanted), test


def test_a_load_of_ones_own_store_may_see_what_came_after_it() -> None:
    """Under tso a store may reach memory, and be overwritten there, before its own task reads it back."""
    threads = [[["W", "x", 1, "once"], ["R", "r0", "x", "once"]], [["W", "x", 2, "once"]]]
    result = run_litmus({"vars": ["x"], "threads": threads}, "tso")
    assert {dict(outcome)["0:r0"] for outcome in result.outcomes} == {1, 2}


def test_reading_back_what_nobody_else_touches_is_one_execution() -> None:
    """Under tso, when a task's own store reaches memory makes no difference to its loads of it."""
    own = [["W", "x", 1, "once"], ["R", "r0", "x", "once"], ["W", "x", 2, "once"], ["R", "r1", "x", "once"]]
    result = run_litmus({"vars": ["x", "y"], "threads": [own, [["R", "r0", "y", "once"]]]}, "tso")
    assert (result.executions, result.blocked) == (1, 0)


def test_the_reference_agrees_with_herd7() -> None:
    """The second opinion is worth something: it gives herd7's outcomes for a sample of the oracle's tests."""
    for test in read_litmus(LITMUS)[::24]:
        assert Lkmm(test).finals() == states(test["allowed"]), test["name"]
