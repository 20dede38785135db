"""What is wrong besides failed assertions, and how it is reported."""

from typing import Any

import pytest

from kmodel.core import (
    READ_ONCE,
    TASK_UNINTERRUPTIBLE,
    WARN_ON_ONCE,
    WRITE_ONCE,
    Struct,
    boot,
    cpu_relax,
    current,
    data_race,
    kernel_struct,
    kfree,
    kthread_run,
    mark_allocated,
    might_sleep,
    rcu_assign_pointer,
    rcu_dereference,
    schedule,
    set_current_state,
    smp_cond_load_acquire,
    smp_load_acquire,
    smp_store_release,
    variables,
    wake_up_process,
)
from kmodel.explore import Result, Verdict, explore
from kmodel.rcu import call_rcu, rcu_barrier, rcu_read_lock, rcu_read_unlock, synchronize_rcu
from kmodel.sync import SpinLock, spin_lock, spin_unlock

MODELS = pytest.mark.parametrize("memory", ["sc", "tso", "lkmm"])


def kind(result: Result) -> str:
    assert result.verdict is Verdict.FAIL, result
    assert result.violation is not None
    return result.violation.kind


# ------------------------------------------------------------------------------------------------- data races


def publish(store: Any, load: Any, memory: str) -> Result:
    def writer(v: Any) -> None:
        v.x = 1
        store(v, "y", 1)

    def reader(v: Any) -> None:
        if load(v, "y"):
            assert v.x == 1

    return explore(lambda: variables(x=0, y=0), writer, reader, memory=memory)


@MODELS
def test_race_of_plain_accesses(memory: str) -> None:
    """Two plain stores without a lock: a race that names the variable, both tasks and both lines."""

    def first(v: Any) -> None:
        v.x = 1

    def second(v: Any) -> None:
        v.x = 2

    result = explore(lambda: variables(x=0), first, second, memory=memory)

    assert kind(result) == "data-race"
    assert result.violation is not None
    message = result.violation.message
    assert "plain store of x by second" in message
    assert "plain store by first" in message
    assert message.count("test_oracles.py:") == 2


def test_orderings_that_prevent_races() -> None:
    """Release and acquire order plain accesses; READ_ONCE and WRITE_ONCE do so under sc only."""
    assert publish(smp_store_release, smp_load_acquire, "lkmm").passed
    assert kind(publish(WRITE_ONCE, READ_ONCE, "lkmm")) == "data-race"
    assert publish(WRITE_ONCE, READ_ONCE, "sc").passed


@MODELS
def test_locks_order_plain_accesses(memory: str) -> None:
    """Plain accesses under a spinlock do not race; beside it they do."""

    def setup() -> Any:
        return [SpinLock(), variables(n=0)]

    def locked(s: Any) -> None:
        spin_lock(s[0])
        s[1].n += 1
        spin_unlock(s[0])

    def unlocked(s: Any) -> None:
        s[1].n += 1

    result = explore(setup, locked, locked, outcome=lambda s: s[1].n, memory=memory)
    assert result.passed
    assert result.outcomes == {2}
    assert kind(explore(setup, locked, unlocked, memory=memory)) == "data-race"


@MODELS
def test_data_race_by_intent(memory: str) -> None:
    """What happens inside data_race() is not reported, a marked access beside a plain one is."""

    def writer(v: Any) -> None:
        v.x = 1

    def intended(v: Any) -> None:
        data_race(lambda: v.x)

    def marked(v: Any) -> None:
        READ_ONCE(v, "x")

    assert explore(lambda: variables(x=0), writer, intended, memory=memory).passed
    assert kind(explore(lambda: variables(x=0), writer, marked, memory=memory)) == "data-race"
    assert explore(lambda: variables(x=0), writer, marked, memory=memory, races=False).passed


# ------------------------------------------------------------------------------------------------- lifetimes


@kernel_struct
class Item(Struct):
    """Something that is freed."""

    value: int = 0


@kernel_struct
class Slot(Struct):
    """Where it is found."""

    item: Any = None


