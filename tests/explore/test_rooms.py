"""The model's own code under the explorer: locks of sync/, SRCU as code and as specification."""

from typing import Any

import pytest

from kmodel.core import READ_ONCE, WRITE_ONCE, boot, variables
from kmodel.explore import Verdict, explore
from kmodel.rcu import SrcuStruct, srcu_read_lock, srcu_read_unlock, synchronize_srcu
from kmodel.sync import (
    Mutex,
    RwSemaphore,
    Seqcount,
    SpinLock,
    down_read,
    down_write,
    mutex_lock,
    mutex_unlock,
    read_seqcount_begin,
    read_seqcount_retry,
    spin_lock,
    spin_unlock,
    up_read,
    up_write,
    write_seqcount_begin,
    write_seqcount_end,
)

MODELS = pytest.mark.parametrize("memory", ["sc", "tso", "lkmm"])


class State:
    """A lock and what it protects."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.v = variables(x=0, y=0, n=0)
        self.read: Any = None


def state(lock: Any) -> Any:
    def setup() -> State:
        boot()
        return State(lock())

    return setup


@MODELS
def test_mutex(memory: str) -> None:
    """Plain increments under a mutex: none is lost, none races."""

    def add(s: State) -> None:
        mutex_lock(s.lock)
        s.v.n += 1
        mutex_unlock(s.lock)

    result = explore(state(Mutex), add, add, outcome=lambda s: s.v.n, memory=memory)

    assert result.passed, result.timeline()
    assert result.outcomes == {2}


@MODELS
def test_rwsem(memory: str) -> None:
    """A reader beside a writer, and two writers."""

    def read(s: State) -> None:
        down_read(s.lock)
        assert s.v.x == s.v.y
        up_read(s.lock)

    def write(s: State) -> None:
        down_write(s.lock)
        s.v.x += 1
        s.v.y += 1
        up_write(s.lock)

    for threads in ((read, write), (write, write)):
        result = explore(state(RwSemaphore), *threads, memory=memory)
        assert result.passed, result.timeline()


def seqcount_writer(s: State) -> None:
    spin_lock(s.lock[1])
    write_seqcount_begin(s.lock[0])
    WRITE_ONCE(s.v, "x", 1)
    WRITE_ONCE(s.v, "y", 1)
    write_seqcount_end(s.lock[0])
    spin_unlock(s.lock[1])


@MODELS
def test_seqcount(memory: str) -> None:
    """A reader that retries never sees half a write; one that does not retry does."""

    def careful(s: State) -> None:
        while True:
            seq = read_seqcount_begin(s.lock[0])
            x, y = READ_ONCE(s.v, "x"), READ_ONCE(s.v, "y")
            if not read_seqcount_retry(s.lock[0], seq):
                break
        assert x == y

    def careless(s: State) -> None:
        read_seqcount_begin(s.lock[0])
        x, y = READ_ONCE(s.v, "x"), READ_ONCE(s.v, "y")
        assert x == y

    setup = state(lambda: (Seqcount(), SpinLock()))
    good = explore(setup, seqcount_writer, careful, memory=memory)
    assert good.passed, good.timeline()
    assert explore(setup, seqcount_writer, careless, memory=memory).verdict is Verdict.FAIL


@pytest.mark.parametrize("memory", ["sc", "lkmm"])
@pytest.mark.parametrize("rcu", ["specification", "implementation"])
def test_srcu(memory: str, rcu: str) -> None:
    """The SRCU implementation shows the outcomes of its specification: never the later store without the
    earlier.
    """

    def read(s: State) -> None:
        idx = srcu_read_lock(s.lock)
        s.read = (READ_ONCE(s.v, "x"), READ_ONCE(s.v, "y"))
        srcu_read_unlock(s.lock, idx)

    def write(s: State) -> None:
        WRITE_ONCE(s.v, "x", 1)
        synchronize_srcu(s.lock)
        WRITE_ONCE(s.v, "y", 1)

    result = explore(
        state(lambda: SrcuStruct("test")), read, write, outcome=lambda s: s.read, memory=memory, rcu=rcu
    )

    assert result.passed, result.timeline()
    assert result.outcomes == {(0, 0), (1, 0), (1, 1)}


def test_srcu_without_the_wait() -> None:
    """The same pair of stores without the grace period: the later without the earlier."""

    def read(s: State) -> None:
        s.read = (READ_ONCE(s.v, "x"), READ_ONCE(s.v, "y"))

    def write(s: State) -> None:
        WRITE_ONCE(s.v, "x", 1)
        WRITE_ONCE(s.v, "y", 1)

    result = explore(state(SpinLock), read, write, outcome=lambda s: s.read)

    assert (0, 1) in result.outcomes
