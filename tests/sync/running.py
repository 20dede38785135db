"""Run a set of tasks on real threads or under seeds of the cooperative engine."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kmodel.core import CoopEngine, TaskStruct, atomic_inc, boot, cpu_relax, engine, kthread_run, variables
from kmodel.sync import rcu_sync

SEEDS = range(50)


def on_threads(state: Any, threads: Sequence[Callable[[Any], Any]], timeout: float = 20.0) -> Any:
    """Run every thread(state) on a thread of its own, all started together; return the state."""
    gate = variables(here=0)

    def start(func: Callable[[Any], Any]) -> None:
        atomic_inc(gate, "here")
        while gate.here < len(threads):
            cpu_relax()
        func(state)

    join_all([kthread_run(start, func, comm=func.__name__, daemon=False) for func in threads], timeout)
    return state


def join_all(tasks: Iterable[TaskStruct], timeout: float = 20.0) -> None:
    """Join tasks of the threads engine; an assertion names those that did not end."""
    late = [task for task in tasks if not engine().join(task, timeout)]
    assert not late, f"still running: {late}"


def under_seeds(
    setup: Callable[[], Any],
    threads: Sequence[Callable[[Any], Any]],
    final: Callable[[Any], Any] | None = None,
    seeds: Iterable[int] = SEEDS,
) -> list[Any]:
    """Run the scenario under every seed and return the states."""
    return [CoopEngine(seed).run(setup, threads, final) for seed in seeds]


def failures(
    setup: Callable[[], Any],
    threads: Sequence[Callable[[Any], Any]],
    final: Callable[[Any], Any] | None = None,
    seeds: Iterable[int] = SEEDS,
) -> set[type[BaseException]]:
    """The kinds of failure that the scenario shows under these seeds."""
    kinds: set[type[BaseException]] = set()
    for seed in seeds:
        try:
            CoopEngine(seed).run(setup, threads, final)
        except AssertionError as error:
            kinds.add(type(error))
    return kinds


def trace_of(seed: int, setup: Callable[[], Any], threads: Sequence[Callable[[Any], Any]]) -> list[Any]:
    """The trace of one cooperative run."""
    boot()  # waits, on the engine that began them, for grace periods that earlier tests left behind
    cooperative = CoopEngine(seed)
    cooperative.run(setup, threads)
    return cooperative.trace


def kinds_of(trace: Iterable[Any]) -> list[str]:
    """What happened in a trace, without the where and the value."""
    return [step.kind for step in trace]


@contextmanager
def no_grace_periods() -> Iterator[None]:
    """As if nobody had imported rcu/."""
    before = (rcu_sync._synchronize, rcu_sync._call, rcu_sync.read_lock, rcu_sync.read_unlock)
    rcu_sync._synchronize = rcu_sync._call = rcu_sync.read_lock = rcu_sync.read_unlock = None
    try:
        yield
    finally:
        rcu_sync._synchronize, rcu_sync._call, rcu_sync.read_lock, rcu_sync.read_unlock = before
