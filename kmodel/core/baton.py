"""OS threads that run one at a time: each waits behind a raw lock until somebody hands it the baton.

Models:      nothing in Linux
Guards:      `_idle` is a list used as a stack; append and pop are atomic
Invariants:  B1 a thread of the pool that runs no job waits for one, B2 nothing here blocks but `wait`
Read next:   explore/engine.py, its user

A raw lock is the cheapest hand-over there is (10 us on the machine it was measured on; a Condition takes 19, a new thread 140),
so threads are kept and used again, by later runs too.
"""

import threading
from collections.abc import Callable
from typing import Any


class Baton:
    """One pooled OS thread. `wake` lets it run, `wait` (in the thread itself) parks it until then."""

    __slots__ = ("go", "ident", "job", "runner", "thread", "wait", "wake")

    def __init__(self) -> None:
        self.go = threading.Lock()
        self.go.acquire()
        self.wait = self.go.acquire
        self.wake = self.go.release
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
    """A pooled thread that will run job(itself) once it is woken, and goes back to the pool when that returns."""
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
