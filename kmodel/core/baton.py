"""OS threads that run one at a time: each waits until somebody hands it the baton.

Models:      nothing in Linux
Guards:      `_idle` is a list used as a stack; append and pop are atomic
Invariants:  B1 a thread of the pool that runs no job waits for one, B2 nothing here blocks but `wait`
Read next:   explore/scheduler.py, its user

Threads are kept and used again, by later runs too (a new one costs 140 us). They wait on an eventfd: measured
for a round trip of the baton, 6 us of processor time on either build, where a raw lock takes 13, and 95 on
the
free-threaded one, because its locks spin before they sleep. The holder of the baton is what everybody waits
for,
so spinning never helps here.
"""

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any


def parking() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A pair of functions: wait for a token, give one."""
    eventfd = getattr(os, "eventfd", None)
    if eventfd is None:
        lock = gate()
        return lock.acquire, lock.release
    fd = eventfd(0)
    return partial(os.eventfd_read, fd), partial(os.eventfd_write, fd, 1)


class Baton:
    """One pooled OS thread. `wake` lets it run, `wait` (in the thread itself) parks it until then."""

    __slots__ = ("ident", "job", "runner", "thread", "wait", "wake")

    def __init__(self) -> None:
        self.wait, self.wake = parking()
        self.job: Callable[[Baton], None] | None = None
        self.runner: Any = None  # what the job is to run next; the borrower's
        self.ident = 0
        self.thread = threading.Thread(target=self._main, name="kmodel-baton", daemon=True)
        self.thread.start()

    def _main(self) -> None:
        self.ident = threading.get_ident()
        while True:
            self.wait()
            job, self.job = self.job, None
            if job is None:
                return
            job(self)
            del job  # an idle thread keeps no run's objects alive
            _idle.append(self)


_idle: list[Baton] = []


def borrow(job: Callable[[Baton], None]) -> Baton:
    """A pooled thread that will run job(itself) once it is woken; when that returns it is pooled again."""
    try:
        baton = _idle.pop()
    except IndexError:
        baton = Baton()
    baton.job = job
    return baton


def gate() -> threading.Lock:
    """A closed gate: wait with acquire(), open with release()."""
    lock = threading.Lock()
    lock.acquire()
    return lock
