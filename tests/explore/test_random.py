"""The reduction loses nothing: random programs have the same outcomes with every interleaving tried."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    atomic_inc_not_zero,
    cmpxchg,
    cmpxchg_relaxed,
    cpu_relax,
    engine,
    kthread_run,
    smp_cond_load_acquire,
    smp_load_acquire,
    smp_mb,
    smp_rmb,
    smp_store_release,
    smp_wmb,
    variables,
    xchg,
    xchg_acquire,
    xchg_relaxed,
    xchg_release,
)
from kmodel.explore import Result, Verdict, explore

Event = tuple[str, str, int, int]
Program = list[list[Event]]

SIMPLE = ["read", "write", "xchg", "cmpxchg"]
ALL = [
    *SIMPLE,
    "read",
    "write",
    "acquire",
    "release",
    "xchg_relaxed",
    "xchg_acquire",
    "xchg_release",
    "cmpxchg_relaxed",
    "inc_not_zero",
    "mb",
    "rmb",
    "wmb",
    "rcu",
    "synchronize",
    "lock",
    "trylock",
    "wait",
    "spin",
    "write_if",
]


def programs(kinds: list[str], threads: int, events: int) -> st.SearchStrategy[Program]:
    event = st.tuples(
        st.sampled_from(kinds), st.sampled_from(["x", "y"]), st.integers(1, 2), st.integers(0, 2)
    )
    return st.lists(st.lists(event, min_size=1, max_size=events), min_size=2, max_size=threads)


class State:
    """One execution's variables, and what its tasks read."""

    def __init__(self) -> None:
        self.v = variables(x=0, y=0)
        self.lock = variables(locked=0)
        self.read: dict[int, list[Any]] = {}


_ACCESSES: dict[str, Callable[[Any, str, int, int], Any]] = {
    "read": lambda v, x, _a, _b: READ_ONCE(v, x),
    "acquire": lambda v, x, _a, _b: smp_load_acquire(v, x),
    "write": lambda v, x, a, _b: WRITE_ONCE(v, x, a),
    "release": lambda v, x, a, _b: smp_store_release(v, x, a),
    "xchg": lambda v, x, a, _b: xchg(v, x, a),
    "xchg_relaxed": lambda v, x, a, _b: xchg_relaxed(v, x, a),
    "xchg_acquire": lambda v, x, a, _b: xchg_acquire(v, x, a),
    "xchg_release": lambda v, x, a, _b: xchg_release(v, x, a),
    "cmpxchg": lambda v, x, a, b: cmpxchg(v, x, b, a),
    "cmpxchg_relaxed": lambda v, x, a, b: cmpxchg_relaxed(v, x, b, a),
    "inc_not_zero": lambda v, x, _a, _b: atomic_inc_not_zero(v, x),
    "mb": lambda _v, _x, _a, _b: smp_mb(),
    "rmb": lambda _v, _x, _a, _b: smp_rmb(),
    "wmb": lambda _v, _x, _a, _b: smp_wmb(),
    "wait": lambda v, x, _a, b: smp_cond_load_acquire(v, x, lambda seen: seen != b),
}


def body(index: int, events: list[Event]) -> Callable[[State], None]:
    def run(state: State) -> None:
        v, e = state.v, engine()
        read: list[Any] = []
        state.read[index] = read
        section: int | None = None
        held = False
        assert e.rcu is not None
        for kind, x, a, b in events:
            if kind in _ACCESSES:
                read.append(_ACCESSES[kind](v, x, a, b))
            elif kind == "write_if":
                if READ_ONCE(v, x) == b:
                    WRITE_ONCE(v, x, a)
            elif kind == "spin":
                while READ_ONCE(v, x) == b:
                    cpu_relax()
            elif kind == "rcu":
                if section is None:
                    section = e.rcu.read_lock("rcu")
                else:
                    section = e.rcu.read_unlock("rcu", section)  # type: ignore[func-returns-value]
            elif kind == "synchronize":
                if section is None:
                    e.rcu.synchronize("rcu")
            elif held:
                e.spin_unlock(state.lock, "locked")
                held = False
            elif kind == "lock":
                e.spin_lock(state.lock, "locked")
                held = True
            else:
                held = e.spin_trylock(state.lock, "locked")
                read.append(held)
        if held:
            e.spin_unlock(state.lock, "locked")
        if section is not None:
            e.rcu.read_unlock("rcu", section)

    return run


def run(program: Program, memory: str, strategy: str, bound: int) -> Result:
    # Daemons, so that a wait that never ends is no deadlock but an outcome.
    def setup() -> State:
        state = State()
        for index, events in enumerate(program):
            kthread_run(body(index, events), state)
        return state

    def outcome(state: State) -> Any:
        return (
            READ_ONCE(state.v, "x"),
            READ_ONCE(state.v, "y"),
            tuple(tuple(state.read.get(i, ())) for i in range(len(program))),
        )

    return explore(setup, outcome=outcome, memory=memory, strategy=strategy, max_executions=bound)


SETTINGS = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("memory", ["sc", "tso", "lkmm"])
def test_reduction_loses_nothing(memory: str) -> None:
    """dpor and brute force agree on the outcomes of random programs."""

    @SETTINGS
    @given(programs(ALL, 3, 3))
    def agree(program: Program) -> None:
        brute = run(program, memory, "brute", 200)
        reduced = run(program, memory, "dpor", 4000)
        if brute.verdict is Verdict.PASS:
            assert reduced.outcomes == brute.outcomes
        elif reduced.verdict is Verdict.PASS:
            assert brute.outcomes <= reduced.outcomes

    agree()


def interleavings(program: Program) -> set[Any]:
    """Every outcome of a program of SIMPLE events, by the definition of sequential consistency."""
    found = set()

    def step(at: tuple[int, ...], memory: dict[str, int], read: tuple[tuple[Any, ...], ...]) -> None:
        done = True
        for t, events in enumerate(program):
            if at[t] == len(events):
                continue
            done = False
            kind, x, a, b = events[at[t]]
            old = memory[x]
            after = dict(memory)
            if kind in ("write", "xchg") or (kind == "cmpxchg" and old == b):
                after[x] = a
            got = None if kind == "write" else old
            step(
                (*at[:t], at[t] + 1, *at[t + 1 :]),
                after,
                (*read[:t], (*read[t], got), *read[t + 1 :]),
            )
        if done:
            found.add((memory["x"], memory["y"], read))

    step((0,) * len(program), {"x": 0, "y": 0}, ((),) * len(program))
    return found


@SETTINGS
@given(programs(SIMPLE, 3, 3))
def test_sc_is_sequential_consistency(program: Program) -> None:
    """Under sc the outcomes are those of all interleavings, enumerated by another program."""
    assume(sum(map(len, program)) <= 7)

    assert run(program, "sc", "dpor", 10_000).outcomes == interleavings(program)


@SETTINGS
@given(programs(SIMPLE, 3, 2))
def test_models_are_ordered(program: Program) -> None:
    """What sc shows tso shows, and what tso shows lkmm shows."""
    sc, tso, lkmm = (run(program, memory, "dpor", 10_000).outcomes for memory in ("sc", "tso", "lkmm"))

    assert sc <= tso <= lkmm
