"""Counterexamples: as text, saved, run again, made simple."""

from pathlib import Path
from typing import Any

import pytest

from kmodel.core import READ_ONCE, WRITE_ONCE, atomic_dec_and_test, atomic_inc, smp_mb, variables
from kmodel.explore import Result, Verdict, explore, replay
from kmodel.explore.tracefile import TraceError, problem, read_trace


def setup() -> Any:
    return variables(ref=1, slot=1, freed=0)


def put(v: Any) -> None:
    if atomic_dec_and_test(v, "ref"):
        WRITE_ONCE(v, "slot", None)
        WRITE_ONCE(v, "freed", 1)


def get(v: Any) -> None:
    if READ_ONCE(v, "slot"):
        atomic_inc(v, "ref")
        assert not READ_ONCE(v, "freed"), "used after it was freed"


def lines(result: Result) -> list[str]:
    return [" ".join(line.split()) for line in result.timeline().splitlines()]


def test_timeline_under_sc() -> None:
    """One column per task, values, where reads got them, and the violation at its step."""
    result = explore(setup, put, get, memory="sc")

    assert lines(result) == [
        "step put get",
        "-" * len(result.timeline().splitlines()[1].strip()),
        "1 READ_ONCE(slot) = 1 <- initial",
        "2 atomic_dec_and_test(ref) 1 -> 0 <- initial",
        "3 WRITE_ONCE(slot, NULL)",
        "4 WRITE_ONCE(freed, 1)",
        "5 atomic_inc(ref) 0 -> 1 <- #2",
        "6 READ_ONCE(freed) = 1 <- #4",
        "*** an assertion failed: used after it was freed",
        "at tests/explore/test_timeline.py:26 in get()",
    ]


def test_timeline_shows_staleness() -> None:
    """A stale read says what it read and what was newest."""

    def writer(v: Any) -> None:
        WRITE_ONCE(v, "data", 42)
        WRITE_ONCE(v, "flag", 1)

    def reader(v: Any) -> None:
        if READ_ONCE(v, "flag"):
            assert READ_ONCE(v, "data") == 42, "flag without data"

    result = explore(lambda: variables(data=0, flag=0), writer, reader)

    assert "READ_ONCE(flag) = 1 <- #2" in " ".join(lines(result))
    assert "READ_ONCE(data) = 0 <- initial, stale; newest is #1 = 42" in " ".join(lines(result))


@pytest.mark.parametrize("memory", ["sc", "tso", "lkmm"])
def test_traces_are_documents(memory: str) -> None:
    """A trace keeps to its format, and equal searches give equal traces."""
    result = explore(setup, put, get, memory=memory)
    again = explore(setup, put, get, memory=memory)

    assert result.trace is not None
    assert problem(result.trace) is None
    assert result.trace == again.trace
    last = result.trace["steps"][-1]
    assert (last["kind"], last["value"], result.trace["violation"]["step"]) == ("load", "1", last["n"])
    assert last["source"]["text"].startswith("assert not READ_ONCE")


@pytest.mark.parametrize("memory", ["sc", "tso", "lkmm"])
def test_save_and_replay(tmp_path: Path, memory: str) -> None:
    """A saved execution runs again step by step, from the file alone."""
    result = explore(setup, put, get, memory=memory)
    path = tmp_path / "trace.json"
    result.save(path)

    again = replay(path)

    assert again.verdict is Verdict.FAIL
    assert again.timeline() == result.timeline()
    assert read_trace(path) == result.trace


def test_replay_of_local_functions(tmp_path: Path) -> None:
    """Functions inside a test cannot be named in a file: replay() says so, and takes them."""

    def broken(v: Any) -> None:
        assert not READ_ONCE(v, "freed")

    path = tmp_path / "trace.json"
    explore(setup, put, broken).save(path)

    with pytest.raises(TraceError, match="lives inside another one"):
        replay(path)
    assert replay(path, setup, put, broken).verdict is Verdict.FAIL


def test_replay_of_a_repaired_model() -> None:
    """Where nothing breaks any more, or the schedule no longer fits, replay says so."""

    def guarded(v: Any) -> None:
        if READ_ONCE(v, "slot") and atomic_inc(v, "ref") is None:
            READ_ONCE(v, "freed")

    trace = explore(setup, put, get, memory="sc").trace
    assert trace is not None
    assert replay(trace, setup, put, guarded).verdict is Verdict.BOUNDED
    other = replay(trace, setup, put)
    assert other.verdict is Verdict.INCONCLUSIVE
    assert "cannot go on" in (other.reason or "")


def test_preemptions_are_few() -> None:
    """What a random walk finds is shown with as few preemptions as it takes."""

    def noisy_put(v: Any) -> None:
        for _ in range(3):
            READ_ONCE(v, "slot")
        put(v)

    def noisy_get(v: Any) -> None:
        for _ in range(3):
            READ_ONCE(v, "ref")
        get(v)

    result = explore(setup, noisy_put, noisy_get, memory="sc", strategy="random", seed=3)

    assert result.verdict is Verdict.FAIL
    assert result.preemptions == 1


def test_nothing_to_save(tmp_path: Path) -> None:
    """A PASS has no execution to show or save, and says what was looked at."""
    result = explore(setup, put, memory="sc")

    assert result.timeline() == "PASS under sc after 1 execution"
    with pytest.raises(ValueError, match="no execution to save"):
        result.save(tmp_path / "x.json")


def test_fences_and_spawns_are_shown() -> None:
    """Steps that are no events of the search are in the trace all the same."""

    def fail(v: Any) -> None:
        WRITE_ONCE(v, "slot", 2)
        smp_mb()
        raise AssertionError("here")

    result = explore(setup, fail)

    assert result.trace is not None
    assert [step["kind"] for step in result.trace["steps"]] == ["store", "fence"]
