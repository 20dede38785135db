"""The room under the kernel's memory model: exhausted and fine, or missing a guard and caught."""

from collections.abc import Callable
from typing import Any

import pytest

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    Struct,
    atomic,
    boot,
    embedded,
    guards,
    kernel_struct,
)
from kmodel.explore import Verdict, explore
from kmodel.sync import (
    Completion,
    Mutex,
    PercpuRwSemaphore,
    Rcuwait,
    RwLock,
    RwSemaphore,
    Seqcount,
    TimerList,
    WaitQueueHead,
    WorkStruct,
    cancel_work_sync,
    complete,
    do_raw_write_seqcount_begin,
    do_raw_write_seqcount_end,
    down_read,
    down_write,
    downgrade_write,
    flush_work,
    mod_timer,
    mutex_lock,
    mutex_unlock,
    percpu_down_read_trylock,
    percpu_down_write,
    percpu_rwsem,
    percpu_up_read,
    percpu_up_write,
    raw_seqcount_try_begin,
    rcuwait_wait_event,
    rcuwait_wake_up,
    read_lock,
    read_seqcount_retry,
    read_unlock,
    refcount_dec_and_test,
    refcount_inc_not_zero_acquire,
    schedule_work,
    timer_delete_sync,
    up_read,
    up_write,
    wait_event,
    wait_for_completion,
    wake_up_all,
    wq_has_sleeper,
    write_lock,
    write_unlock,
)
from tests.sync.running import no_grace_periods

pytestmark = pytest.mark.explore


@kernel_struct
class Shared(Struct):
    """One of everything, and some plain data."""

    a: int = 0
    b: int = 0
    ref: int = atomic(default=1)
    seq: Seqcount = embedded(factory=Seqcount)
    wait: Rcuwait = embedded(factory=Rcuwait)
    wq: WaitQueueHead = embedded(factory=WaitQueueHead)
    x: Completion = embedded(factory=Completion)
    sem: RwSemaphore = embedded(factory=RwSemaphore)
    mutex: Mutex = embedded(factory=Mutex)
    rw: RwLock = embedded(factory=RwLock)
    percpu: PercpuRwSemaphore = embedded(factory=PercpuRwSemaphore)


def setup() -> Shared:
    boot()
    return Shared()


# -- rcuwait and wait queues: message passing through a sleep


def rcuwaiter(s: Shared) -> None:
    rcuwait_wait_event(s.wait, lambda: READ_ONCE(s, "a") == 1)


def rcuwaker(s: Shared) -> None:
    WRITE_ONCE(s, "a", 1)
    rcuwait_wake_up(s.wait)


def wq_waiter(s: Shared) -> None:
    wait_event(s.wq, lambda: READ_ONCE(s, "a") == 1)


def wq_waker(s: Shared) -> None:
    WRITE_ONCE(s, "a", 1)
    if wq_has_sleeper(s.wq):
        wake_up_all(s.wq)


def completer(s: Shared) -> None:
    s.a = 1
    complete(s.x)


def completion_waiter(s: Shared) -> None:
    wait_for_completion(s.x)
    assert s.a == 1


# -- seqcount


def seq_writer(s: Shared) -> None:
    do_raw_write_seqcount_begin(s.seq)
    WRITE_ONCE(s, "a", 1)
    WRITE_ONCE(s, "b", 1)
    do_raw_write_seqcount_end(s.seq)


def speculator(s: Shared) -> None:
    ok, start = raw_seqcount_try_begin(s.seq)
    if ok:
        a, b = READ_ONCE(s, "a"), READ_ONCE(s, "b")
        assert read_seqcount_retry(s.seq, start) or a == b


# -- percpu_rwsem: a reader leaves `a` as it was, so a writer inside must find it so


def percpu_reader(s: Shared) -> None:
    if percpu_down_read_trylock(s.percpu):
        WRITE_ONCE(s, "a", 1)
        WRITE_ONCE(s, "a", 0)
        percpu_up_read(s.percpu)


def percpu_writer(s: Shared) -> None:
    percpu_down_write(s.percpu)
    assert READ_ONCE(s, "a") == 0, "a reader is inside"
    percpu_up_write(s.percpu)


def percpu_trywriter(s: Shared) -> None:
    """The writer without rcuwait, whose own barrier A would do D's work too."""
    if percpu_rwsem._down_write_trylock(s.percpu) and percpu_rwsem._readers_active_check(s.percpu):
        assert READ_ONCE(s, "a") == 0, "a reader is inside"


# -- refcount: whoever drops the last reference sees what everybody did; nobody gets one after that


def ref_remover(s: Shared) -> None:
    if refcount_dec_and_test(s, "ref"):
        assert s.a == s.b  # plain: the release of every drop and the acquire of the last one make it safe
        s.a = -1


def ref_finder(s: Shared) -> None:
    if refcount_inc_not_zero_acquire(s, "ref"):
        s.b = s.a = s.a + 1
        ref_remover(s)


# -- locks: plain accesses, so that the race oracle checks their acquire and release


def rwsem_writer(s: Shared) -> None:
    down_write(s.sem)
    s.a += 1
    up_write(s.sem)


def rwsem_reader(s: Shared) -> None:
    down_read(s.sem)
    assert s.a == s.a
    up_read(s.sem)


def rwsem_downgrader(s: Shared) -> None:
    down_write(s.sem)
    s.a += 1
    mine = s.a
    downgrade_write(s.sem)
    assert s.a == mine
    up_read(s.sem)


def mutex_holder(s: Shared) -> None:
    mutex_lock(s.mutex)
    s.a += 1
    mutex_unlock(s.mutex)


