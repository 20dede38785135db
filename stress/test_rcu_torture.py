"""Grace periods of every flavour, and the lockless tree, on real threads, in the manner of rcutorture.

Run it for longer: KMODEL_STRESS_SECONDS=600 python -m pytest stress/test_rcu_torture.py

The oracle is the age of what a reader holds. A writer takes the published element away, and then, and after
every grace period, adds one to the age of all that it took away. A reader that still sees age 2 or more at
the end of its section was not waited for by a whole grace period.
"""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

from kmodel.core import (
    Struct,
    atomic,
    atomic_inc,
    boot,
    current,
    engine,
    guards,
    kernel_struct,
    kernel_warnings,
    kthread_run,
    rcu_assign_pointer,
    rcu_dereference,
    smp_cond_load_acquire,
    smp_store_release,
    variables,
)
from kmodel.rcu import (
    RbNode,
    RbRoot,
    SrcuStruct,
    call_rcu,
    call_rcu_tasks_trace,
    call_srcu,
    rb_erase,
    rb_find_add_rcu,
    rb_find_rcu,
    rcu_barrier,
    rcu_barrier_tasks_trace,
    rcu_read_lock,
    rcu_read_lock_trace,
    rcu_read_unlock,
    rcu_read_unlock_trace,
    srcu_barrier,
    srcu_gp,
    srcu_read_lock,
    srcu_read_lock_fast,
    srcu_read_unlock,
    srcu_read_unlock_fast,
    synchronize_rcu,
    synchronize_rcu_tasks_trace,
    synchronize_srcu,
    use_rcu_tasks_trace,
)
from kmodel.rcu.rbtree import check_invariants
from kmodel.sync import (
    Seqcount,
    raw_write_seqcount_begin,
    raw_write_seqcount_end,
    read_seqcount_begin,
    read_seqcount_retry,
)

OLD = 10


@kernel_struct
class Element(Struct):
    """What readers hold. age: 0 published, 1 taken away, 2 and more: one and more grace periods ago."""

    age: int = 0


@attrs.define
class Flavour:
    """One way to read and to wait."""

    lock: Callable[[], Any]
    unlock: Callable[[Any], None]
    synchronize: Callable[[], None]
    call: Callable[[Any, Callable[[Any], Any]], None]
    barrier: Callable[[], None]
    finish: Callable[[], None] = lambda: None


def flavour_of(name: str) -> Flavour:
    """The functions of one flavour."""
    if name == "rcu":
        return Flavour(rcu_read_lock, lambda _idx: rcu_read_unlock(), synchronize_rcu, call_rcu, rcu_barrier)
    if name.startswith("srcu"):
        ssp = SrcuStruct("torture")
        lock, unlock = (
            (srcu_read_lock_fast, srcu_read_unlock_fast)
            if name == "srcu fast"
            else (srcu_read_lock, srcu_read_unlock)
        )
        return Flavour(
            lambda: lock(ssp),
            lambda idx: unlock(ssp, idx),
            lambda: synchronize_srcu(ssp),
            lambda obj, func: call_srcu(ssp, obj, func),
            lambda: srcu_barrier(ssp),
            lambda: srcu_gp.check_invariants(ssp),
        )
    return Flavour(
        rcu_read_lock_trace,
        lambda _idx: rcu_read_unlock_trace(),
        synchronize_rcu_tasks_trace,
        call_rcu_tasks_trace,
        rcu_barrier_tasks_trace,
    )


@pytest.fixture(params=["rcu", "srcu", "srcu fast", "trace 7.2", "trace holdouts"])
def flavour(request: pytest.FixtureRequest) -> Iterator[Flavour]:
    """Every flavour in turn."""
    boot()
    before = use_rcu_tasks_trace("holdouts" if request.param == "trace holdouts" else "srcu_fast")
    yield flavour_of(request.param)
    use_rcu_tasks_trace(before)


@attrs.define
class Torture:
    """One run: readers, writers, and what they saw."""

    flavour: Flavour
    seconds: float
    seed: int
    shared: Any = attrs.field(factory=lambda: variables(pointer=Element(), stop=0))
    ages: list[list[int]] = attrs.field(factory=list)
    grace_periods: int = 0
    callbacks: list[int] = attrs.field(factory=lambda: [0, 0])

    def reader(self, number: int) -> None:
        rng = random.Random(self.seed + number)
        ages = [0] * (OLD + 1)
        flavour, shared = self.flavour, self.shared
        while not shared.stop:
            idx = flavour.lock()
            element = rcu_dereference(shared, "pointer")
            nested = rng.random() < 0.2
            inner = flavour.lock() if nested else None
            if rng.random() < 0.05:
                time.sleep(rng.random() * 0.002)
            if nested:
                flavour.unlock(inner)
            ages[min(element.age, OLD)] += 1
            flavour.unlock(idx)
        self.ages.append(ages)

    def writer(self) -> None:
        rng = random.Random(self.seed)
        taken: list[Element] = []
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            taken.append(self.shared.pointer)
            rcu_assign_pointer(self.shared, "pointer", Element())
            taken[-1].age = 1
            if rng.random() < 0.3:
                self.callbacks[0] += 1
                self.flavour.call(None, self.count)
            self.flavour.synchronize()
            self.grace_periods += 1
            for element in taken:
                element.age += 1
            taken = [element for element in taken if element.age < OLD]
        smp_store_release(self.shared, "stop", 1)

    def count(self, _none: None) -> None:
        self.callbacks[1] += 1

    def run(self, readers: int = 3) -> list[int]:
        """How many sections ended with an element of each age."""
        tasks = [kthread_run(self.reader, n, comm=f"reader/{n}", daemon=False) for n in range(readers)]
        tasks.append(kthread_run(self.writer, comm="writer", daemon=False))
        for task in tasks:
            assert engine().join(task, self.seconds + 30), f"{task!r} is stuck"
        self.flavour.barrier()
        return [sum(ages) for ages in zip(*self.ages, strict=True)]


