"""Litmus tests: tiny programs whose allowed final states are known.

Models:      herd7's litmus tests, in the JSON form of tests/data/litmus.json.gz
Guards:      none
Invariants:  L1 the outcomes are those of the program, nothing added: variables by name, registers as
             thread:register
Leaves out:  loops, conditions, dependencies: the tests have none
Read next:   tests/explore/test_litmus.py

`{"tests": [{"name", "vars", "threads", "allowed"}]}`; a thread is a list of events in program order:
["W", var, value, "once"|"release"], ["R", reg, var, "once"|"acquire"], ["X", reg, var, value, order] (xchg),
["F", "mb"|"rmb"|"wmb"], ["RCU", "lock"|"unlock"|"sync"], ["L", "lock"|"unlock"] (one spinlock for the test).
"""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    access,
    engine,
    smp_load_acquire,
    smp_store_release,
    variables,
    xchg,
    xchg_acquire,
    xchg_relaxed,
    xchg_release,
)
from kmodel.explore.api import explore
from kmodel.explore.events import Verdict
from kmodel.explore.result import Result

_XCHG = {"full": xchg, "relaxed": xchg_relaxed, "acquire": xchg_acquire, "release": xchg_release}
State = tuple[tuple[str, int], ...]


class LitmusError(ValueError):
    """A file that is not a litmus test; the text says why."""


def read_litmus(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The tests of a JSON file (gzipped if its name ends in .gz)."""
    data = Path(path).read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        document = json.loads(data)
    except (ValueError, OSError, EOFError) as error:
        raise LitmusError(f"{path} is not a litmus file: {error}") from None
    tests = document.get("tests", [document]) if isinstance(document, dict) else document
    if not isinstance(tests, list) or not all(
        isinstance(t, dict) and "threads" in t and "vars" in t for t in tests
    ):
        raise LitmusError(f"{path} is not a litmus file: no tests with 'vars' and 'threads' in it")
    return tests


class _Run:
    """One execution's variables and registers."""

    __slots__ = ("lock", "registers", "v")

    def __init__(self, names: list[str]) -> None:
        self.v = variables(**dict.fromkeys(names, 0))
        self.lock = variables(locked=0)
        self.registers: dict[str, int] = {}


def _thread(index: int, events: list[list[Any]]) -> Callable[[_Run], None]:
    def body(run: _Run) -> None:
        v, registers = run.v, run.registers
        tokens: list[int] = []
        for event in events:
            op = event[0]
            if op == "W":
                if event[3] == "release":
                    smp_store_release(v, event[1], event[2])
                else:
                    WRITE_ONCE(v, event[1], event[2])
            elif op == "R":
                load = smp_load_acquire if event[3] == "acquire" else READ_ONCE
                registers[f"{index}:{event[1]}"] = load(v, event[2])
            elif op == "X":
                registers[f"{index}:{event[1]}"] = _XCHG[event[4]](v, event[2], event[3])
            elif op == "F":
                assert access._tracer is not None
                access._tracer.fence(event[1])
            elif op == "RCU":
                spec = engine().rcu
                assert spec is not None
                if event[1] == "lock":
                    tokens.append(spec.read_lock("rcu"))
                elif event[1] == "unlock":
                    spec.read_unlock("rcu", tokens.pop())
                else:
                    spec.synchronize("rcu")
            elif op == "L":
                (engine().spin_lock if event[1] == "lock" else engine().spin_unlock)(run.lock, "locked")
            else:
                raise LitmusError(f"unknown event {event!r}")

    body.__name__ = f"P{index}"
    return body


def run_litmus(test: dict[str, Any], memory: str = "lkmm", **bounds: Any) -> Result:
    """Explore a litmus test; its outcomes are sorted tuples of (name, value)."""
    names = list(test["vars"])

    def outcome(run: _Run) -> State:
        final = {name: access.READ_ONCE(run.v, name) for name in names} | run.registers
        return tuple(sorted(final.items()))

    threads = [_thread(i, events) for i, events in enumerate(test["threads"])]
    return explore(lambda: _Run(names), *threads, outcome=outcome, memory=memory, **bounds)


def states(listed: list[dict[str, int]]) -> set[State]:
    """The states of a test's `allowed` list, as run_litmus() gives them."""
    return {tuple(sorted(state.items())) for state in listed}


@attrs.frozen
class Judgement:
    """A litmus test's result beside what is allowed."""

    name: str
    result: Result
    forbidden: set[State]
    missing: set[State]

    @property
    def agrees(self) -> bool:
        """Nothing forbidden was seen, and, unless a bound stopped the search, nothing allowed is missing."""
        if self.forbidden:
            return False
        return not self.missing or self.result.verdict is Verdict.BOUNDED


def judge(test: dict[str, Any], memory: str = "lkmm", **bounds: Any) -> Judgement:
    """Run a test that lists its allowed states, and compare."""
    result = run_litmus(test, memory, **bounds)
    allowed = states(test["allowed"])
    return Judgement(test.get("name", "?"), result, result.outcomes - allowed, allowed - result.outcomes)


def judge_all(tests: list[dict[str, Any]], **bounds: Any) -> Iterator[Judgement]:
    """judge() each."""
    for test in tests:
        yield judge(test, **bounds)
