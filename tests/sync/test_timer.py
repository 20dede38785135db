"""Timers: armed, re-armed, deleted; deleted with _sync while their function runs; their context."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from kmodel.core import (
    LockingBug,
    Struct,
    boot,
    cpu_relax,
    embedded,
    engine,
    guards,
    kernel_struct,
    kernel_warnings,
    might_sleep,
    untraced,
)
from kmodel.sync import (
    TimerList,
    mod_timer,
    timer_delete,
    timer_delete_sync,
    timer_pending,
    timer_setup,
    timer_shutdown_sync,
)
from tests.sync.running import failures, under_seeds


@kernel_struct
class Owner(Struct):
    """Something with a timer whose function uses it in two steps."""

    started: int = 0
    ended: int = 0
    alive: int = 1
    rearm: int = 0
    timer: TimerList = embedded(factory=lambda: TimerList(function=expired))
    times: list[float] = untraced(factory=list)


def expired(timer: TimerList) -> None:
    owner = timer.container
    owner.started += 1
    owner.times.append(engine().now())
    if owner.rearm:
        owner.rearm -= 1
        mod_timer(timer, 0.001)
    assert owner.alive, "the owner is gone"
    owner.ended += 1


def setup() -> Owner:
    boot()
    owner = Owner()
    owner.timer.container = owner
    return owner


def wait_for(owner: Owner, runs: int) -> None:
    deadline = time.monotonic() + 5
    while owner.ended < runs and time.monotonic() < deadline:
        time.sleep(0.001)
    assert owner.ended == runs


def armed_and_then(first: float, then: Callable[[Owner], Any]) -> tuple[Owner, Any]:
    """Arm a timer for `first` seconds and do `then` at once; again, if a busy machine kept us too long."""
    while True:
        owner, begun = setup(), time.monotonic()
        mod_timer(owner.timer, first)
        result = then(owner)
        if time.monotonic() - begun < first:
            return owner, result
        timer_delete_sync(owner.timer)


def test_goes_off_once_and_not_early() -> None:
    """An armed timer calls its function once, after its time."""
    owner, begun = setup(), time.monotonic()
    assert mod_timer(owner.timer, 0.02) is False
    assert timer_pending(owner.timer)
    wait_for(owner, 1)

    assert owner.times[0] - begun >= 0.02
    assert not timer_pending(owner.timer)
    time.sleep(0.01)
    assert owner.ended == 1


def test_re_arming_moves_it() -> None:
    """mod_timer() on an armed timer moves it later or sooner; one call comes, at the last time set."""
    begun = time.monotonic()
    owner, was_armed = armed_and_then(0.005, lambda owner: mod_timer(owner.timer, 0.03))
    assert was_armed is True
    wait_for(owner, 1)
    assert owner.times[0] - begun >= 0.03

    begun = time.monotonic()
    mod_timer(owner.timer, 60.0)
    mod_timer(owner.timer, 0.01)
    wait_for(owner, 2)
    assert 0.01 <= owner.times[1] - begun < 5


def test_deleted_does_not_go_off() -> None:
    """timer_delete() says whether the timer was armed, and it does not go off."""
    owner, deleted = armed_and_then(0.01, lambda o: [timer_delete(o.timer), timer_delete(o.timer)])

    assert deleted == [True, False]
    time.sleep(0.02)
    assert owner.started == 0


def test_shut_down_cannot_be_armed() -> None:
    """After timer_shutdown_sync() mod_timer() does nothing, until the timer is set up again."""
    owner = setup()
    mod_timer(owner.timer, 60.0)

    assert timer_shutdown_sync(owner.timer)
    assert not mod_timer(owner.timer, 0.001)
    assert not timer_pending(owner.timer)
    timer_setup(owner.timer, expired)
    mod_timer(owner.timer, 0.001)
    wait_for(owner, 1)


def test_re_arms_itself() -> None:
    """A function that arms its own timer is called again, and never beside itself."""
    owner = setup()
    owner.rearm = 3
    mod_timer(owner.timer, 0.001)
    wait_for(owner, 4)


def test_functions_may_not_sleep() -> None:
    """H56: a timer's function runs with preemption off, so might_sleep() objects; then it is back on."""
    said: list[str] = []

    def sleepy(timer: TimerList) -> None:
        with pytest.raises(LockingBug):
            might_sleep()
        with pytest.raises(LockingBug):
            timer_delete_sync(timer)
        said.append("bug")

    boot()
    timer = TimerList(function=sleepy)
    mod_timer(timer, 0.0)
    deadline = time.monotonic() + 5
    while not said and time.monotonic() < deadline:
        time.sleep(0.001)
    assert timer_delete_sync(timer) is False

    assert said == ["bug"]
    assert kernel_warnings() == ()


# ------------------------------------------------------------------------------------- delete_sync (T3)


def leaver(owner: Owner) -> None:
    mod_timer(owner.timer, 1.0)
    for _ in range(6):
        cpu_relax()
    timer_delete_sync(owner.timer)
    owner.alive = 0
    started = owner.started
    for _ in range(8):
        cpu_relax()
    assert (owner.started, owner.ended) == (started, started)


def rearming() -> Owner:
    owner = setup()
    owner.rearm = 2
    return owner


@pytest.mark.parametrize("make", [setup, rearming])
def test_delete_sync_waits(make: Any) -> None:
    """Under 50 seeds the owner goes away only after the function, also one that re-arms its timer."""
    states = under_seeds(make, [leaver])

    assert len({owner.started for owner in states}) > 1


def test_without_the_wait_the_owner_is_gone() -> None:
    """H61: with the wait removed the function meets its owner gone under some seed."""
    with guards.without("no-timer-delete-sync-wait"):
        assert failures(setup, [leaver], seeds=range(100)) == {AssertionError}


def test_armed_by_two_tasks() -> None:
    """Under 50 seeds a timer armed by two tasks never runs beside itself."""

    def armer(owner: Owner) -> None:
        for _ in range(2):
            mod_timer(owner.timer, 1.0)
            for _ in range(4):
                cpu_relax()

    def once(timer: TimerList) -> None:
        owner = timer.container
        owner.started += 1
        assert owner.started == owner.ended + 1, "beside itself"
        owner.ended += 1

    def make() -> Owner:
        owner = setup()
        owner.timer.function = once
        return owner

    under_seeds(make, [armer, armer])
