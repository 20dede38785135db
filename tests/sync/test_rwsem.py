"""rw_semaphore: who gets in and in what order, handoff, signals, downgrade, and its count against its wait
list.
"""

import time
from collections.abc import Callable
from errno import EINTR
from typing import Any

import pytest

from kmodel.core import (
    KernelBug,
    LockingBug,
    Struct,
    TaskStruct,
    atomic,
    atomic_inc,
    boot,
    cpu_relax,
    current,
    embedded,
    engine,
    guards,
    kernel_struct,
    kill,
    kthread_run,
    untraced,
    wake_up_process,
)
from kmodel.sync import (
    RWSEM_FLAG_HANDOFF,
    RWSEM_FLAG_WAITERS,
    RWSEM_READER_BIAS,
    RWSEM_WRITER_LOCKED,
    RwSemaphore,
    SpinLock,
    down_read,
    down_read_killable,
    down_read_trylock,
    down_write,
    down_write_killable,
    down_write_trylock,
    downgrade_write,
    rwsem_assert_held,
    rwsem_assert_held_write,
    rwsem_is_contended,
    rwsem_is_locked,
    spin_lock,
    spin_unlock,
    up_read,
    up_write,
)
from kmodel.sync.rwsem_waiters import check_invariants
from tests.sync.running import failures, join_all, under_seeds


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def queued(sem: RwSemaphore, n: int) -> Callable[[], bool]:
    """Whether n tasks wait, each with its first attempt behind it."""

    def look() -> bool:
        spin_lock(sem.wait_lock)
        n_waiting = len(sem.wait_list)
        spin_unlock(sem.wait_lock)
        return n_waiting == n

    return look


def start(func: Callable[..., Any], *args: Any) -> TaskStruct:
    return kthread_run(func, *args, daemon=False)


# ------------------------------------------------------------------------------------- without waiting


def test_trylocks() -> None:
    """Readers share, a writer is alone, and a waiting flag stops both trylocks."""
    sem = RwSemaphore()

    assert [down_read_trylock(sem), down_read_trylock(sem), down_write_trylock(sem)] == [True, True, False]
    up_read(sem)
    up_read(sem)
    assert [down_write_trylock(sem), down_write_trylock(sem), down_read_trylock(sem)] == [True, False, False]
    up_write(sem)
    assert not rwsem_is_locked(sem)
    check_invariants(sem)


def test_misuse_is_loud() -> None:
    """Releasing what one does not hold, taking it again as a writer, downgrading without it, sleeping in a
    spinlock.
    """
    sem, spin = RwSemaphore(), SpinLock()
    for misuse in (up_read, up_write, downgrade_write, rwsem_assert_held, rwsem_assert_held_write):
        with pytest.raises(LockingBug):
            misuse(sem)
    down_write(sem)
    for again in (down_read, down_write):
        with pytest.raises(LockingBug):
            again(sem)
    sem.count = RWSEM_WRITER_LOCKED  # down_read() left its share
    up_write(sem)
    spin_lock(spin)
    for sleeping in (down_read, down_write, down_read_killable, down_write_killable):
        with pytest.raises(LockingBug):
            sleeping(sem)
    spin_unlock(spin)


def test_a_broken_count_is_found() -> None:
    """check_invariants() names each rule that a forged count breaks."""
    sem = RwSemaphore()
    for count, rule in (
        (RWSEM_WRITER_LOCKED | RWSEM_READER_BIAS, "R1"),
        (RWSEM_FLAG_WAITERS, "R2"),
        (RWSEM_FLAG_HANDOFF, "R3"),
    ):
        sem.count = count
        with pytest.raises(KernelBug, match=rule):
            check_invariants(sem)


# ------------------------------------------------------------------------------------- order


