"""Work items: queued once, run after every call, never beside themselves; flush and cancel; delayed work."""

import time
from typing import Any

import pytest

from kmodel.core import (
    Deadlock,
    LockingBug,
    Struct,
    atomic,
    atomic_inc,
    boot,
    cpu_relax,
    embedded,
    guards,
    kernel_struct,
    kfree,
    smp_load_acquire,
    untraced,
)
from kmodel.sync import (
    Completion,
    DelayedWork,
    WorkStruct,
    cancel_delayed_work_sync,
    cancel_work,
    cancel_work_sync,
    complete,
    flush_delayed_work,
    flush_scheduled_work,
    flush_work,
    schedule_delayed_work,
    schedule_work,
    wait_for_completion,
    work_pending,
    workqueue,
)
from tests.sync.running import failures, on_threads, under_seeds


@kernel_struct
class Job(Struct):
    """A counter that a work item increments without a lock: only non-reentrance keeps it right."""

    runs: int = 0
    requests: int = atomic(default=0)
    seen: int = 0
    work: WorkStruct = embedded(factory=lambda: WorkStruct(func=run_job))
    returned: list[bool] = untraced(factory=list)


def run_job(work: WorkStruct) -> None:
    job = work.container
    runs = job.runs
    job.seen = smp_load_acquire(job, "requests")
    job.runs = runs + 1


def setup() -> Job:
    boot()
    job = Job()
    job.work.container = job
    return job


def requester(job: Job) -> None:
    atomic_inc(job, "requests")
    job.returned.append(schedule_work(job.work))


def flusher(job: Job) -> None:
    atomic_inc(job, "requests")
    accepted = schedule_work(job.work)
    job.returned.append(accepted)
    flush_work(job.work)
    # A refused request may be flushed past: whoever marked the item pending may not have it on the list yet.
    assert job.seen >= 1 or not accepted


def test_queued_once() -> None:
    """While the item runs it can be queued again, once; a second call before that run is a no-op."""
    started, gate, job = Completion(), Completion(), setup()

    def held_up(work: WorkStruct) -> None:
        complete(started)
        wait_for_completion(gate)
        run_job(work)

    job.work.func = held_up
    assert schedule_work(job.work)
    wait_for_completion(started)
    assert not work_pending(job.work)
    assert [schedule_work(job.work), schedule_work(job.work), work_pending(job.work)] == [True, False, True]
    complete(gate)
    complete(gate)
    flush_work(job.work)
    workqueue.check_invariants()

    assert (job.runs, work_pending(job.work), flush_work(job.work)) == (2, False, False)


def test_every_request_is_covered() -> None:
    """Under 50 seeds some run sees each request, and a flush waits for the caller's own."""

    def patient(job: Job) -> None:
        flusher(job)
        while job.seen < 2:  # K3: the other one's request, refused or not, is seen by a run that follows it
            cpu_relax()

    states = under_seeds(setup, [patient, patient])

    assert {sum(job.returned) for job in states} == {1, 2}


def flush_all(job: Job) -> None:
    for _ in range(2):
        requester(job)
        cpu_relax()
    flush_work(job.work)


def counts(job: Job) -> None:
    assert job.runs == sum(job.returned)


def test_reentrance_is_what_the_pool_prevents() -> None:
    """K2: with the collision test removed some seed runs the item beside itself and loses an increment."""
    under_seeds(setup, [flush_all], counts)
    with guards.without("no-workqueue-non-reentrance"):
        found = failures(setup, [flush_all, flush_all], counts, seeds=range(60))

    assert found == {AssertionError}


def test_threads() -> None:
    """Four threads queue and flush one item; runs equal accepted requests."""
    job = setup()

    def thread(job: Job) -> None:
        for _ in range(50):
            requester(job)
            flush_work(job.work)

    on_threads(job, [thread] * 4)
    flush_scheduled_work()

    assert job.runs == sum(job.returned)
    workqueue.check_invariants()


def test_cancel_takes_it_off_and_waits() -> None:
    """Under 50 seeds, after cancel_work_sync() the item is neither queued nor running, and can be queued."""

    def canceller(job: Job) -> None:
        requester(job)
        cancelled = cancel_work_sync(job.work)
        runs = job.runs
        assert cancelled == (runs == 0)
        for _ in range(10):
            cpu_relax()
        assert job.runs == runs
        assert schedule_work(job.work)
        flush_work(job.work)
        assert job.runs == runs + 1

    under_seeds(setup, [canceller])


