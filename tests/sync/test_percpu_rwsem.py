"""percpu_rw_semaphore: both ways in, the switch between them, and the barrier pairs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kmodel.core import (
    READ_ONCE,
    Deadlock,
    LockingBug,
    PerCpu,
    Struct,
    atomic,
    atomic_dec,
    atomic_inc,
    boot,
    cpu_relax,
    current,
    embedded,
    guards,
    kernel_struct,
    kthread_run,
    smp_cond_load_acquire,
    this_cpu_inc,
    untraced,
)
from kmodel.sync import (
    PercpuRwSemaphore,
    percpu_down_read,
    percpu_down_read_trylock,
    percpu_down_write,
    percpu_is_read_locked,
    percpu_is_write_locked,
    percpu_rwsem,
    percpu_up_read,
    percpu_up_write,
    rcu_sync,
    register_grace_period,
)
from kmodel.sync.rcu_sync import GP_IDLE, GP_PASSED, RcuSync, rcu_sync_enter, rcu_sync_exit
from tests.sync.running import failures, join_all, kinds_of, no_grace_periods, trace_of, under_seeds


@kernel_struct
class Readers(Struct):
    """A grace period to test with: how many readers are inside, and callbacks that wait to be run."""

    inside: int = atomic(default=0)
    callbacks: list[tuple[Any, Callable[[Any], Any]]] = untraced(factory=list)
    waited: int = untraced(default=0)


@contextmanager
def grace_periods(readers: Readers) -> Iterator[None]:
    """Let the room use these grace periods instead of the registered ones (or of none)."""
    before = (rcu_sync._synchronize, rcu_sync._call, rcu_sync.read_lock, rcu_sync.read_unlock)

    def synchronize() -> None:
        readers.waited += 1
        smp_cond_load_acquire(readers, "inside", lambda n: n == 0)

    register_grace_period(
        synchronize,
        lambda obj, func: readers.callbacks.append((obj, func)),
        lambda: atomic_inc(readers, "inside"),
        lambda: atomic_dec(readers, "inside"),
    )
    try:
        yield
    finally:
        rcu_sync._synchronize, rcu_sync._call, rcu_sync.read_lock, rcu_sync.read_unlock = before


def run_callbacks(readers: Readers) -> None:
    for obj, func in readers.callbacks:
        func(obj)
    readers.callbacks.clear()


# ------------------------------------------------------------------------------------- single task


def test_fast_readers_write_only_their_own_counter() -> None:
    """While no writer was there, a read section is one increment and one decrement, and no barrier."""
    with grace_periods(Readers()):

        def thread(sem: PercpuRwSemaphore) -> None:
            percpu_down_read(sem)
            percpu_up_read(sem)

        trace = trace_of(0, PercpuRwSemaphore, [thread])

    touched = [(step.kind, step.where.rpartition(".")[2]) for step in trace if step.kind.startswith("rmw")]
    assert [pair for pair in touched if pair[1] == "read_count"] == [("rmw-relaxed", "read_count")] * 2
    assert "mb" not in kinds_of(trace)


def test_slow_readers_have_both_barriers() -> None:
    """Without grace periods every reader is slow: barriers A and B, each removable alone."""

    def thread(sem: PercpuRwSemaphore) -> None:
        percpu_down_read(sem)
        percpu_up_read(sem)

    def barriers() -> int:
        return kinds_of(trace_of(0, PercpuRwSemaphore, [thread])).count("mb")

    with no_grace_periods():
        whole = barriers()
        for guard in ("no-percpu-rwsem-mb-a", "no-percpu-rwsem-mb-b"):
            with guards.without(guard):
                assert barriers() == whole - 1


def test_writer_has_both_barriers() -> None:
    """Barrier D is the full exchange of `block`, C comes after the counts; each is removable alone."""

    def thread(sem: PercpuRwSemaphore) -> None:
        percpu_down_write(sem)
        percpu_up_write(sem)

    def found() -> tuple[list[str], int]:
        trace = trace_of(0, PercpuRwSemaphore, [thread])
        exchange = [s.kind for s in trace if s.where.endswith(".block") and s.kind.startswith("rmw")]
        return exchange, kinds_of(trace).count("mb")

    with no_grace_periods():
        exchange, barriers = found()
        assert exchange == ["rmw-full"]
        with guards.without("no-percpu-rwsem-mb-d"):
            assert found() == (["rmw-relaxed"], barriers)
        with guards.without("no-percpu-rwsem-mb-c"):
            assert found() == (["rmw-full"], barriers - 1)


def test_writer_pays_one_grace_period() -> None:
    """The first writer waits for one, the next ones not, and readers are fast again only after another."""
    readers = Readers()
    with grace_periods(readers):
        sem = PercpuRwSemaphore()
        for _ in range(2):
            percpu_down_write(sem)
            assert (percpu_down_read_trylock(sem), percpu_is_write_locked(sem)) == (False, True)
            percpu_up_write(sem)
        assert (readers.waited, len(readers.callbacks)) == (1, 1)
        percpu_down_read(sem)
        assert (percpu_is_read_locked(sem), percpu_is_write_locked(sem)) == (True, False)
        percpu_up_read(sem)
        run_callbacks(readers)  # the second writer's exit asked for a replay
        run_callbacks(readers)

        assert sem.rss.gp_state == GP_IDLE
        percpu_rwsem.check_invariants(sem)


def test_misuse_is_loud() -> None:
    """Releasing what one does not hold, and taking it for writing while holding it."""
    sem = PercpuRwSemaphore()
    for misuse in (percpu_up_read, percpu_up_write):
        with pytest.raises(LockingBug):
            misuse(sem)
    percpu_down_read(sem)
    with pytest.raises(LockingBug):
        percpu_down_write(sem)
    percpu_up_read(sem)


def test_left_on_another_cpu() -> None:
    """A reader may leave on another CPU than it came on: only the sum counts."""
    sem = PercpuRwSemaphore()
    with no_grace_periods():
        percpu_down_read(sem)
        task, cpu = current(), current().cpu
        task.cpu = (cpu + 1) % 64
        cache, task.percpu = task.percpu, {}
        percpu_up_read(sem)
        task.cpu, task.percpu = cpu, cache

        assert sorted({cpu.read_count for cpu in sem.read_count.cpus}) == [-1, 0, 1]
        percpu_rwsem.check_invariants(sem)
        percpu_down_write(sem)
        percpu_up_write(sem)


# ------------------------------------------------------------------------------------- exclusion


@kernel_struct
class Shared(Struct):
    """What readers and writers look after, with grace periods of its own."""

    sem: PercpuRwSemaphore = embedded(factory=PercpuRwSemaphore)
    writing: int = 0
    count: int = 0


def reader(state: Shared) -> None:
    for _ in range(2):
        percpu_down_read(state.sem)
        assert READ_ONCE(state, "writing") == 0, "a writer is inside"
        percpu_up_read(state.sem)


def writer(state: Shared) -> None:
    percpu_down_write(state.sem)
    state.writing += 1
    assert state.writing == 1
    state.count += 1
    state.writing -= 1
    percpu_up_write(state.sem)


def setup() -> Shared:
    boot()
    return Shared()


def final(state: Shared) -> None:
    percpu_rwsem.check_invariants(state.sem)
    assert state.count == 2


@pytest.mark.parametrize("fast", [True, False])
def test_exclusion(fast: bool) -> None:
    """Under 20 seeds writers exclude each other and readers, whether readers may be fast or not."""
    readers = Readers()
    with grace_periods(readers) if fast else no_grace_periods():

        def fresh() -> Shared:
            readers.callbacks.clear()
            readers.inside = 0
            return setup()

        under_seeds(fresh, [reader, reader, writer, writer], final, seeds=range(20))


def dawdle() -> None:
    """Give the others a long turn here."""
    for _ in range(25):
        cpu_relax()


def test_fast_readers_need_the_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast reader that dawdles between its look at the switch and its count is waited for by the grace
    period only.
    """
    readers = Readers()

    def slow_inc(counts: PerCpu, field: str) -> None:
        dawdle()
        this_cpu_inc(counts, field)

    def fresh() -> Shared:
        readers.callbacks.clear()
        readers.inside = 0
        return setup()

    monkeypatch.setattr(percpu_rwsem, "this_cpu_inc", slow_inc)
    with grace_periods(readers):
        with_it = failures(fresh, [reader, writer], seeds=range(20))
        monkeypatch.setattr(rcu_sync, "_synchronize", lambda: None)
        without = failures(fresh, [reader, writer], seeds=range(20))

    assert (with_it, without) == (set(), {AssertionError})


