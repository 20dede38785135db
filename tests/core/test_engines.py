"""Tasks and blocking on both engines, and the cooperative engine's promises."""

import time
from typing import Any

import pytest

from kmodel.core import (
    READ_ONCE,
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
    WRITE_ONCE,
    CoopEngine,
    Deadlock,
    LockingBug,
    Struct,
    TooManySteps,
    alloc_percpu,
    atomic,
    cpu_relax,
    current,
    engine,
    for_each_possible_cpu,
    guards,
    installed,
    kernel_struct,
    kernel_warnings,
    kill,
    kthread_run,
    lock_acquire,
    lock_release,
    lockdep_assert_held,
    lockdep_assert_held_write,
    might_sleep,
    ptr,
    schedule,
    schedule_timeout,
    set_current_state,
    this_cpu_inc,
    this_cpu_ptr,
    variables,
    wake_up_process,
    xchg,
)
from kmodel.core.report import WARN, clear_warnings

SEEDS = range(40)


def lost_update(state: Any) -> None:
    """Increment without a lock."""
    value = state.x
    state.x = value + 1


def test_coop_reaches_both_outcomes_of_a_lost_update() -> None:
    """Over some seeds an unlocked increment is lost, over others it is not."""
    results = {CoopEngine(seed).run(lambda: variables(x=0), [lost_update, lost_update]).x for seed in SEEDS}

    assert results == {1, 2}


def test_equal_seed_gives_equal_trace() -> None:
    """The whole trace is a function of the seed, and another seed gives another one."""

    def trace(seed: int) -> list[Any]:
        coop = CoopEngine(seed)
        coop.run(lambda: variables(x=0), [lost_update] * 3)
        return coop.trace

    assert trace(5) == trace(5)
    assert len({tuple(trace(seed)) for seed in SEEDS}) > 1


def test_slots_come_back_after_a_traced_run() -> None:
    """After a run a field is its plain slot again and reads what the run left."""
    state = CoopEngine(1).run(lambda: variables(x=0), [lost_update])

    assert type(type(state).__dict__["x"]).__name__ == "member_descriptor"
    assert state.x == 1
    assert engine().name == "threads"


def test_addresses_do_not_depend_on_the_run() -> None:
    """ptr() of the objects a scenario builds is the same in every run."""

    def addresses(seed: int) -> list[int]:
        found: list[int] = []
        state = CoopEngine(seed).run(
            lambda: variables(x=0), [lambda _s: found.append(ptr(variables(y=0))), lambda _s: None]
        )
        return [ptr(state), *found]

    assert addresses(1) == addresses(2)


def test_deadlock_names_the_waiters() -> None:
    """When nobody can go on, the error says who waits for what."""
    from kmodel.core import smp_cond_load_acquire

    def wait(state: Any) -> None:
        smp_cond_load_acquire(state, "x", lambda value: value == 1)

    with pytest.raises(Deadlock, match=r"task 1 wait.* waits on Variables.*\.x"):
        CoopEngine(0).run(lambda: variables(x=0), [wait])


def test_a_run_is_bounded() -> None:
    """A loop that never ends is stopped by the bound of steps."""

    def spin(state: Any) -> None:
        while not READ_ONCE(state, "x"):
            cpu_relax()

    with pytest.raises(TooManySteps):
        CoopEngine(0, max_steps=500).run(lambda: variables(x=0), [spin])


def test_an_error_in_a_task_ends_the_run_and_is_raised() -> None:
    """What a task raises reaches the caller, and the others are unwound."""

    def fail(state: Any) -> None:
        WRITE_ONCE(state, "x", 1)
        raise ZeroDivisionError("from a task")

    def wait(state: Any) -> None:
        set_current_state(TASK_UNINTERRUPTIBLE)
        schedule()

    with pytest.raises(ZeroDivisionError, match="from a task"):
        CoopEngine(0).run(lambda: variables(x=0), [fail, wait])


def sleeper(state: Any) -> None:
    """Sleep until `go` is set, the kernel's way."""
    state.who = current()
    WRITE_ONCE(state, "ready", 1)
    while True:
        set_current_state(TASK_UNINTERRUPTIBLE)
        if READ_ONCE(state, "go"):
            break
        schedule()
    WRITE_ONCE(current(), "state", TASK_RUNNING)


def waker(state: Any) -> None:
    """Set `go`, then wake the sleeper."""
    while not READ_ONCE(state, "ready"):
        cpu_relax()
    xchg(state, "go", 1)
    wake_up_process(state.who)


