"""RCU Tasks Trace, both implementations behind the one name."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kmodel.core import (
    CoopEngine,
    KernelBug,
    LockingBug,
    Struct,
    engine,
    guards,
    kernel_struct,
    kernel_warnings,
    kfree,
    kthread_run,
    rcu_assign_pointer,
    rcu_dereference,
    smp_cond_load_acquire,
    smp_store_release,
    variables,
)
from kmodel.rcu import (
    call_rcu_tasks_trace,
    rcu_barrier_tasks_trace,
    rcu_read_lock,
    rcu_read_lock_trace,
    rcu_read_lock_trace_held,
    rcu_read_unlock,
    rcu_read_unlock_trace,
    stall,
    synchronize_rcu,
    synchronize_rcu_tasks_trace,
    tasks_trace,
    use_rcu_tasks_trace,
)
from tests.rcu.scenarios import run_everywhere, run_threads, use_after_free


@kernel_struct
class Foo(Struct):
    """What readers use and updaters free."""

    value: int = 0


@pytest.fixture(params=["srcu_fast", "holdouts"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with both implementations."""
    before = use_rcu_tasks_trace(request.param)
    yield request.param
    use_rcu_tasks_trace(before)


def nested_reader(v: Any) -> None:
    rcu_read_lock_trace()
    foo = rcu_dereference(v, "pointer")
    smp_store_release(v, "inside", 1)
    rcu_read_lock_trace()
    rcu_read_unlock_trace()
    for _ in range(v.turns):
        assert foo.value == 1
    rcu_read_unlock_trace()


def updater(v: Any) -> None:
    smp_cond_load_acquire(v, "inside", bool)
    old = v.pointer
    rcu_assign_pointer(v, "pointer", Foo(value=1))
    synchronize_rcu_tasks_trace()
    kfree(old)


def scene(turns: int) -> Callable[[], Any]:
    return lambda: variables(pointer=Foo(value=1), inside=0, turns=turns)


def test_a_grace_period_waits_for_nested_readers() -> None:
    """Z1 and Z2: a reader that was inside, through an inner section, never meets what is freed after a grace
    period.
    """
    for final in run_everywhere(scene(8), [nested_reader, nested_reader, updater]):
        assert not rcu_read_lock_trace_held()
        assert final.inside == 1


def test_not_waiting_is_caught(implementation: str) -> None:
    """Z1, the broken twins: without the holdout scan, or without the second SRCU scan, some seed frees under
    a reader.
    """
    guard = "rcu-wait" if implementation == "holdouts" else "srcu-second-scan"
    with guards.without(guard):
        assert any(use_after_free(seed, scene(200), [nested_reader, updater]) for seed in range(10))


def test_readers_may_sleep_and_wait_for_rcu() -> None:
    """A section may sleep, even wait for a grace period of another flavour; RCU readers may not wait for this
    one.
    """
    rcu_read_lock_trace()
    synchronize_rcu()
    rcu_read_unlock_trace()
    rcu_read_lock()
    with pytest.raises(LockingBug, match="sleeps inside an RCU"):
        synchronize_rcu_tasks_trace()
    rcu_read_unlock()


def test_later_readers_do_not_hold_up_the_updater() -> None:
    """A task that comes and goes all the time does not starve a grace period."""

    def reader(v: Any) -> None:
        while not v.done:
            rcu_read_lock_trace()
            time.sleep(0.001)
            rcu_read_unlock_trace()

    def waiter(v: Any) -> None:
        began = time.monotonic()
        for _ in range(3):
            synchronize_rcu_tasks_trace()
        v.took = time.monotonic() - began
        v.done = 1

    assert run_threads(lambda: variables(done=0, took=None), [reader, reader, waiter]).took < 5


