"""Wait queues and completions: nobody sleeps through a wake-up, exclusive waiters go one at a time, signals,
timeouts.
"""

from collections.abc import Callable
from errno import EINTR
from functools import partial
from typing import Any

import pytest

from kmodel.core import (
    READ_ONCE,
    TASK_UNINTERRUPTIBLE,
    WRITE_ONCE,
    Deadlock,
    KernelBug,
    LockingBug,
    Struct,
    cpu_relax,
    current,
    embedded,
    kernel_struct,
    kill,
    kthread_run,
    schedule,
    set_current_state,
    smp_cond_load_acquire,
    untraced,
)
from kmodel.sync import (
    Completion,
    SpinLock,
    WaitQueueEntry,
    WaitQueueHead,
    complete,
    complete_all,
    completion_done,
    reinit_completion,
    spin_lock,
    spin_unlock,
    try_wait_for_completion,
    wait_event,
    wait_event_exclusive,
    wait_event_interruptible,
    wait_event_killable,
    wait_event_timeout,
    wait_for_completion,
    wait_for_completion_killable,
    wait_for_completion_timeout,
    waitqueue_active,
    wake_up,
    wake_up_all,
    wake_up_nr,
    wq_has_sleeper,
)
from kmodel.sync.wait import check_invariants
from tests.sync.running import failures, join_all, on_threads, under_seeds


@kernel_struct
class Waited(Struct):
    """A condition, a queue, a completion and what came of waiting."""

    ready: int = 0
    wq: WaitQueueHead = embedded(factory=WaitQueueHead)
    x: Completion = embedded(factory=Completion)
    task: Any = untraced(default=None)
    result: list[int] = untraced(factory=list)


def ready(state: Waited) -> Callable[[], bool]:
    return lambda: READ_ONCE(state, "ready") != 0


def waiter(state: Waited) -> None:
    wait_event(state.wq, ready(state))
    state.result.append(0)


def waker(state: Waited) -> None:
    WRITE_ONCE(state, "ready", 1)
    wake_up_all(state.wq)


def saving_waker(state: Waited) -> None:
    """Save the lock when nobody waits."""
    WRITE_ONCE(state, "ready", 1)
    if wq_has_sleeper(state.wq):
        wake_up_all(state.wq)


def final(state: Waited) -> None:
    check_invariants(state.wq)
    assert not waitqueue_active(state.wq)


@pytest.mark.parametrize("wake", [waker, saving_waker])
def test_no_lost_wake_up(wake: Callable[[Waited], None]) -> None:
    """Under 50 seeds both waiters end and the queue is empty."""
    states = under_seeds(Waited, [waiter, waiter, wake], final)

    assert {len(state.result) for state in states} == {2}


def test_testing_before_queueing_loses_the_wake_up() -> None:
    """The broken twin: a waiter that tests the condition before it is on the queue may sleep for ever."""

    def careless(state: Waited) -> None:
        if not state.ready:
            set_current_state(TASK_UNINTERRUPTIBLE)
            entry = WaitQueueEntry(private=current())
            spin_lock(state.wq.lock)
            state.wq.head = (*state.wq.head, entry)
            spin_unlock(state.wq.lock)
            schedule()

    assert failures(Waited, [careless, waker]) == {Deadlock}


def test_threads_pass_a_token() -> None:
    """Four threads on one queue pass a token round; everybody gets every turn."""

    def my_turn(state: Waited, turn: int) -> bool:
        return state.ready == turn

    def player(mine: int) -> Callable[[Waited], None]:
        def play(state: Waited) -> None:
            for n in range(25):
                wait_event(state.wq, partial(my_turn, state, 4 * n + mine))
                state.ready += 1
                wake_up_all(state.wq)

        return play

    assert on_threads(Waited(), [player(n) for n in range(4)]).ready == 100