def rw_writer(s: Shared) -> None:
    write_lock(s.rw)
    s.a += 1
    write_unlock(s.rw)


def rw_reader(s: Shared) -> None:
    read_lock(s.rw)
    assert s.a == s.a
    read_unlock(s.rw)


SCENARIOS: list[tuple[Callable[[Shared], None], ...]] = [
    (rcuwaiter, rcuwaker),
    (wq_waiter, wq_waker),
    (completion_waiter, completer),
    (seq_writer, speculator),
    (percpu_reader, percpu_writer),
    (percpu_reader, percpu_trywriter),
    (ref_remover, ref_finder),
    (rwsem_writer, rwsem_writer),
    (rwsem_writer, rwsem_reader),
    (rwsem_downgrader, rwsem_reader),
    (rwsem_downgrader, rwsem_writer),
    (mutex_holder, mutex_holder),
    (rw_writer, rw_reader),
    (rw_writer, rw_reader, rw_writer),
]

BROKEN = [
    ("no-rcuwait-waiter-mb", (rcuwaiter, rcuwaker), "lost-wakeup"),
    ("no-rcuwait-waker-mb", (rcuwaiter, rcuwaker), "lost-wakeup"),
    ("no-seqcount-begin-wmb", (seq_writer, speculator), "assertion"),
    ("no-seqcount-end-wmb", (seq_writer, speculator), "assertion"),
    ("no-seqcount-rmb", (seq_writer, speculator), "assertion"),
    ("no-read-seqcount-retry", (seq_writer, speculator), "assertion"),
    ("no-percpu-rwsem-mb-a", (percpu_reader, percpu_writer), "assertion"),
    ("no-percpu-rwsem-mb-b", (percpu_reader, percpu_writer), "assertion"),
    ("no-percpu-rwsem-mb-c", (percpu_reader, percpu_writer), "assertion"),
    ("no-percpu-rwsem-mb-d", (percpu_reader, percpu_trywriter), "assertion"),
    ("no-refcount-zero-test", (ref_remover, ref_finder), "data-race"),
]

NEVER_PASS_SILENTLY = 20_000


def names(threads: Any) -> str:
    return "+".join(func.__name__ for func in threads) if isinstance(threads, tuple) else str(threads)


@pytest.mark.parametrize("threads", SCENARIOS, ids=names)
def test_every_execution_is_fine(threads: tuple[Callable[[Shared], None], ...]) -> None:
    """All executions that the kernel's memory model allows are looked at, and none breaks anything."""
    with no_grace_periods():
        result = explore(setup, *threads, memory="lkmm", max_executions=NEVER_PASS_SILENTLY)

    assert (result.verdict, str(result.violation), result.reason) == (Verdict.PASS, "None", None)


@pytest.mark.parametrize(("guard", "threads", "kind"), BROKEN, ids=names)
def test_each_guard_has_its_counterexample(
    guard: str, threads: tuple[Callable[[Shared], None], ...], kind: str
) -> None:
    """Without the guard some execution goes wrong, in the way the guard prevents."""
    with no_grace_periods(), guards.without(guard):
        result = explore(setup, *threads, memory="lkmm", max_executions=NEVER_PASS_SILENTLY)

    assert result.violation is not None
    assert (result.verdict, result.violation.kind) == (Verdict.FAIL, kind)


# -- deferred calls: what a function changed with plain accesses is safe to use once it has been waited for


@kernel_struct
class Deferred(Struct):
    """A counter that a work item and a timer increment."""

    runs: int = 0
    work: WorkStruct = embedded(factory=lambda: WorkStruct(func=run))
    timer: TimerList = embedded(factory=lambda: TimerList(function=run))


def run(item: Any) -> None:
    item.container.runs += 1


def deferred() -> Deferred:
    boot()
    state = Deferred()
    state.work.container = state.timer.container = state
    return state


def queue(d: Deferred) -> None:
    schedule_work(d.work)


def queue_and_flush(d: Deferred) -> None:
    schedule_work(d.work)
    flush_work(d.work)


def queue_and_cancel(d: Deferred) -> None:
    schedule_work(d.work)
    cancel_work_sync(d.work)
    d.runs += 1


def arm_and_delete(d: Deferred) -> None:
    mod_timer(d.timer, 1.0)
    timer_delete_sync(d.timer)
    d.runs += 1


@pytest.mark.parametrize(
    "threads", [(queue_and_flush, queue), (queue_and_cancel,), (arm_and_delete,)], ids=names
)
def test_deferred_calls(threads: tuple[Callable[[Deferred], None], ...]) -> None:
    """No execution has two runs beside each other or one beside whoever waited for it to end."""
    result = explore(deferred, *threads, memory="lkmm", max_executions=NEVER_PASS_SILENTLY)

    assert (result.verdict, str(result.violation), result.reason) == (Verdict.PASS, "None", None)


def test_timer_function_beside_its_owner() -> None:
    """T3: without the wait in timer_delete_sync() the function runs beside the owner that deleted it."""
    with guards.without("no-timer-delete-sync-wait"):
        result = explore(deferred, arm_and_delete, memory="lkmm", max_executions=NEVER_PASS_SILENTLY)

    assert result.violation is not None
    assert (result.verdict, result.violation.kind) == (Verdict.FAIL, "data-race")


def test_item_beside_itself() -> None:
    """K2: without the collision test two workers run one item at once."""
    with guards.without("no-workqueue-non-reentrance"):
        result = explore(deferred, queue_and_flush, queue, memory="lkmm", max_executions=NEVER_PASS_SILENTLY)

    assert result.violation is not None
    assert (result.verdict, result.violation.kind) == (Verdict.FAIL, "data-race")