def test_fifo_with_reader_batches() -> None:
    """Queued W1 R1 W2 R2 behind a writer: W1 first, then both readers in one batch, then W2 (phase-fair)."""
    sem, order = RwSemaphore(), []

    def writer(name: str) -> None:
        down_write(sem)
        order.append(name)
        up_write(sem)

    def reader(name: str) -> None:
        down_read(sem)
        order.append(name)
        wait_until(lambda: len(order) >= 3)  # both readers are inside together
        up_read(sem)

    down_write(sem)
    tasks = []
    for n, (func, name) in enumerate(((writer, "W1"), (reader, "R1"), (writer, "W2"), (reader, "R2"))):
        tasks.append(start(func, name))
        wait_until(queued(sem, n + 1))
    assert (rwsem_is_contended(sem), sem.count & RWSEM_FLAG_WAITERS) == (True, RWSEM_FLAG_WAITERS)
    check_invariants(sem)
    up_write(sem)
    join_all(tasks)

    assert (order[0], sorted(order[1:3]), order[3]) == ("W1", ["R1", "R2"], "W2")
    check_invariants(sem)


def test_handoff_shuts_the_door() -> None:
    """A writer that waited 4 ms and wakes to a locked semaphore asks for a handoff: then nobody else gets in
    before it.
    """
    sem, order = RwSemaphore(), []

    def writer() -> None:
        down_write(sem)
        order.append("writer")
        up_write(sem)

    down_read(sem)
    task = start(writer)
    wait_until(queued(sem, 1))
    time.sleep(0.005)
    wake_up_process(task)  # in vain: we still read
    wait_until(lambda: bool(sem.count & RWSEM_FLAG_HANDOFF))
    check_invariants(sem)
    assert (down_read_trylock(sem), down_write_trylock(sem)) == (False, False)

    def late_reader() -> None:
        down_read(sem)
        order.append("reader")
        up_read(sem)

    late = start(late_reader)
    wait_until(queued(sem, 2))  # it may not steal, although only readers hold the lock
    up_read(sem)
    join_all([task, late])

    assert order == ["writer", "reader"]
    check_invariants(sem)


@kernel_struct
class Stream(Struct):
    """A semaphore, a writer that wants it and how often readers got it meanwhile."""

    sem: RwSemaphore = embedded(factory=RwSemaphore)
    wanted: int = 0
    done: int = 0
    overtaken: int = untraced(default=0)


def stream_setup() -> Stream:
    boot()
    return Stream()


def streaming_reader(state: Stream) -> None:
    for _ in range(12):
        down_read(state.sem)
        if state.sem.wait_list and not state.done:
            state.overtaken += 1
        up_read(state.sem)


def wanting_writer(state: Stream) -> None:
    down_write(state.sem)
    state.done = 1
    up_write(state.sem)


def test_readers_cannot_starve_a_writer() -> None:
    """With a stream of readers, a queued writer is overtaken less with the handoff than without, and never
    for long.
    """
    threads = [streaming_reader, streaming_reader, wanting_writer]
    seeds = range(25, 50)
    fair = [state.overtaken for state in under_seeds(stream_setup, threads, seeds=seeds)]
    with guards.without("no-rwsem-handoff"):
        unfair = [state.overtaken for state in under_seeds(stream_setup, threads, seeds=seeds)]

    assert max(fair) <= 3 < max(unfair)


def test_writer_gets_in_under_load() -> None:
    """On real threads a writer gets the lock while four readers take it in a loop."""
    sem = RwSemaphore()
    state = Stream()

    def reader() -> None:
        while not state.done:
            down_read(sem)
            up_read(sem)

    readers = [start(reader) for _ in range(4)]
    for _ in range(5):
        down_write(sem)
        up_write(sem)
    state.done = 1
    join_all(readers)

    check_invariants(sem)
    assert sem.count == 0


# ------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("take", [down_read_killable, down_write_killable])
def test_killed_waiter_leaves(take: Callable[[RwSemaphore], int]) -> None:
    """A fatal signal ends the wait with -EINTR; count and list forget the waiter and the lock goes on
    working.
    """
    sem, results = RwSemaphore(), []
    down_write(sem)
    task = start(lambda: results.append(take(sem)))
    wait_until(queued(sem, 1))
    kill(task)
    join_all([task])

    assert (results, sem.count, sem.wait_list) == ([-EINTR], RWSEM_WRITER_LOCKED, [])
    up_write(sem)
    assert down_write_trylock(sem)
    up_write(sem)


