"""Run a set of tasks on real threads or under seeds of the cooperative engine."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kmodel.core import CoopEngine, TaskStruct, engine, kthread_run

SEEDS = range(50)


def on_threads(state: Any, threads: Sequence[Callable[[Any], Any]], timeout: float = 20.0) -> Any:
    """Start every thread(state) on a thread of its own, wait for all of them, return the state."""
    join_all([kthread_run(func, state, comm=func.__name__, daemon=False) for func in threads], timeout)
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


def trace_of(seed: int, setup: Callable[[], Any], threads: Sequence[Callable[[Any], Any]]) -> list[Any]:
    """The trace of one cooperative run."""
    cooperative = CoopEngine(seed)
    cooperative.run(setup, threads)
    return cooperative.trace