def test_no_reader_outlives_a_grace_period(flavour: Flavour, seconds: float, seed: int) -> None:
    """Ages 0 and 1 only; the interesting path, a grace period that ended under a section's nose, was met."""
    torture = Torture(flavour, seconds / 2, seed)
    ages = torture.run()

    assert sum(ages[2:]) == 0, f"seed {seed}: sections by age {ages}"
    assert torture.grace_periods > 10
    assert ages[1] > 0, "no section ever met an element that had been taken away"
    assert torture.callbacks[0] == torture.callbacks[1] > 0
    flavour.finish()
    assert kernel_warnings() == ()


@pytest.mark.parametrize(
    ("name", "guard"), [("rcu", "rcu-wait"), ("srcu", "srcu-second-scan"), ("trace holdouts", "rcu-wait")]
)
def test_a_grace_period_that_does_not_wait_is_caught(
    name: str, guard: str, seconds: float, seed: int
) -> None:
    """The broken twin: the oracle sees old elements in readers' hands."""
    boot()
    before = use_rcu_tasks_trace("holdouts" if name == "trace holdouts" else "srcu_fast")
    try:
        with guards.without(guard):
            ages = Torture(flavour_of(name), min(seconds, 2) / 4, seed).run()
    finally:
        use_rcu_tasks_trace(before)

    assert sum(ages[2:]) > 0, f"seed {seed}: sections by age {ages}"


# ------------------------------------------------------------------------------------------------ the tree


@kernel_struct
class Key(RbNode):
    """A node of the tree."""

    key: int = 0


def cmp_key(key: int, node: Key) -> int:
    """rb_find's comparison."""
    return key - node.key


def cmp_nodes(a: Key, b: Key) -> int:
    """rb_find_add's comparison."""
    return a.key - b.key


def test_lockless_searches_find_what_is_there(seconds: float, seed: int) -> None:
    """Keys that never leave are found by every search that the seqcount lets stand, while
    others come and go.
    """
    boot()
    root, seqcount = RbRoot(), Seqcount()
    permanent = range(0, 200, 10)
    for key in permanent:
        rb_find_add_rcu(Key(key=key), root, cmp_nodes)
    seen = variables(searches=0, false_negatives=0, stop=0)
    ledger = Ledger()

    def reader(number: int) -> None:
        rng = random.Random(seed + number)
        searches = misses = 0
        while not seen.stop:
            key = rng.choice(permanent)
            rcu_read_lock(current())
            while True:
                began = read_seqcount_begin(seqcount)
                node = rb_find_rcu(key, root, cmp_key)
                if node is not None:
                    assert node.key == key
                    break
                misses += 1
                assert read_seqcount_retry(seqcount, began), f"seed {seed}: key {key} was missed for good"
            rcu_read_unlock(current())
            searches += 1
        ledger.add(searches, misses)

    def writer() -> None:
        rng = random.Random(seed)
        until = time.monotonic() + seconds / 2
        temporary: dict[int, Key] = {}
        while time.monotonic() < until:
            key = rng.choice([k for k in range(200) if k % 10])
            node = temporary.pop(key, None)
            raw_write_seqcount_begin(seqcount)
            if node is None:
                temporary[key] = node = Key(key=key)
                assert rb_find_add_rcu(node, root, cmp_nodes) is None
            else:
                rb_erase(node, root)
            raw_write_seqcount_end(seqcount)
        smp_store_release(seen, "stop", 1)

    writing = kthread_run(writer, comm="writer", daemon=False)
    for task in [writing, *(kthread_run(reader, n, comm=f"reader/{n}", daemon=False) for n in range(2))]:
        assert engine().join(task, seconds + 10), f"{task!r} is stuck"
    smp_cond_load_acquire(ledger, "readers", two)
    check_invariants(root, key_of)
    assert ledger.searches > 100
    print(f"{ledger.searches} searches, {ledger.misses} false negatives, all repeated")


def two(value: int) -> bool:
    """Both readers are done."""
    return value == 2


def key_of(node: Key) -> int:
    """The key, for check_invariants."""
    return node.key


@kernel_struct
class Ledger(Struct):
    """What the readers of the tree counted."""

    searches: int = 0
    misses: int = 0
    readers: int = atomic(default=0)

    def add(self, searches: int, misses: int) -> None:
        """One reader is done."""
        self.searches += searches
        self.misses += misses
        atomic_inc(self, "readers")
