"""RCU: who is waited for and who is not, callbacks, misuse, stalls; on real threads and on the
seeded engine.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kmodel.core import (
    CoopEngine,
    KernelBug,
    LockingBug,
    Struct,
    cpu_relax,
    current,
    engine,
    generation,
    guards,
    is_freed,
    kernel_struct,
    kernel_warnings,
    kfree,
    kthread_run,
    lock_acquire,
    lock_release,
    rcu_assign_pointer,
    rcu_dereference,
    smp_cond_load_acquire,
    smp_mb,
    smp_store_release,
    variables,
)
from kmodel.rcu import (
    call_rcu,
    kfree_rcu,
    rcu,
    rcu_barrier,
    rcu_read_lock,
    rcu_read_lock_held,
    rcu_read_unlock,
    readers,
    record_entries,
    stall,
    synchronize_rcu,
    synchronize_rcu_expedited,
)
from tests.rcu.scenarios import SEEDS, run_everywhere, run_seed, run_threads, use_after_free


@kernel_struct
class Foo(Struct):
    """What the pointer of the update scenario points at."""

    value: int = 0


# ------------------------------------------------------------------------------------------ who is waited for


def before_and_after() -> tuple[Callable[[], Any], list[Callable[[Any], Any]]]:
    def setup() -> Any:
        return variables(inside=0, left=0, seen=None)

    def reader(v: Any) -> None:
        rcu_read_lock()
        rcu_read_lock()
        smp_store_release(v, "inside", 1)
        for _ in range(4):
            smp_mb()  # somewhere for the seed to switch
        rcu_read_unlock()  # an inner unlock ends nothing
        for _ in range(12):
            smp_mb()
        v.left = 1
        rcu_read_unlock()

    def updater(v: Any) -> None:
        smp_cond_load_acquire(v, "inside", bool)
        synchronize_rcu()
        v.seen = v.left

    return setup, [reader, updater]


def test_a_grace_period_waits_for_a_reader_that_was_there() -> None:
    """G1 and G3: what a pre-existing reader did, nested sections and all, is done when synchronize_rcu
    returns.
    """
    assert {state.seen for state in run_everywhere(*before_and_after())} == {1}


@pytest.mark.parametrize("guard", ["rcu-wait", "rcu-nesting"])
def test_not_waiting_use_after_free(guard: str) -> None:
    """The broken twins: without the wait, or when any unlock counts, some seed ends the grace period too
    early.
    """
    setup, threads = before_and_after()
    with guards.without(guard):
        assert 0 in {run_seed(seed, setup, threads).seen for seed in SEEDS}


def leave_and_enter_again(grace_period_began: Callable[[], bool]) -> list[Callable[[Any], Any]]:
    def reader(v: Any) -> None:
        rcu_read_lock()
        smp_store_release(v, "inside", 1)
        while not grace_period_began():
            cpu_relax()
        rcu_read_unlock()
        rcu_read_lock()
        smp_cond_load_acquire(v, "done", bool)  # for ever, if the grace period waits for this section too
        rcu_read_unlock()

    def updater(v: Any) -> None:
        smp_cond_load_acquire(v, "inside", bool)
        synchronize_rcu()
        smp_store_release(v, "done", 1)

    return [reader, updater]


def test_a_grace_period_does_not_wait_for_later_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """W2 on real threads: a reader that leaves and enters again ends the wait, though it is inside a
    section.
    """
    began: list[stall.Stall] = []

    def note() -> stall.Stall:
        began.append(stall.rcu_stall())
        return began[0]

    monkeypatch.setattr(rcu, "rcu_stall", note)
    final = run_threads(lambda: variables(inside=0, done=0), leave_and_enter_again(lambda: bool(began)))
    assert final.done == 1


def test_a_grace_period_does_not_wait_for_later_readers_whatever_the_seed() -> None:
    """W2 under the seeded engine, where waiting for the later section would be a deadlock."""

    def began() -> bool:
        steps = engine().trace  # type: ignore[attr-defined]
        return any(
            s.task == "updater" and s.where.endswith(".rcu_read_lock_nesting") and s.value == "1"
            for s in steps
        )

    for seed in SEEDS:
        final = CoopEngine(seed).run(lambda: variables(inside=0, done=0), leave_and_enter_again(began))
        assert final.done == 1


def test_a_stream_of_sections_does_not_hold_up_the_writer() -> None:
    """W2: one reader that is nearly always inside some section does not starve a grace period."""

    def reader(v: Any) -> None:
        task = current()
        while not v.done:
            rcu_read_lock(task)
            time.sleep(0.001)
            rcu_read_unlock(task)
            rcu_read_lock(task)
            rcu_read_unlock(task)

    def updater(v: Any) -> None:
        began = time.monotonic()
        for _ in range(5):
            synchronize_rcu()
        v.took = time.monotonic() - began
        v.done = 1

    final = run_threads(lambda: variables(done=0, took=None), [reader, updater])
    assert final.took < 2


def test_order_of_the_two_words() -> None:
    """W1: read the other way round, the words of a reader that comes and goes make a grace period wait for
    ever.
    """
    setup, _threads = before_and_after()

    def reader(_v: Any) -> None:
        rcu_read_lock()
        rcu_read_unlock()

    def updater(_v: Any) -> None:
        synchronize_rcu()

    def ends(seed: int) -> bool:
        try:
            run_seed(seed, setup, [reader, updater])
        except KernelBug:
            return False
        return True

    assert all(ends(seed) for seed in SEEDS)
    with guards.without("rcu-sections-first"):
        assert not all(ends(seed) for seed in range(400))


# ------------------------------------------------------------------------------------------ update, then free


def replace_and_free(free: Callable[[Foo], None]) -> tuple[Callable[[], Any], list[Callable[[Any], Any]]]:
    def setup() -> Any:
        return variables(pointer=Foo(value=1), got=0)

    def reader(v: Any) -> None:
        for _ in range(3):
            rcu_read_lock()
            foo = rcu_dereference(v, "pointer")
            v.got += foo.value  # raises UseAfterFree on poison
            rcu_read_unlock()

    def updater(v: Any) -> None:
        for value in (2, 3):
            old = v.pointer
            rcu_assign_pointer(v, "pointer", Foo(value=value))
            free(old)

    return setup, [reader, updater]


def free_after_synchronize(foo: Foo) -> None:
    synchronize_rcu()
    kfree(foo)


@pytest.mark.parametrize("free", [free_after_synchronize, kfree_rcu])
def test_readers_never_see_what_was_freed_after_a_grace_period(free: Callable[[Foo], None]) -> None:
    """H08: with synchronize_rcu or kfree_rcu between unlinking and freeing, no reader meets poison."""
    assert all(3 <= state.got <= 9 for state in run_everywhere(*replace_and_free(free)))


def test_freeing_at_once_use_after_free() -> None:
    """H08, broken twins: kfree without a grace period, or callbacks that run at once, are seen as a use after
    free.
    """
    setup, threads = replace_and_free(kfree)
    assert any(use_after_free(seed, setup, threads) for seed in SEEDS)
    setup, threads = replace_and_free(kfree_rcu)
    with guards.without("call-rcu-grace-period"):
        assert any(use_after_free(seed, setup, threads) for seed in SEEDS)


def test_kfree_rcu_frees_once_the_reader_is_gone() -> None:
    """The object is whole while a reader is inside, and freed once when the callback has run."""
    foo, v = Foo(value=7), variables(inside=0, leave=0)

    def reader(v: Any) -> None:
        rcu_read_lock()
        smp_store_release(v, "inside", 1)
        smp_cond_load_acquire(v, "leave", bool)
        assert not is_freed(foo)
        rcu_read_unlock()

    task = kthread_run(reader, v, comm="reader", daemon=False)
    smp_cond_load_acquire(v, "inside", bool)
    kfree_rcu(foo)
    assert (is_freed(foo), foo.value) == (False, 7)
    smp_store_release(v, "leave", 1)
    engine().join(task)
    rcu_barrier()
    assert (is_freed(foo), generation(foo)) == (True, 1)


# ------------------------------------------------------------------------------------------------ callbacks


def test_callbacks_run_in_order_and_the_barrier_waits_for_all() -> None:
    """Y1: callbacks run in the order of their queueing; after rcu_barrier all of them have."""
    order: list[int] = []

    def setup() -> Any:
        order.clear()
        return variables(copy=())

    def caller(v: Any) -> None:
        for n in range(5):
            call_rcu(n, order.append)
        rcu_barrier()
        v.copy = tuple(order)

    for state in run_everywhere(setup, [caller]):
        assert state.copy == (0, 1, 2, 3, 4)


def test_a_barrier_with_nothing_queued_returns() -> None:
    """rcu_barrier waits for callbacks, not for readers."""

    def other(v: Any) -> None:
        rcu_read_lock()
        smp_store_release(v, "inside", 1)
        smp_cond_load_acquire(v, "leave", bool)
        rcu_read_unlock()

    v = variables(inside=0, leave=0)
    task = kthread_run(other, v, comm="other", daemon=False)
    smp_cond_load_acquire(v, "inside", bool)
    rcu_barrier()
    smp_store_release(v, "leave", 1)
    engine().join(task)


def test_callbacks_must_not_sleep() -> None:
    """Y3: a callback that waits for a grace period itself is reported (H56)."""
    caught: list[str] = []

    def sleeps(_obj: object) -> None:
        try:
            synchronize_rcu()
        except LockingBug as error:
            caught.append(str(error))

    call_rcu(None, sleeps)
    rcu_barrier()
    assert "preemption disabled" in caught[0]


def test_call_rcu_from_a_callback_runs_after_another_grace_period() -> None:
    """A callback may queue the next one, as the uprobe's free chain does."""
    order: list[str] = []

    def first(_obj: object) -> None:
        order.append("first")
        call_rcu(None, second)

    def second(_obj: object) -> None:
        order.append("second")

    call_rcu(None, first)
    rcu_barrier()
    rcu_barrier()
    assert order == ["first", "second"]