def test_exclusive_waiters_go_one_at_a_time() -> None:
    """wake_up() wakes one exclusive waiter, the one that came first, and wake_up_nr() as many as asked."""
    state, woken, tasks = Waited(), [], []

    def exclusive(name: int) -> None:
        wait_event_exclusive(state.wq, lambda: state.ready > name)
        woken.append(name)

    for n in range(4):
        tasks.append(kthread_run(exclusive, n, daemon=False))
        smp_cond_load_acquire(state.wq, "head", lambda head, queued=n + 1: len(head) == queued)
    left = []
    for count, wake in ((1, wake_up), (3, lambda wq: wake_up_nr(wq, 2)), (4, wake_up)):
        state.ready = count
        wake(state.wq)
        left.append(len(state.wq.head))
        join_all(tasks[len(woken) : count])
        assert sorted(woken) == list(range(count))

    assert left == [3, 1, 0]


def test_signals() -> None:
    """A fatal signal ends killable and interruptible waits with -EINTR and takes them off the queue."""

    def killable(state: Waited) -> None:
        state.task = current()
        state.result.append(wait_event_killable(state.wq, ready(state)))

    def interruptible(state: Waited) -> None:
        state.task = current()
        state.result.append(wait_event_interruptible(state.wq, ready(state)))

    def on_completion(state: Waited) -> None:
        state.task = current()
        state.result.append(wait_for_completion_killable(state.x))

    def killer(state: Waited) -> None:
        while state.task is None:
            cpu_relax()
        kill(state.task)

    for func in (killable, interruptible, on_completion):
        states = under_seeds(Waited, [func, killer], final, seeds=range(15))
        assert {tuple(state.result) for state in states} == {(-EINTR,)}


def test_timeouts() -> None:
    """A wait with a timeout says whether the condition came true, on real time and on the untimed engine."""
    state = Waited()
    assert not wait_event_timeout(state.wq, ready(state), 0.01)
    assert not wait_for_completion_timeout(state.x, 0.01)
    state.ready = 1
    assert wait_event_timeout(state.wq, ready(state), 10.0)
    complete(state.x)
    assert wait_for_completion_timeout(state.x, 10.0)

    def timed(state: Waited) -> None:
        state.result.append(int(wait_for_completion_timeout(state.x, 1000.0)))

    def completer(state: Waited) -> None:
        complete(state.x)

    assert {tuple(s.result) for s in under_seeds(Waited, [timed, completer])} == {(1,)}


def test_waiting_needs_process_context() -> None:
    """Waiting under a spinlock is a bug even when the condition holds already."""
    lock, x = SpinLock(), Completion()
    complete(x)
    spin_lock(lock)
    with pytest.raises(LockingBug):
        wait_for_completion(x)
    with pytest.raises(LockingBug):
        wait_event(WaitQueueHead(), lambda: True)
    spin_unlock(lock)


def test_completion_counts() -> None:
    """Each complete() pays for one wait; complete_all() for all, until reinit."""
    x = Completion()
    assert not try_wait_for_completion(x)
    complete(x)
    complete(x)
    wait_for_completion(x)
    assert completion_done(x)
    assert [try_wait_for_completion(x), try_wait_for_completion(x)] == [True, False]
    complete_all(x)
    assert [try_wait_for_completion(x), try_wait_for_completion(x)] == [True, True]
    reinit_completion(x)

    assert not completion_done(x)


def test_completion_on_both_sides() -> None:
    """Under 50 seeds two waits take two completes, whatever comes first."""

    def waits(state: Waited) -> None:
        wait_for_completion(state.x)
        state.result.append(0)

    def completes(state: Waited) -> None:
        complete(state.x)

    states = under_seeds(Waited, [waits, waits, completes, completes])

    assert {(len(state.result), state.x.done) for state in states} == {(2, 0)}


def test_a_broken_queue_is_found() -> None:
    """check_invariants() knows an entry that is queued twice or does not know that it is queued."""
    wq, entry = WaitQueueHead(), WaitQueueEntry()
    wq.head = (entry,)
    with pytest.raises(KernelBug, match="U3"):
        check_invariants(wq)
    entry.queued, wq.head = True, (entry, entry)
    with pytest.raises(KernelBug, match="twice"):
        check_invariants(wq)