def slot() -> Slot:
    boot()
    item = Item(value=7)
    mark_allocated(item)
    return Slot(item=item)


def reader(s: Slot) -> None:
    rcu_read_lock()
    item = rcu_dereference(s, "item")
    if item is not None:
        assert READ_ONCE(item, "value") == 7
    rcu_read_unlock()


@MODELS
def test_use_after_free(memory: str) -> None:
    """Freed while a reader may still look: found, with the step of the free."""

    def remove(s: Slot) -> None:
        item = s.item
        WRITE_ONCE(s, "item", None)
        kfree(item)

    result = explore(slot, remove, reader, memory=memory)

    assert kind(result) == "use-after-free"
    assert result.violation is not None
    assert "after remove freed the object" in result.violation.message
    assert result.trace is not None
    assert [r["text"] for r in result.trace["violation"]["related"]] == ["Freed by remove."]


@MODELS
@pytest.mark.parametrize("defer", ["synchronize", "call"])
def test_grace_period_protects(memory: str, defer: str) -> None:
    """synchronize_rcu() or call_rcu() before the free: every execution is fine, the callback's too."""

    def remove(s: Slot) -> None:
        item = s.item
        rcu_assign_pointer(s, "item", None)
        if defer == "call":
            call_rcu(item, kfree)
            rcu_barrier()
        else:
            synchronize_rcu()
            kfree(item)

    result = explore(slot, remove, reader, reader, memory=memory, leaks=True)

    assert result.passed, result.timeline()


def test_double_free() -> None:
    """Two tasks free one object."""

    def free(s: Slot) -> None:
        item = READ_ONCE(s, "item")
        if item is not None:
            WRITE_ONCE(s, "item", None)
            kfree(item)

    assert kind(explore(slot, free, free, memory="sc")) in ("double-free", "use-after-free")


def test_leak() -> None:
    """What was allocated and never freed is a violation where leaks are asked for."""

    def task(s: Slot) -> None:
        READ_ONCE(s, "item")

    assert explore(slot, task).passed
    result = explore(slot, task, leaks=True)
    assert kind(result) == "leak"
    assert "Item" in str(result.violation)


# ------------------------------------------------------------------------------------------------- blocking


@MODELS
def test_deadlock(memory: str) -> None:
    """Two locks in two orders: found, with who waits for what and holds what."""

    def take(first: int, second: int) -> Any:
        def body(locks: Any) -> None:
            spin_lock(locks[first])
            spin_lock(locks[second])
            spin_unlock(locks[second])
            spin_unlock(locks[first])

        body.__name__ = f"task{first}"
        return body

    result = explore(lambda: [SpinLock(), SpinLock()], take(0, 1), take(1, 0), memory=memory)

    assert kind(result) == "deadlock"
    assert result.trace is not None
    waits = result.trace["violation"]["waits"]
    assert [(w["task"], w["held_by"], w["holds"]) for w in waits] == [
        (1, 2, ["SpinLock[0] (write)"]),
        (2, 1, ["SpinLock[1] (write)"]),
    ]
    assert explore(lambda: [SpinLock(), SpinLock()], take(0, 1), take(0, 1), memory=memory).passed


def test_lock_order_cycles() -> None:
    """Two orders of two locks are listed even where a third lock keeps them from meeting."""

    def take(first: int, second: int) -> Any:
        def body(locks: Any) -> None:
            for n in (0, first, second):
                spin_lock(locks[n])
            for n in (second, first, 0):
                spin_unlock(locks[n])

        return body

    def setup() -> Any:
        return [SpinLock(), SpinLock(), SpinLock()]

    result = explore(setup, take(1, 2), take(2, 1))
    assert result.passed
    assert result.lock_cycles == [["SpinLock[1]", "SpinLock[2]"]]
    assert explore(setup, take(1, 2), take(1, 2)).lock_cycles == []