# ------------------------------------------------------------------------------------------ misuse and stalls


def test_misuse_is_reported() -> None:
    """Waiting for oneself, sleeping with a spinning lock held, and an unlock too many raise LockingBug."""
    with pytest.raises(LockingBug, match="outside any section"):
        rcu_read_unlock()
    rcu_read_lock()
    assert rcu_read_lock_held()
    for call in (synchronize_rcu, synchronize_rcu_expedited, rcu_barrier):
        with pytest.raises(LockingBug, match="inside an RCU read-side"):
            call()
    rcu_read_unlock()
    assert not rcu_read_lock_held()
    lock = Foo()
    lock_acquire(lock, atomic=True)
    with pytest.raises(LockingBug, match="preemption disabled"):
        synchronize_rcu()
    lock_release(lock, atomic=True)


def test_misuse_is_reported_by_the_seeded_engine_too() -> None:
    """The traced read side makes the same checks."""

    def waits(_state: Any) -> None:
        rcu_read_lock()
        synchronize_rcu()

    def leaves(_state: Any) -> None:
        rcu_read_unlock()

    for bad in (waits, leaves):
        with pytest.raises(LockingBug):
            CoopEngine(0).run(lambda: None, [bad])


def stall_text(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(stall, "rcu_cpu_stall_timeout", 0.05)

    def sluggish_reader(v: Any) -> None:
        def enter_and_dawdle() -> None:
            rcu_read_lock()
            smp_store_release(v, "inside", 1)
            while not kernel_warnings():
                time.sleep(0.005)
            rcu_read_unlock()

        enter_and_dawdle()

    v = variables(inside=0)
    task = kthread_run(sluggish_reader, v, comm="sluggish", daemon=False)
    smp_cond_load_acquire(v, "inside", bool)
    synchronize_rcu()
    engine().join(task)
    (warning,) = kernel_warnings()
    return warning.message


def test_a_stall_names_the_task_and_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """T1: a grace period that takes too long warns, with the reader's name and the function that entered."""
    text = stall_text(monkeypatch)
    assert text.startswith("rcu_preempt detected stalls on 1 task(s)")
    assert "sluggish>" in text
    assert "enter_and_dawdle (rcu/test_rcu.py:" in text
    assert "entered in" not in text


def test_a_stall_names_the_line_when_entries_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the debug mode the warning has the very line of rcu_read_lock."""
    record_entries(True)
    try:
        text = stall_text(monkeypatch)
    finally:
        record_entries(False)
    source = Path(__file__).read_text().split("\n")
    entered = text.partition("entered in")[2].partition(" is in ")[0]
    line = (
        source.index("            rcu_read_lock()", source.index("        def enter_and_dawdle() -> None:"))
        + 1
    )
    assert f"enter_and_dawdle (rcu/test_rcu.py:{line})" in entered


def test_the_log_is_used_for_information(caplog: pytest.LogCaptureFixture) -> None:
    """The older Tasks Trace only informs at first, which is no kernel warning."""
    clock = stall.Stall("rcu_tasks_trace", warn_after=600.0, inform_after=0.0)
    clock.holdouts = {current(): 0}
    with caplog.at_level(logging.INFO, "kmodel"):
        clock.check()
        clock.check()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert kernel_warnings() == ()


# ---------------------------------------------------------------------------------------------- specification


class CountingSpec:
    """An RcuSpec that records what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def read_lock(self, domain: Any) -> int:
        self.calls.append(f"lock {domain}")
        return 5

    def read_unlock(self, domain: Any, idx: int) -> None:
        self.calls.append(f"unlock {domain} {idx}")

    def synchronize(self, domain: Any) -> None:
        self.calls.append(f"synchronize {domain}")

    def call(self, domain: Any, func: Callable[[], None]) -> None:
        self.calls.append(f"call {domain}")
        func()

    def barrier(self, domain: Any) -> None:
        self.calls.append(f"barrier {domain}")


def test_a_specification_replaces_the_implementation() -> None:
    """An engine's RcuSpec gets the outermost lock and unlock and every grace period; nesting stays in the
    task.
    """
    spec = CountingSpec()
    run = CoopEngine(0)
    run.rcu = spec
    held: list[bool] = []

    def thread(_state: Any) -> None:
        rcu_read_lock()
        rcu_read_lock()
        rcu_read_unlock()
        held.append(rcu_read_lock_held())
        with pytest.raises(LockingBug):
            synchronize_rcu()
        rcu_read_unlock()
        synchronize_rcu()
        call_rcu(held, lambda h: h.append(rcu_read_lock_held()))
        rcu_barrier()

    run.run(lambda: None, [thread])
    assert spec.calls == ["lock rcu", "unlock rcu 5", "synchronize rcu", "call rcu", "barrier rcu"]
    assert held == [True, False]


def test_wait_counts_the_readers_it_found() -> None:
    """With no reader anywhere the wait finds none."""
    assert readers.wait_for_readers("rcu_read_lock_nesting", "rcu_read_sections", stall.rcu_stall) == 0
    assert rcu.rcu_cblist.pending == []
