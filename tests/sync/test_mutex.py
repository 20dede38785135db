"""mutex: handoff, signals, misuse."""

import time
from errno import EINTR
from typing import Any

import pytest

from kmodel.core import (
    TASK_RUNNING,
    KernelBug,
    LockingBug,
    Struct,
    boot,
    cpu_relax,
    current,
    embedded,
    guards,
    kernel_struct,
    kill,
    kthread_run,
    untraced,
    wake_up_process,
)
from kmodel.sync import (
    MUTEX_FLAG_HANDOFF,
    MUTEX_FLAG_PICKUP,
    MUTEX_FLAG_WAITERS,
    Mutex,
    mutex_is_locked,
    mutex_lock,
    mutex_lock_killable,
    mutex_trylock,
    mutex_unlock,
    spin_lock,
    spin_unlock,
)
from kmodel.sync.mutex import check_invariants
from tests.sync.running import join_all, under_seeds


@kernel_struct
class Contended(Struct):
    """A mutex, what it protects, the task to kill and what came of it."""

    lock: Mutex = embedded(factory=Mutex)
    count: int = 0
    victim: Any = untraced(default=None)
    result: list[int] = untraced(factory=list)


def setup() -> Contended:
    boot()
    return Contended()


def test_misuse_is_loud() -> None:
    """Unlocking what one does not hold and locking what one holds are bugs; sleeping for it in a spinlock
    too.
    """
    lock = Mutex()
    with pytest.raises(LockingBug):
        mutex_unlock(lock)
    mutex_lock(lock)
    with pytest.raises(LockingBug):
        mutex_lock(lock)
    assert mutex_is_locked(lock)
    mutex_unlock(lock)
    assert not mutex_is_locked(lock)


def test_a_broken_word_is_found() -> None:
    """check_invariants() compares the waiters flag with the list."""
    lock = Mutex()
    lock.owner = (None, MUTEX_FLAG_WAITERS)

    with pytest.raises(KernelBug, match="X4"):
        check_invariants(lock)


def test_waiters_get_it_in_order() -> None:
    """Three tasks queued behind the holder get the mutex in the order in which they came."""
    lock, order, tasks = Mutex(), [], []

    def waiter(name: int) -> None:
        mutex_lock(lock)
        order.append(name)
        mutex_unlock(lock)

    mutex_lock(lock)
    for n in range(3):
        tasks.append(kthread_run(waiter, n, daemon=False))
        while len(lock.wait_list) <= n:
            time.sleep(0.0005)
        spin_lock(lock.wait_lock)  # it has tried in vain now; until then it might find the mutex free
        spin_unlock(lock.wait_lock)
    check_invariants(lock)
    mutex_unlock(lock)
    join_all(tasks)

    assert order == [0, 1, 2]
    check_invariants(lock)


def asks_for_handoff(lock: Mutex) -> bool:
    """Queue a waiter and wake it while the mutex is held; whether it then wants the mutex handed over."""

    def waiter() -> None:
        mutex_lock(lock)
        mutex_unlock(lock)

    mutex_lock(lock)
    task = kthread_run(waiter, daemon=False)
    while not lock.wait_list or task.state == TASK_RUNNING:
        time.sleep(0.0005)
    wake_up_process(task)
    while task.state == TASK_RUNNING:
        time.sleep(0.0005)
    spin_lock(lock.wait_lock)  # it has tried in vain now and sleeps again
    asked = bool(lock.owner[1] & MUTEX_FLAG_HANDOFF)
    spin_unlock(lock.wait_lock)
    mutex_unlock(lock)
    if asked:
        assert lock.owner is not None or not lock.wait_list, "let go although a handoff was wanted"
    join_all([task])
    return asked


def test_first_waiter_cannot_be_starved() -> None:
    """A first waiter that was woken in vain asks for the mutex to be handed over; without the guard it does
    not.
    """
    with_it = asks_for_handoff(Mutex())
    with guards.without("no-mutex-handoff"):
        without = asks_for_handoff(Mutex())

    assert (with_it, without) == (True, False)


def test_handed_over_is_not_free() -> None:
    """Between the handoff and the pick-up nobody but the task in the word gets the mutex."""
    lock, other = Mutex(), kthread_run(lambda: None, daemon=False)
    join_all([other])
    lock.owner = (other, MUTEX_FLAG_PICKUP)

    assert (mutex_trylock(lock), mutex_is_locked(lock)) == (False, True)
    lock.owner = (current(), MUTEX_FLAG_PICKUP)
    assert mutex_trylock(lock)
    mutex_unlock(lock)
    assert lock.owner is None


def victim(state: Contended) -> None:
    state.victim = current()
    ret = mutex_lock_killable(state.lock)
    state.result.append(ret)
    if ret == 0:
        mutex_unlock(state.lock)


def killer(state: Contended) -> None:
    while state.victim is None:
        cpu_relax()
    kill(state.victim)


def locker(state: Contended) -> None:
    for _ in range(2):
        mutex_lock(state.lock)
        state.count += 1
        mutex_unlock(state.lock)


def test_killed_at_any_moment() -> None:
    """Under 50 seeds a killed waiter has the mutex or -EINTR, even when it had asked for a handoff; others go
    on.
    """

    def final(state: Contended) -> None:
        check_invariants(state.lock)
        assert (state.lock.owner, state.count) == (None, 4)

    states = under_seeds(setup, [victim, killer, locker, locker], final)

    assert {tuple(state.result) for state in states} == {(0,), (-EINTR,)}


def test_trylock_does_not_take_what_is_handed_over() -> None:
    """mutex_trylock fails on a held mutex and leaves no flag behind."""
    lock = Mutex()
    assert mutex_trylock(lock)
    assert not mutex_trylock(lock)
    mutex_unlock(lock)

    assert lock.owner is None
