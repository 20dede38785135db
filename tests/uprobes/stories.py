"""Tell a race as a story: a task stops at a named place until another has done its part. Works on every
engine.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kmodel.core import (
    WRITE_ONCE,
    CoopEngine,
    TaskStruct,
    boot,
    clear_warnings,
    current,
    engine,
    kernel_warnings,
    kthread_run,
    smp_cond_load_acquire,
    variables,
)

type Part = Callable[[Any], Any]


def _set(value: Any) -> bool:
    return bool(value)


class Gate:
    """A place where one task stops once, and another lets it go on."""

    def __init__(self) -> None:
        self.at = variables(reached=0, opened=0)
        self.used = False

    def stop(self) -> None:
        """Say that the place is reached and wait; the second time do nothing."""
        if self.used:
            return
        self.used = True
        WRITE_ONCE(self.at, "reached", 1)
        smp_cond_load_acquire(self.at, "opened", _set)

    def wait(self) -> None:
        """Wait until somebody stopped here."""
        smp_cond_load_acquire(self.at, "reached", _set)

    def open(self) -> None:
        """Let whoever stopped, or will stop, go on."""
        WRITE_ONCE(self.at, "opened", 1)


def stop_before(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, gate: Callable[[], Gate]) -> None:
    """Make module.name(...) stop at the gate first, the first time that task `reader` calls it."""
    original = getattr(module, name)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if current().comm == "reader":
            gate().stop()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, stopping)


def stop_after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, gate: Callable[[], Gate]) -> None:
    """Make module.name(...) stop at the gate when it is done, the first time that task `reader` calls it."""
    original = getattr(module, name)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if current().comm == "reader":
            gate().stop()
        return result

    monkeypatch.setattr(module, name, stopping)


def join(task: TaskStruct, timeout: float = 20.0) -> None:
    """Wait for a task; what it raised is raised here."""
    assert engine().join(task, timeout), f"{task!r} does not end"


def on_threads(setup: Callable[[], Any], parts: Sequence[Part], final: Part | None = None) -> Any:
    """Boot, set up, run every part on a real thread, then `final`."""
    boot()
    state = setup()
    for task in [kthread_run(part, state, comm=part.__name__, daemon=False) for part in parts]:
        join(task)
    if final is not None:
        final(state)
    return state


def booted(setup: Callable[[], Any]) -> Callable[[], Any]:
    """`setup` on a model that was just booted."""

    def boot_and_set_up() -> Any:
        boot()
        return setup()

    return boot_and_set_up


def on_coop(seed: int) -> Callable[..., Any]:
    """The same on the cooperative engine with this seed."""

    def run(setup: Callable[[], Any], parts: Sequence[Part], final: Part | None = None) -> Any:
        return CoopEngine(seed).run(booted(setup), parts, final)

    return run


def coop_seeds(
    setup: Callable[[], Any], parts: Sequence[Part], final: Part | None = None, seeds: range = range(30)
) -> list[Any]:
    """Run the scenario under every seed and return the states."""
    return [on_coop(seed)(setup, parts, final) for seed in seeds]


def failing_seed(
    setup: Callable[[], Any], parts: Sequence[Part], final: Part | None = None, seeds: range = range(200)
) -> tuple[int, BaseException] | None:
    """The first seed whose run fails, and how; None if none does."""
    for seed in seeds:
        try:
            on_coop(seed)(setup, parts, final)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is what was looked for
            return seed, error
    return None


both_engines = pytest.mark.parametrize(
    "run", [on_threads, on_coop(1), on_coop(2)], ids=["threads", "coop-1", "coop-2"]
)


def assert_warned(text: str) -> None:
    """Assert that the kernel warned of this, and forget the warnings."""
    messages = [warning.message for warning in kernel_warnings()]
    clear_warnings()
    assert any(text in message for message in messages), messages
