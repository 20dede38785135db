"""percpu_rw_semaphore on rcu/'s grace periods: the pair that sync/ leaves to be joined here."""

from kmodel import rcu
from kmodel.core import READ_ONCE, Struct, boot, embedded, kernel_struct
from kmodel.sync import (
    PercpuRwSemaphore,
    percpu_down_read,
    percpu_down_write,
    percpu_rwsem,
    percpu_up_read,
    percpu_up_write,
    rcu_sync,
)
from kmodel.sync.rcu_sync import GP_IDLE
from tests.sync.running import on_threads, under_seeds


@kernel_struct
class Shared(Struct):
    """What readers and writers look after."""

    sem: PercpuRwSemaphore = embedded(factory=PercpuRwSemaphore)
    writing: int = 0
    count: int = 0


def setup() -> Shared:
    boot()
    return Shared()


def reader(state: Shared) -> None:
    for _ in range(2):
        percpu_down_read(state.sem)
        assert READ_ONCE(state, "writing") == 0, "a writer is inside"
        percpu_up_read(state.sem)


def writer(state: Shared) -> None:
    percpu_down_write(state.sem)
    state.writing += 1
    state.count += 1
    state.writing -= 1
    percpu_up_write(state.sem)


def test_importing_rcu_joins_them() -> None:
    """sync/ uses rcu/'s grace periods and read lock once rcu/ is imported."""
    assert (rcu_sync.read_lock, rcu_sync.read_unlock) == (rcu.rcu_read_lock, rcu.rcu_read_unlock)


def test_exclusion() -> None:
    """Under 20 seeds no reader meets a writer, with real grace periods between the fast and the slow way."""
    states = under_seeds(setup, [reader, reader, writer, writer], seeds=range(20))

    assert {state.count for state in states} == {2}


def test_readers_get_fast_again() -> None:
    """Real threads read and write; a grace period after the last writer, readers are fast."""
    state = on_threads(setup(), [reader, writer, reader, writer])
    rcu.rcu_barrier()
    rcu.rcu_barrier()  # a replay asks for a second one

    assert (state.count, state.sem.rss.gp_state) == (2, GP_IDLE)
    percpu_rwsem.check_invariants(state.sem)
