"""Every lock of the room excludes what it must, on both engines, and is left free."""

from collections.abc import Callable
from typing import Any

import attrs
import pytest

from kmodel.core import Struct, boot, embedded, kernel_struct
from kmodel.sync import (
    Mutex,
    PercpuRwSemaphore,
    RwLock,
    RwSemaphore,
    SpinLock,
    down_read,
    down_write,
    mutex_lock,
    mutex_trylock,
    mutex_unlock,
    percpu_down_read,
    percpu_down_write,
    percpu_up_read,
    percpu_up_write,
    read_lock,
    read_unlock,
    rwsem_waiters,
    spin_lock,
    spin_trylock,
    spin_unlock,
    up_read,
    up_write,
    write_lock,
    write_unlock,
)
from kmodel.sync import mutex as mutex_module
from kmodel.sync import percpu_rwsem as percpu_module
from kmodel.sync import rwlock as rwlock_module
from tests.sync.running import failures, on_threads, trace_of, under_seeds


@attrs.frozen
class Kind:
    """A lock and its four functions; exclusive locks use the same two for readers."""

    field: str
    lock: Callable[[Any], Any]
    unlock: Callable[[Any], None]
    rlock: Callable[[Any], Any]
    runlock: Callable[[Any], None]
    check: Callable[[Any], None]


@kernel_struct
class Shared(Struct):
    """Plain counters beside one lock of each kind."""

    count: int = 0
    inside: int = 0
    spin: SpinLock = embedded(factory=SpinLock)
    mutex: Mutex = embedded(factory=Mutex)
    rw: RwLock = embedded(factory=RwLock)
    sem: RwSemaphore = embedded(factory=RwSemaphore)
    percpu: PercpuRwSemaphore = embedded(factory=PercpuRwSemaphore)


KINDS = [
    Kind("spin", spin_lock, spin_unlock, spin_lock, spin_unlock, lambda _lock: None),
    Kind("mutex", mutex_lock, mutex_unlock, mutex_lock, mutex_unlock, mutex_module.check_invariants),
    Kind("rw", write_lock, write_unlock, read_lock, read_unlock, rwlock_module.check_rwlock),
    Kind("sem", down_write, up_write, down_read, up_read, rwsem_waiters.check_invariants),
    Kind(
        "percpu",
        percpu_down_write,
        percpu_up_write,
        percpu_down_read,
        percpu_up_read,
        percpu_module.check_invariants,
    ),
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.field)


def setup() -> Shared:
    boot()
    return Shared()


def writer(kind: Kind, times: int) -> Callable[[Shared], None]:
    def write(shared: Shared) -> None:
        lock = getattr(shared, kind.field)
        for _ in range(times):
            kind.lock(lock)
            shared.inside += 1
            shared.count += 1
            shared.inside -= 1
            kind.unlock(lock)

    return write


def reader(kind: Kind, times: int) -> Callable[[Shared], None]:
    def read(shared: Shared) -> None:
        lock = getattr(shared, kind.field)
        for _ in range(times):
            kind.rlock(lock)
            assert shared.inside == 0
            assert shared.count == shared.count
            kind.runlock(lock)

    return read


@kinds
def test_cooperative(kind: Kind) -> None:
    """Under 50 seeds no increment is lost, no reader sees a writer inside, and the lock ends free."""
    threads = [writer(kind, 2), writer(kind, 1), reader(kind, 2)]

    states = under_seeds(setup, threads, lambda shared: kind.check(getattr(shared, kind.field)))

    assert {shared.count for shared in states} == {3}


@kinds
def test_real_threads(kind: Kind) -> None:
    """Four threads increment a plain counter under the lock while two read; the sum is exact."""
    shared = on_threads(setup(), [writer(kind, 150)] * 4 + [reader(kind, 150)] * 2)

    assert shared.count == 600
    kind.check(getattr(shared, kind.field))


@kinds
def test_equal_seed_equal_trace(kind: Kind) -> None:
    """A seed determines the whole run."""
    threads = [writer(kind, 2), writer(kind, 2), reader(kind, 2)]

    assert trace_of(7, setup, threads) == trace_of(7, setup, threads)


def test_without_a_lock_both_engines_would_notice() -> None:
    """The scenario itself can fail: without locks some seed loses an increment or shows a writer inside."""
    none = Kind("spin", lambda _lock: None, lambda _lock: None, lambda _lock: None, lambda _lock: None, print)

    def final(shared: Shared) -> None:
        assert shared.count == 2

    assert failures(setup, [writer(none, 1), writer(none, 1), reader(none, 1)], final) == {AssertionError}


def test_trylocks_take_a_free_lock_only() -> None:
    """spin_trylock and mutex_trylock succeed once and fail while the lock is held."""
    shared = Shared()

    assert [spin_trylock(shared.spin), spin_trylock(shared.spin)] == [True, False]
    spin_unlock(shared.spin)
    assert [mutex_trylock(shared.mutex), mutex_trylock(shared.mutex)] == [True, False]
    mutex_unlock(shared.mutex)