def test_killed_writer_lets_readers_behind_it_in() -> None:
    """Readers queued behind a writer that is killed get in at once: it was all they waited for."""
    sem, results = RwSemaphore(), []
    down_read(sem)
    writer = start(lambda: results.append(down_write_killable(sem)))
    wait_until(queued(sem, 1))

    def reader() -> None:
        # The share of a second reader keeps a first one from stealing: both queue.
        down_read(sem)
        results.append("in")
        up_read(sem)

    task = start(reader)
    wait_until(lambda: len(sem.wait_list) == 2 or "in" in results)
    assert results == []
    kill(writer)
    join_all([writer, task])
    up_read(sem)

    assert sorted(map(str, results)) == sorted([str(-EINTR), "in"])
    check_invariants(sem)


@kernel_struct
class Killable(Struct):
    """A semaphore, the task to kill and what came of it."""

    sem: RwSemaphore = embedded(factory=RwSemaphore)
    count: int = 0
    entered: int = atomic(default=0)
    victim: Any = untraced(default=None)
    result: list[int] = untraced(factory=list)


def killable_setup() -> Killable:
    boot()
    return Killable()


def victim(state: Killable) -> None:
    state.victim = current()
    atomic_inc(state, "entered")
    ret = down_write_killable(state.sem)
    state.result.append(ret)
    if ret == 0:
        state.count += 1
        up_write(state.sem)


def killer(state: Killable) -> None:
    while state.victim is None:
        cpu_relax()
    kill(state.victim)


def other_writer(state: Killable) -> None:
    down_write(state.sem)
    state.count += 1
    up_write(state.sem)


def other_reader(state: Killable) -> None:
    down_read(state.sem)
    up_read(state.sem)


def test_killed_at_any_moment() -> None:
    """Under 50 seeds a writer killed at any moment either has the lock or leaves it usable for everybody
    else.
    """

    def final(state: Killable) -> None:
        check_invariants(state.sem)
        assert (state.sem.count, state.count) == (0, 1 + state.result.count(0))

    states = under_seeds(killable_setup, [victim, killer, other_writer, other_reader], final)

    assert {tuple(state.result) for state in states} == {(0,), (-EINTR,)}


# ------------------------------------------------------------------------------------- downgrade


def test_downgrade_wakes_readers_not_writers() -> None:
    """Readers waiting for a writer get in when it downgrades, writers wait on."""
    sem, got = RwSemaphore(), []
    down_write(sem)

    def reader() -> None:
        down_read(sem)
        got.append("reader")
        up_read(sem)

    def writer() -> None:
        down_write(sem)
        got.append("writer")
        up_write(sem)

    tasks = [start(reader)]
    wait_until(queued(sem, 1))
    tasks.append(start(writer))
    wait_until(queued(sem, 2))
    downgrade_write(sem)
    engine().join(tasks[0], 10)
    assert got == ["reader"]
    rwsem_assert_held(sem)
    up_read(sem)
    join_all(tasks[1:])

    assert got == ["reader", "writer"]
    check_invariants(sem)


@kernel_struct
class Downgraded(Struct):
    """What a writer wrote before it downgraded, and the lock."""

    sem: RwSemaphore = embedded(factory=RwSemaphore)
    value: int = 0


def downgrader(state: Downgraded) -> None:
    down_write(state.sem)
    state.value += 1
    mine = state.value
    downgrade_write(state.sem)
    assert state.value == mine, "a writer came between"
    up_read(state.sem)


def reopener(state: Downgraded) -> None:
    """What downgrade_write() is not: a release and a new acquisition."""
    down_write(state.sem)
    state.value += 1
    mine = state.value
    up_write(state.sem)
    down_read(state.sem)
    assert state.value == mine, "a writer came between"
    up_read(state.sem)


def test_downgrade_leaves_no_window() -> None:
    """Under 50 seeds no writer gets in between the write hold and the read hold; with unlock and lock one
    does.
    """
    under_seeds(Downgraded, [downgrader, downgrader])

    assert failures(Downgraded, [reopener, reopener]) == {AssertionError}
