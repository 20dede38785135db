"""The allocator against the simplest oracle: a set of live objects and what each was stamped with."""

from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kmodel.core import POISON, Pooled, atomic, boot, kernel_struct
from kmodel.rcu import rcu_barrier
from kmodel.slab import (
    kmem_cache_alloc,
    kmem_cache_create,
    kmem_cache_free,
    kmem_cache_shrink,
    kmem_cache_zalloc,
    leaks,
    live_objects,
    slab_options,
)


@kernel_struct
class Stamped(Pooled):
    """Stamped by its owner."""

    start: int = 0
    stamp: int = 0
    ref: int = atomic(default=0)


class SlabMachine(RuleBasedStateMachine):
    """Allocate, free, shrink and wait in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Any] = []
        self.stamps: dict[int, int] = {}
        self.last_freed: Any = None
        self.count = 0

    @initialize(
        safe=st.booleans(),
        per_slab=st.integers(1, 4),
        capacity=st.integers(0, 5),
        quarantine=st.integers(0, 4),
        min_partial=st.integers(0, 2),
        spare=st.integers(0, 2),
    )
    def create(
        self, safe: bool, per_slab: int, capacity: int, quarantine: int, min_partial: int, spare: int
    ) -> None:
        boot()
        self.safe, self.capacity = safe, capacity
        with slab_options(
            objects_per_slab=per_slab,
            sheaf_capacity=capacity,
            quarantine=quarantine,
            min_partial=min_partial,
            spare_slabs=spare,
        ):
            self.cache = kmem_cache_create(
                "stamped", Stamped, typesafe_by_rcu=safe, freeptr_fields=("start",)
            )

    @rule(zero=st.booleans())
    def alloc(self, zero: bool) -> None:
        obj = (kmem_cache_zalloc if zero else kmem_cache_alloc)(self.cache)
        assert all(obj is not other for other in self.live)
        if zero:
            assert (obj.start, obj.stamp, obj.ref) == (0, 0, 0)
        if self.safe and self.capacity and self.last_freed is not None:
            assert obj is self.last_freed, "A3: the object freed last comes first"
        self.last_freed = None
        self.count += 1
        obj.start = obj.stamp = self.count
        obj.ref = 1
        self.stamps[id(obj)] = self.count
        self.live.append(obj)

    @rule(pick=st.integers(0, 1 << 16))
    def free(self, pick: int) -> None:
        if not self.live:
            return
        obj = self.live.pop(pick % len(self.live))
        kmem_cache_free(self.cache, obj)
        stamp = self.stamps.pop(id(obj))
        if self.safe:
            assert obj.stamp is POISON or obj.stamp == stamp
        else:
            assert obj.stamp is POISON
        self.last_freed = obj

    @rule()
    def shrink(self) -> None:
        kmem_cache_shrink(self.cache)
        self.last_freed = None

    @rule()
    def grace_period(self) -> None:
        rcu_barrier()
        assert self.cache.statistics().waiting_for_grace_period == 0

    @invariant()
    def ledger(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariants()
        assert {id(obj) for obj in live_objects(self.cache)} == set(self.stamps)
        assert [obj.stamp for obj in self.live] == [self.stamps[id(obj)] for obj in self.live]
        assert len(leaks()) >= len(self.live)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            rcu_barrier()


SlabMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSlab = SlabMachine.TestCase
