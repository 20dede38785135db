"""The engine of real threads: tasks are OS threads, memory is Python's, nothing is watched.

Models:      a machine
Guards:      `_lock` for the list of tasks and the timer heap
Invariants:  H1 what a task raises reaches whoever joins it, H2 no worker outlives the process's wish to end
             (all are daemons)
Leaves out:  any control over interleaving; a seed fixes what tasks decide, not how the system schedules them
Read next:   core/coop.py, the same seam with the scheduling under control
"""

import heapq
import itertools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from kmodel.core.engine import Engine
from kmodel.core.report import LockingBug
from kmodel.core.task import (
    NR_CPUS,
    TASK_RUNNING,
    TaskStruct,
    bind_thread,
    bound_tasks,
    current,
    next_pid,
    unbind_thread,
)

_WORKERS = 4
_MAX_WORKERS = 64


class ThreadsEngine(Engine):
    """Real OS threads. One instance serves the whole process."""

    name = "threads"
    nr_cpu_ids = NR_CPUS

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: dict[int, tuple[threading.Thread, list[BaseException]]] = {}
        self._work: queue.SimpleQueue[tuple[Callable[[], None], str]] = queue.SimpleQueue()
        self._heap: list[tuple[float, int, Callable[[], None], str]] = []
        self._order = itertools.count()
        self._timer_wake = threading.Event()
        self._workers_started = threading.Event()
        self._workers = self._idle_workers = _WORKERS
        self.worker_errors: list[BaseException] = []

    # -- tasks

    def spawn(self, func: Callable[..., Any], args: tuple[Any, ...], comm: str, daemon: bool) -> TaskStruct:
        ready = threading.Event()
        made: list[TaskStruct] = []
        errors: list[BaseException] = []

        def body() -> None:
            pid = next_pid()
            task = TaskStruct(
                pid=pid, comm=comm, cpu=pid % self.nr_cpu_ids, is_kthread=daemon
            )  # K2: created here
            bind_thread(task)
            made.append(task)
            ready.set()
            try:
                func(*args)
            except SystemExit:
                pass
            except BaseException as error:  # noqa: BLE001  # raised again by join()
                errors.append(error)
                if daemon:
                    self.worker_errors.append(error)
            finally:
                unbind_thread()

        thread = threading.Thread(target=body, name=comm, daemon=True)
        thread.start()
        ready.wait()
        task = made[0]
        with self._lock:
            self._threads[task.pid] = (thread, errors)
        return task

    def join(self, task: TaskStruct, timeout: float | None = None) -> bool:
        thread, errors = self._threads[task.pid]
        thread.join(timeout)
        if thread.is_alive():
            return False
        with self._lock:
            self._threads.pop(task.pid, None)
        if errors:
            raise errors[0]
        return True

    def tasks(self) -> list[TaskStruct]:
        return bound_tasks()

    # -- sleeping

    def schedule(self, timeout: float | None = None) -> None:
        task = current()
        if task.park is None:
            park = threading.Lock()
            park.acquire()
            task.park = park
        deadline = None if timeout is None else time.monotonic() + timeout
        while task.state != TASK_RUNNING:
            if deadline is None:
                # A finite wait: kick() may have run before `park` existed, and Ctrl-C must get through.
                task.park.acquire(timeout=0.05)
            else:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                task.park.acquire(timeout=min(left, 0.05))

    def kick(self, task: TaskStruct) -> None:
        park = task.park
        if park is not None and park.locked():
            try:
                park.release()
            except RuntimeError:  # another waker was faster: one token is enough
                return

    # -- spinning locks: blocking ones here, because a preempted holder would make spinners burn its processor

    def spin_lock(self, obj: Any, field: str) -> None:
        obj._k_lock.acquire()
        setattr(obj, field, 1)

    def spin_trylock(self, obj: Any, field: str) -> bool:
        if not obj._k_lock.acquire(blocking=False):
            return False
        setattr(obj, field, 1)
        return True

    def spin_unlock(self, obj: Any, field: str) -> None:
        if not getattr(obj, field):
            raise LockingBug(f"{obj!r} is not locked")
        setattr(obj, field, 0)
        obj._k_lock.release()

    # -- workers and timers

    def run_later(self, func: Callable[[], None], delay: float, comm: str) -> None:
        self._start_workers()
        if delay <= 0:
            self._work.put((func, comm))
            return
        with self._lock:
            heapq.heappush(self._heap, (time.monotonic() + delay, next(self._order), func, comm))
        self._timer_wake.set()

    def _start_workers(self) -> None:
        if self._workers_started.is_set():
            return
        with self._lock:
            if self._workers_started.is_set():
                return
            self._workers_started.set()
        for n in range(_WORKERS):
            self.spawn(self._worker, (), f"kworker/{n}", True)
        self.spawn(self._timekeeper, (), "ktimers/0", True)

    def _worker(self) -> None:
        while True:
            func, _comm = self._work.get()
            # As workqueues do it: while workers sleep there is one more to run what would wake them.
            with self._lock:
                self._idle_workers -= 1
                one_more = self._idle_workers == 0 and self._workers < _MAX_WORKERS
                if one_more:
                    self._workers += 1
                    self._idle_workers += 1
            if one_more:
                self.spawn(self._worker, (), f"kworker/{self._workers - 1}", True)
            try:
                func()
            except BaseException as error:  # noqa: BLE001  # reported by whoever ends the run, and loudly now
                self.worker_errors.append(error)
                sys.excepthook(type(error), error, error.__traceback__)
            with self._lock:
                self._idle_workers += 1

    def _timekeeper(self) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                due = []
                while self._heap and self._heap[0][0] <= now:
                    due.append(heapq.heappop(self._heap))
                wait = self._heap[0][0] - now if self._heap else 3600.0
                self._timer_wake.clear()
            for _when, _n, func, comm in due:
                self._work.put((func, comm))
            if not due:
                self._timer_wake.wait(wait)

    def now(self) -> float:
        return time.monotonic()

    def default_task_count(self) -> int:
        """How many tasks a stress run uses if nobody says: one per processor, at least four, so that they
        interleave."""
        return max(4, os.cpu_count() or 1)