@MODELS
@pytest.mark.parametrize("broken", [False, True])
def test_lost_wakeup(memory: str, broken: bool) -> None:
    """Testing the condition before announcing the sleep loses a wake-up; after it does not."""

    class Shared:
        def __init__(self) -> None:
            boot()
            self.v = variables(ready=0, sleeper=None)

    def sleeper(s: Shared) -> None:
        smp_store_release(s.v, "sleeper", current())
        while True:
            if broken and READ_ONCE(s.v, "ready"):
                break
            set_current_state(TASK_UNINTERRUPTIBLE)
            if not broken and READ_ONCE(s.v, "ready"):
                break
            schedule()
        set_current_state(0)

    def waker(s: Shared) -> None:
        task = smp_cond_load_acquire(s.v, "sleeper", bool)
        WRITE_ONCE(s.v, "ready", 1)
        wake_up_process(task)

    result = explore(Shared, sleeper, waker, memory=memory)

    if broken:
        assert kind(result) == "lost-wakeup"
        assert "sleeps on sleeper.state" in str(result.violation)
    else:
        assert result.passed, result.timeline()


@MODELS
def test_spinning_is_waiting(memory: str) -> None:
    """A loop that only reads waits for a store; one that nobody ends is a deadlock, not an endless search."""

    def spin(v: Any) -> None:
        while not READ_ONCE(v, "x"):
            cpu_relax()

    def release(v: Any) -> None:
        WRITE_ONCE(v, "y", 1)
        WRITE_ONCE(v, "x", 1)

    result = explore(lambda: variables(x=0, y=0), spin, release, memory=memory)
    assert result.passed
    assert result.executions <= 3
    alone = explore(lambda: variables(x=0, y=0), spin, memory=memory)
    assert kind(alone) == "deadlock"
    assert "spins until something it read changes" in str(alone.violation)


@MODELS
def test_a_condition_that_held_once(memory: str) -> None:
    """A value that came and went: a task that waits for it may come too late under sc."""

    def wait(v: Any) -> None:
        smp_cond_load_acquire(v, "x", lambda x: x == 1)

    def pulse(v: Any) -> None:
        WRITE_ONCE(v, "x", 1)
        WRITE_ONCE(v, "x", 2)

    for threads in ((wait, pulse), (pulse, wait)):
        result = explore(lambda: variables(x=0), *threads, memory=memory)
        assert result.passed if memory == "lkmm" else kind(result) == "deadlock"


def test_sleeping_in_a_reader() -> None:
    """might_sleep() inside a read-side section, and synchronize_rcu() there."""

    def sleepy(_s: Any) -> None:
        rcu_read_lock()
        might_sleep()

    def stuck(_s: Any) -> None:
        rcu_read_lock()
        synchronize_rcu()

    assert kind(explore(boot, sleepy)) == "locking"
    assert kind(explore(boot, stuck)) == "locking"


def test_warnings_are_violations() -> None:
    """A WARN fails the exploration, unless it is allowed."""

    def warn(v: Any) -> None:
        WARN_ON_ONCE(READ_ONCE(v, "x") == 1, "x is one")

    def store(v: Any) -> None:
        WRITE_ONCE(v, "x", 1)

    result = explore(lambda: variables(x=0), warn, store)
    assert kind(result) == "warning"
    assert "x is one" in str(result.violation)
    assert explore(lambda: variables(x=0), warn, store, warnings=False).passed


@MODELS
def test_daemons_need_not_end(memory: str) -> None:
    """A kernel thread that waits for work forever is no deadlock, and its work is seen."""

    def setup() -> Any:
        v = variables(work=0, done=0)

        def daemon() -> None:
            done = 0
            while True:
                done += smp_cond_load_acquire(v, "work", lambda n, done=done: n > done) - done
                WRITE_ONCE(v, "done", done)

        kthread_run(daemon)
        return v

    def queue(v: Any) -> None:
        WRITE_ONCE(v, "work", 1)

    result = explore(setup, queue, outcome=lambda v: v.done, memory=memory)

    assert result.passed
    assert result.outcomes == {1}
