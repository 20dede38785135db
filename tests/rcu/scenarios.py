"""How the tests of this room run one scenario on real threads and under many seeds."""

from collections.abc import Callable, Iterator
from typing import Any

from kmodel.core import CoopEngine, UseAfterFree, boot, engine, kthread_run

SEEDS = range(51)

type Setup = Callable[[], Any]
type Threads = list[Callable[[Any], Any]]


def run_threads(setup: Setup, threads: Threads) -> Any:
    """The scenario's final state on real threads."""
    state = setup()
    tasks = [kthread_run(func, state, comm=func.__name__, daemon=False) for func in threads]
    for task in tasks:
        assert engine().join(task, 20)
    return state


def run_seed(seed: int, setup: Setup, threads: Threads, *, max_steps: int = 200_000) -> Any:
    """The scenario's final state under one seed."""

    def fresh() -> Any:
        boot()
        return setup()

    return CoopEngine(seed, max_steps=max_steps).run(fresh, threads)


def run_everywhere(setup: Setup, threads: Threads) -> Iterator[Any]:
    """The scenario's final state on real threads and under every seed."""
    yield run_threads(setup, threads)
    for seed in SEEDS:
        yield run_seed(seed, setup, threads)


def use_after_free(seed: int, setup: Setup, threads: Threads) -> bool:
    """Whether the seed makes a task use what was freed."""
    try:
        run_seed(seed, setup, threads)
    except UseAfterFree:
        return True
    return False