def new_sleep() -> Any:
    """The state of a sleeper and its waker."""
    return variables(who=None, ready=0, go=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_sleep_and_wake_on_coop(seed: int) -> None:
    """Set state, test, schedule never misses a wake-up, whatever the order."""
    CoopEngine(seed).run(new_sleep, [sleeper, waker])


def test_sleep_and_wake_on_threads() -> None:
    """The same two functions on real threads."""
    for _ in range(20):
        state = new_sleep()
        tasks = [kthread_run(func, state, daemon=False) for func in (sleeper, waker)]
        assert [engine().join(task, 10) for task in tasks] == [True, True]


def test_forgetting_to_announce_the_sleep_loses_the_wake_up() -> None:
    """The broken twin: state set after the test, so some seed sleeps for ever."""

    def broken(state: Any) -> None:
        state.who = current()
        WRITE_ONCE(state, "ready", 1)
        if not READ_ONCE(state, "go"):
            set_current_state(TASK_UNINTERRUPTIBLE)
            schedule()

    lost = 0
    for seed in SEEDS:
        try:
            CoopEngine(seed).run(new_sleep, [broken, waker])
        except Deadlock:
            lost += 1

    assert lost > 0


def test_join_raises_what_the_task_raised() -> None:
    """An error of a real thread's task is raised by join."""

    def fail() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        engine().join(kthread_run(fail, daemon=False), 10)


def test_schedule_timeout_comes_back() -> None:
    """A sleep with a timeout ends without a waker and leaves the state running."""
    start = time.monotonic()
    set_current_state(TASK_UNINTERRUPTIBLE)
    schedule_timeout(0.02)

    assert time.monotonic() - start >= 0.02
    assert current().state == TASK_RUNNING


def test_kill_wakes_a_killable_sleeper_only() -> None:
    """A fatal signal wakes TASK_KILLABLE but not TASK_UNINTERRUPTIBLE."""
    from kmodel.core import TASK_KILLABLE

    task = current()
    for state, expected in ((TASK_KILLABLE, TASK_RUNNING), (TASK_UNINTERRUPTIBLE, TASK_UNINTERRUPTIBLE)):
        WRITE_ONCE(task, "state", state)
        kill(task)
        assert task.state == expected
    WRITE_ONCE(task, "state", TASK_RUNNING)
    WRITE_ONCE(task, "sigkill", False)


def test_run_later_runs_in_a_worker() -> None:
    """Deferred work runs in another task, delayed work after its delay, on real threads."""
    state = variables(x=0, pid=0)
    start = time.monotonic()

    def work() -> None:
        state.pid = current().pid
        WRITE_ONCE(state, "x", time.monotonic() - start)

    engine().run_later(work, 0.03, "test")
    deadline = start + 10
    while not READ_ONCE(state, "x") and time.monotonic() < deadline:
        cpu_relax()

    assert state.x >= 0.03
    assert state.pid != current().pid


def test_lockdep_knows_who_holds_what() -> None:
    """Holding is per task and mode; releasing what is not held is a bug."""
    lock = variables(x=0)
    lock_acquire(lock, "read")
    lockdep_assert_held(lock)
    with pytest.raises(LockingBug, match="for writing"):
        lockdep_assert_held_write(lock)
    lock_release(lock)
    with pytest.raises(LockingBug, match="does not hold"):
        lock_release(lock)


def test_might_sleep_refuses_atomic_context() -> None:
    """Sleeping with preemption off or inside an RCU reader is a bug."""
    lock = variables(x=0)
    might_sleep()
    lock_acquire(lock, atomic=True)
    with pytest.raises(LockingBug, match="preemption disabled"):
        might_sleep()
    lock_release(lock, atomic=True)
    current().rcu_read_lock_nesting = 1
    with pytest.raises(LockingBug, match="RCU read-side"):
        might_sleep()
    current().rcu_read_lock_nesting = 0


@kernel_struct
class Counter(Struct):
    """A per-CPU counter."""

    n: int = atomic(default=0)


def test_percpu_counts_add_up() -> None:
    """Increments by tasks on different CPUs land in their own counters and sum to the total."""

    def count(state: Any) -> None:
        for _ in range(5):
            this_cpu_inc(state.x, "n")

    state = CoopEngine(3, nr_cpu_ids=2).run(lambda: variables(x=alloc_percpu(Counter)), [count] * 3)

    assert [c.n for c in for_each_possible_cpu(state.x)] == [10, 5]


def test_this_cpu_ptr_is_stable() -> None:
    """A task always gets the same CPU's struct."""
    pcpu = alloc_percpu(Counter)

    assert this_cpu_ptr(pcpu) is this_cpu_ptr(pcpu)


def test_only_one_traced_engine_at_a_time() -> None:
    """Installing an engine inside a traced run is refused."""
    coop = CoopEngine(0)
    with installed(coop), pytest.raises(RuntimeError, match="already installed"), installed(CoopEngine(1)):
        pass


def test_warnings_are_counted_per_site() -> None:
    """The same warning counts up; clearing forgets it."""
    clear_warnings()
    for _ in range(3):
        WARN(True, "odd")
    WARN(False, "never")

    assert [(w.message, w.count) for w in kernel_warnings()] == [("odd", 3)]
    clear_warnings()
    assert kernel_warnings() == ()


def test_guards_come_back_and_unknown_ones_are_refused() -> None:
    """A guard is removed for the block only; an unknown name is an error that lists the known ones."""
    guards.register("test-guard", "nothing, it is for this test")
    with guards.without("test-guard"):
        assert "test-guard" in guards.removed
    assert "test-guard" not in guards.removed
    with pytest.raises(ValueError, match="unknown guard 'nonsense'"), guards.without("nonsense"):
        pass


def test_a_thread_that_ends_takes_its_task_along() -> None:
    """An adopted thread's task is gone with the thread, so that a later thread of the same number gets its
    own.
    """
    import threading

    tasks: list[Any] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: tasks.append(current()))
        thread.start()
        thread.join()

    assert len(set(map(id, tasks))) == 3
    assert not set(engine().tasks()) & set(tasks)