def test_a_leaving_reader_must_wake_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wake-up in percpu_up_read() some seed leaves the writer asleep for ever."""

    def dawdling_reader(state: Shared) -> None:
        percpu_down_read(state.sem)
        dawdle()
        percpu_up_read(state.sem)

    with no_grace_periods():
        assert failures(setup, [dawdling_reader, writer], seeds=range(10)) == set()
        monkeypatch.setattr(percpu_rwsem, "rcuwait_wake_up", lambda _w: False)
        assert failures(setup, [dawdling_reader, writer], seeds=range(10)) == {Deadlock}


def test_waiters_get_in_order() -> None:
    """Behind a writer wait a reader, a writer and a reader: in this order, the last one after the writer."""
    order: list[str] = []
    sem = PercpuRwSemaphore()

    def waits(name: str, down: Callable[[Any], None], up: Callable[[Any], None]) -> None:
        down(sem)
        order.append(name)
        up(sem)

    with no_grace_periods():
        percpu_down_write(sem)
        tasks = []
        for n, (name, down, up) in enumerate(
            [
                ("r1", percpu_down_read, percpu_up_read),
                ("w", percpu_down_write, percpu_up_write),
                ("r2", percpu_down_read, percpu_up_read),
            ]
        ):
            tasks.append(kthread_run(waits, name, down, up, daemon=False))
            smp_cond_load_acquire(sem.waiters, "head", lambda head, n=n: len(head) == n + 1)
        percpu_up_write(sem)
        join_all(tasks)

    assert order == ["r1", "w", "r2"]


def test_rcu_sync_shares_a_grace_period() -> None:
    """Writers that come while one is inside wait for nothing; the switch stays until the last has left."""
    readers = Readers()
    with grace_periods(readers):
        rss = RcuSync()
        rcu_sync_enter(rss)
        rcu_sync_enter(rss)
        rcu_sync_exit(rss)
        assert (rss.gp_state, readers.waited, readers.callbacks) == (GP_PASSED, 1, [])
        rcu_sync_exit(rss)
        run_callbacks(readers)

        assert rss.gp_state == GP_IDLE
        rcu_sync.check_invariants(rss)


def test_rcu_sync_reopened_during_its_exit() -> None:
    """A writer that comes while the closing grace period runs has its own paid by it."""
    readers = Readers()
    with grace_periods(readers):
        rss = RcuSync()
        rcu_sync_enter(rss)
        rcu_sync_exit(rss)
        task = kthread_run(rcu_sync_enter, rss, daemon=False)
        smp_cond_load_acquire(rss, "gp_count", lambda count: count == 1)
        run_callbacks(readers)
        join_all([task])

        assert (rss.gp_state, readers.waited) == (GP_PASSED, 1)
