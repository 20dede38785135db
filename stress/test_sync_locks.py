"""The locks of sync/ on real threads: exclusion, progress of every taker, kills in the middle of waits.

Run it for longer: KMODEL_STRESS_SECONDS=600 python -m pytest stress/test_sync_locks.py
"""

import random
import time
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from kmodel.core import (
    Struct,
    TaskStruct,
    boot,
    cpu_relax,
    embedded,
    engine,
    kernel_struct,
    kernel_warnings,
    kill,
    kthread_run,
)
from kmodel.sync import (
    Mutex,
    PercpuRwSemaphore,
    RwSemaphore,
    down_read,
    down_read_killable,
    down_write,
    down_write_killable,
    downgrade_write,
    mutex_lock,
    mutex_lock_killable,
    mutex_unlock,
    percpu_down_read,
    percpu_down_write,
    percpu_rwsem,
    percpu_up_read,
    percpu_up_write,
    rwsem_waiters,
    up_read,
    up_write,
)
from kmodel.sync import mutex as mutex_module

pytestmark = pytest.mark.stress


@kernel_struct
class Data(Struct):
    """Two plain numbers that are equal whenever no writer is inside, beside their locks."""

    a: int = 0
    b: int = 0
    sem: RwSemaphore = embedded(factory=RwSemaphore)
    mutex: Mutex = embedded(factory=Mutex)
    percpu: PercpuRwSemaphore = embedded(factory=PercpuRwSemaphore)


@attrs.define(eq=False)
class Tally:
    """One task's ledger."""

    writes: int = 0
    reads: int = 0
    killed: int = 0
    longest: float = 0.0
    wrong: list[str] = attrs.Factory(list)


def write(data: Data, tally: Tally) -> None:
    """Change both numbers, slowly."""
    data.a += 1
    cpu_relax()  # give readers a chance to see it half done
    data.b += 1
    tally.writes += 1


def read(data: Data, tally: Tally) -> None:
    """Compare them."""
    a, b = data.a, data.b
    if a != b:
        tally.wrong.append(f"{a} != {b}")
    tally.reads += 1


def rwsem_turn(data: Data, tally: Tally, dice: random.Random) -> None:
    """One use of the rw_semaphore."""
    choice = dice.random()
    if choice < 0.5:
        down_read(data.sem)
        read(data, tally)
        up_read(data.sem)
    elif choice < 0.6:
        if down_read_killable(data.sem):
            tally.killed += 1
            return
        read(data, tally)
        up_read(data.sem)
    elif choice < 0.7:
        if down_write_killable(data.sem):
            tally.killed += 1
            return
        write(data, tally)
        up_write(data.sem)
    else:
        down_write(data.sem)
        write(data, tally)
        if choice < 0.85:
            mine = data.a
            downgrade_write(data.sem)
            read(data, tally)
            if data.a != mine:
                tally.wrong.append("a writer came into the downgrade")
            up_read(data.sem)
        else:
            up_write(data.sem)


def mutex_turn(data: Data, tally: Tally, dice: random.Random) -> None:
    """One use of the mutex."""
    if dice.random() < 0.5:
        if mutex_lock_killable(data.mutex):
            tally.killed += 1
            return
    else:
        mutex_lock(data.mutex)
    write(data, tally)
    mutex_unlock(data.mutex)


def percpu_turn(data: Data, tally: Tally, dice: random.Random) -> None:
    """One use of the percpu_rw_semaphore."""
    if dice.random() < 0.95:
        percpu_down_read(data.percpu)
        read(data, tally)
        percpu_up_read(data.percpu)
    else:
        percpu_down_write(data.percpu)
        write(data, tally)
        percpu_up_write(data.percpu)


CHECKS: dict[str, tuple[Callable[..., None], Callable[[Data], None]]] = {
    "rwsem": (rwsem_turn, lambda data: rwsem_waiters.check_invariants(data.sem)),
    "mutex": (mutex_turn, lambda data: mutex_module.check_invariants(data.mutex)),
    "percpu": (percpu_turn, lambda data: percpu_rwsem.check_invariants(data.percpu)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_lock(name: str, seconds: float, seed: int) -> None:
    """Tasks read, write and are killed while they wait; no torn read, no lost write, nobody left waiting."""
    boot()
    turn, check = CHECKS[name]
    data, end = Data(), time.monotonic() + seconds
    tallies: list[Tally] = []

    def worker(tally: Tally, dice: random.Random) -> None:
        while (now := time.monotonic()) < end:
            turn(data, tally, dice)
            tally.longest = max(tally.longest, time.monotonic() - now)
            if tally.killed and dice.random() < 0.5:
                return  # a killed task goes away sooner or later

    def start(n: int) -> TaskStruct:
        tallies.append(Tally())
        return kthread_run(worker, tallies[-1], random.Random(f"{seed} {n}"), daemon=False)

    dice, tasks, dead, started = random.Random(seed), [start(n) for n in range(6)], [], 6
    while time.monotonic() < end:
        time.sleep(0.002)
        victim = dice.randrange(len(tasks))
        kill(tasks[victim])
        dead.append(tasks[victim])
        tasks[victim] = start(started)
        started += 1
        assert engine().join(dead.pop(0), 20) if len(dead) > 40 else True
    stuck = [task for task in (*dead, *tasks) if not engine().join(task, 20)]

    total: Any = [sum(getattr(t, f) for t in tallies) for f in ("writes", "reads", "killed")]
    print(f"{name}: writes, reads, killed {total}; longest turn {max(t.longest for t in tallies):.3f} s")
    assert stuck == []
    assert [wrong for tally in tallies for wrong in tally.wrong] == []
    assert (data.a, data.b) == (total[0], total[0])
    assert name == "percpu" or total[2] > 0, "no wait was ever ended by a signal: the hard path was not met"
    check(data)
    assert kernel_warnings() == ()