def test_cancel_beside_a_requester() -> None:
    """Under 50 seeds a cancel beside requests ends, and what was accepted later still runs."""

    def canceller(job: Job) -> None:
        cancel_work_sync(job.work)
        cancel_work(job.work)

    def final(job: Job) -> None:
        assert job.runs <= sum(job.returned)

    under_seeds(setup, [canceller, requester, requester], final)


def test_cancel_holds_off_an_item_that_queues_itself() -> None:
    """cancel_work_sync() ends an item that re-queues itself every time it runs."""

    def again(work: WorkStruct) -> None:
        run_job(work)
        schedule_work(work)

    def ever() -> Job:
        job = setup()
        job.work.func = again
        return job

    def canceller(job: Job) -> None:
        schedule_work(job.work)
        for _ in range(30):
            cpu_relax()
        cancel_work_sync(job.work)
        runs = job.runs
        for _ in range(10):
            cpu_relax()
        assert (job.runs, work_pending(job.work)) == (runs, False)

    under_seeds(ever, [canceller])


def test_an_item_may_free_itself() -> None:
    """K4: the function may free the struct that the item is part of; nobody touches it afterwards."""

    def suicide(work: WorkStruct) -> None:
        kfree(work)

    def thread(work: WorkStruct) -> None:
        schedule_work(work)
        flush_scheduled_work()

    def make() -> WorkStruct:
        boot()
        return WorkStruct(func=suicide)

    under_seeds(make, [thread], seeds=range(20))


def test_waiting_for_oneself_is_loud() -> None:
    """A function that flushes its own item is a LockingBug; it would wait for itself."""
    said: list[Any] = []

    def selfish(work: WorkStruct) -> None:
        with pytest.raises(LockingBug):
            flush_work(work)
        said.append("bug")

    boot()
    work = WorkStruct(func=selfish)
    schedule_work(work)
    flush_work(work)

    assert said == ["bug"]


def test_two_items_that_flush_each_other_deadlock() -> None:
    """What flush_work() from a work function can do; the cooperative engine says who waits."""

    def crossed() -> list[WorkStruct]:
        boot()
        works: list[WorkStruct] = []
        works.append(WorkStruct(func=lambda work: flush_work(works[1])))
        works.append(WorkStruct(func=lambda work: flush_work(works[0])))
        return works

    def thread(works: list[WorkStruct]) -> None:
        for work in works:
            schedule_work(work)
        flush_scheduled_work()

    assert failures(crossed, [thread], seeds=range(20)) == {Deadlock}


def run_dwork(work: WorkStruct) -> None:
    run_job(work)


def test_delayed_work() -> None:
    """Pending from the arming on; flush brings it forward, cancel stops the timer, and it runs in the end by
    itself.
    """
    job = setup()
    dwork = DelayedWork(func=run_dwork, container=job)

    assert [schedule_delayed_work(dwork, 60.0), schedule_delayed_work(dwork, 0.0)] == [True, False]
    assert (work_pending(dwork), flush_delayed_work(dwork), job.runs) == (True, True, 1)
    schedule_delayed_work(dwork, 60.0)
    assert (cancel_delayed_work_sync(dwork), work_pending(dwork), job.runs) == (True, False, 1)
    schedule_delayed_work(dwork, 0.005)
    deadline = time.monotonic() + 5
    while job.runs < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert job.runs == 2


def test_delayed_work_cancelled_at_any_moment() -> None:
    """Under 50 seeds cancel_delayed_work_sync() beside the timer leaves nothing behind."""

    @kernel_struct
    class Later(Struct):
        runs: int = 0
        requests: int = atomic(default=0)
        seen: int = 0
        dwork: DelayedWork = embedded(factory=lambda: DelayedWork(func=run_dwork))

    def make() -> Any:
        boot()
        later = Later()
        later.dwork.container = later
        return later

    def thread(later: Any) -> None:
        schedule_delayed_work(later.dwork, 1.0)
        for _ in range(8):
            cpu_relax()
        cancelled = cancel_delayed_work_sync(later.dwork)
        runs = later.runs
        assert cancelled == (runs == 0)
        for _ in range(8):
            cpu_relax()
        assert later.runs == runs

    under_seeds(make, [thread])
