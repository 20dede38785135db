"""rcuwait: no lost wake-up, signals, and the pair of barriers."""

from collections.abc import Callable
from errno import EINTR
from typing import Any

import pytest

from kmodel.core import (
    READ_ONCE,
    TASK_KILLABLE,
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
    WRITE_ONCE,
    Deadlock,
    LockingBug,
    Struct,
    cpu_relax,
    current,
    embedded,
    guards,
    kernel_struct,
    kill,
    schedule,
    set_current_state,
    untraced,
)
from kmodel.explore import explore
from kmodel.sync import Rcuwait, rcuwait_active, rcuwait_wait_event, rcuwait_wake_up
from kmodel.sync.rcuwait import finish_rcuwait, prepare_to_rcuwait
from tests.sync.running import failures, kinds_of, on_threads, trace_of, under_seeds


@kernel_struct
class Waited(Struct):
    """A condition and who waits for it."""

    ready: int = 0
    wait: Rcuwait = embedded(factory=Rcuwait)
    waiter: Any = untraced(default=None)
    result: int | None = untraced(default=None)


def ready(state: Waited) -> Callable[[], bool]:
    return lambda: READ_ONCE(state, "ready") != 0


def waiter(state: Waited) -> None:
    state.result = rcuwait_wait_event(state.wait, ready(state))


def waker(state: Waited) -> None:
    WRITE_ONCE(state, "ready", 1)
    rcuwait_wake_up(state.wait)


def test_no_lost_wake_up() -> None:
    """Under 50 seeds the waiter always ends, and leaves no trace."""
    states = under_seeds(Waited, [waiter, waker])

    assert {(state.result, state.wait.task) for state in states} == {(0, None)}


def test_no_lost_wake_up_on_threads() -> None:
    """A hundred rounds of ping-pong between two threads that wait for each other."""

    @kernel_struct
    class Game(Struct):
        turn: int = 0
        ping: Rcuwait = embedded(factory=Rcuwait)
        pong: Rcuwait = embedded(factory=Rcuwait)

    def player(mine: int) -> Callable[[Any], None]:
        def play(game: Any) -> None:
            own, other = (game.ping, game.pong) if mine == 0 else (game.pong, game.ping)
            for _ in range(100):
                rcuwait_wait_event(own, lambda: game.turn % 2 == mine)
                game.turn += 1
                rcuwait_wake_up(other)

        return play

    assert on_threads(Game(), [player(0), player(1)]).turn == 200


def test_testing_before_announcing_loses_the_wake_up() -> None:
    """The broken twin: a waiter that tests the condition and then announces its sleep may sleep for ever
    (H29).
    """

    def careless(state: Waited) -> None:
        prepare_to_rcuwait(state.wait)
        while not READ_ONCE(state, "ready"):
            set_current_state(TASK_UNINTERRUPTIBLE)
            schedule()
        finish_rcuwait(state.wait)

    result = explore(Waited, careless, waker, memory="sc")

    assert result.violation is not None
    assert result.violation.kind == "lost-wakeup"


def test_waking_before_the_condition_loses_the_wake_up() -> None:
    """The broken twin of the waker: what a missing barrier B lets the machine do."""

    def careless(state: Waited) -> None:
        rcuwait_wake_up(state.wait)
        WRITE_ONCE(state, "ready", 1)

    assert failures(Waited, [waiter, careless]) == {Deadlock}


def test_signal_ends_a_killable_wait_only() -> None:
    """A fatal signal gives -EINTR at any moment; an uninterruptible wait goes on until its condition."""

    def killable(state: Waited) -> None:
        state.waiter = current()
        state.result = rcuwait_wait_event(state.wait, ready(state), TASK_KILLABLE)

    def uninterruptible(state: Waited) -> None:
        state.waiter = current()
        waiter(state)

    def killer(state: Waited) -> None:
        while state.waiter is None:
            cpu_relax()
        kill(state.waiter)

    killed = under_seeds(Waited, [killable, killer])
    waited = under_seeds(Waited, [uninterruptible, killer, waker])

    assert {(s.result, s.wait.task, s.waiter.state) for s in killed} == {(-EINTR, None, TASK_RUNNING)}
    assert {s.result for s in waited} == {0}


def test_one_waiter_only() -> None:
    """A second waiter on the same rcuwait is a bug of whoever should have serialised them."""
    w = Rcuwait()
    prepare_to_rcuwait(w)

    assert rcuwait_active(w)
    with pytest.raises(LockingBug):
        prepare_to_rcuwait(w)
    finish_rcuwait(w)


def test_wake_up_without_a_waiter() -> None:
    """Nobody is woken and nothing happens."""
    assert rcuwait_wake_up(Rcuwait()) is False


@pytest.mark.parametrize(
    ("guard", "thread"), [("no-rcuwait-waiter-mb", waiter), ("no-rcuwait-waker-mb", waker)]
)
def test_each_side_has_its_barrier(guard: str, thread: Callable[[Waited], None]) -> None:
    """One full barrier on each side, and its guard takes away exactly that one."""

    def already() -> Waited:
        return Waited(ready=1)

    whole = kinds_of(trace_of(0, already, [thread]))
    with guards.without(guard):
        broken = kinds_of(trace_of(0, already, [thread]))

    assert (whole.count("mb"), [kind for kind in whole if kind != "mb"]) == (1, broken)