def test_callbacks_in_order_and_barrier() -> None:
    """Callbacks wait for the reader, run in order, and the barrier waits for all of them."""

    def reader(v: Any) -> None:
        rcu_read_lock_trace()
        smp_store_release(v, "inside", 1)
        v.left = 1
        rcu_read_unlock_trace()

    def caller(v: Any) -> None:
        smp_cond_load_acquire(v, "inside", bool)
        ran: list[tuple[int, int]] = []
        for n in range(3):
            call_rcu_tasks_trace(n, lambda n: ran.append((n, v.left)))
        rcu_barrier_tasks_trace()
        v.ran = tuple(ran)

    for final in run_everywhere(lambda: variables(inside=0, left=0, ran=()), [reader, caller]):
        assert final.ran == ((0, 1), (1, 1), (2, 1))


def test_misuse_is_reported() -> None:
    """Waiting inside a section, and an unlock too many, raise LockingBug; changing implementation inside,
    KernelBug.
    """
    with pytest.raises(LockingBug, match="outside any section"):
        rcu_read_unlock_trace()
    rcu_read_lock_trace()
    with pytest.raises(LockingBug, match="inside a section"):
        synchronize_rcu_tasks_trace()
    with pytest.raises(KernelBug, match="cannot change"):
        use_rcu_tasks_trace("srcu_fast")
    rcu_read_unlock_trace()


def test_misuse_is_reported_by_the_seeded_engine_too() -> None:
    """The traced read side makes the same checks."""

    def waits(_state: Any) -> None:
        rcu_read_lock_trace()
        synchronize_rcu_tasks_trace()

    def leaves(_state: Any) -> None:
        rcu_read_unlock_trace()

    for bad in (waits, leaves):
        with pytest.raises(LockingBug):
            CoopEngine(0).run(lambda: None, [bad])


@pytest.mark.parametrize("implementation", ["holdouts"], indirect=True)
def test_the_holdout_scan_warns_of_a_stall(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that stays too long is named, with the function it is in. (The SRCU form cannot: it tracks no
    tasks.)
    """
    monkeypatch.setattr(stall, "rcu_task_stall_info", 0.01)
    monkeypatch.setattr(stall, "rcu_task_stall_timeout", 0.05)

    def lingering_handler(v: Any) -> None:
        rcu_read_lock_trace()
        smp_store_release(v, "inside", 1)
        while not kernel_warnings():
            time.sleep(0.005)
        rcu_read_unlock_trace()

    v = variables(inside=0)
    task = kthread_run(lingering_handler, v, comm="lingerer", daemon=False)
    smp_cond_load_acquire(v, "inside", bool)
    synchronize_rcu_tasks_trace()
    engine().join(task)
    (warning,) = kernel_warnings()
    assert warning.message.startswith("rcu_tasks_trace detected stalls on 1 task(s)")
    assert "lingerer>" in warning.message
    assert "lingering_handler (rcu/test_tasks_trace.py:" in warning.message


class Spec:
    """An RcuSpec that records calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def read_lock(self, domain: Any) -> int:
        self.calls.append(f"lock {domain}")
        return 9

    def read_unlock(self, domain: Any, idx: int) -> None:
        self.calls.append(f"unlock {domain} {idx}")

    def synchronize(self, domain: Any) -> None:
        self.calls.append(f"synchronize {domain}")

    def call(self, domain: Any, func: Callable[[], None]) -> None:
        self.calls.append(f"call {domain}")

    def barrier(self, domain: Any) -> None:
        self.calls.append(f"barrier {domain}")


def test_a_specification_replaces_both() -> None:
    """An engine's RcuSpec gets the outermost section and the grace periods as domain "rcu_tasks_trace"."""
    spec = Spec()
    run = CoopEngine(0)
    run.rcu = spec

    def thread(_state: Any) -> None:
        rcu_read_lock_trace()
        rcu_read_lock_trace()
        rcu_read_unlock_trace()
        rcu_read_unlock_trace()
        synchronize_rcu_tasks_trace()
        call_rcu_tasks_trace(None, print)
        rcu_barrier_tasks_trace()

    run.run(lambda: None, [thread])
    name = tasks_trace._DOMAIN
    assert spec.calls == [
        f"lock {name}",
        f"unlock {name} 9",
        f"synchronize {name}",
        f"call {name}",
        f"barrier {name}",
    ]
