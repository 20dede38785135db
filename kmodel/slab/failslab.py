"""Fault injection: make allocations fail on purpose.

Models:      mm/failslab.c should_failslab; lib/fault-inject.c, /proc/self/fail-nth (7.2)
Guards:      `_attr` is replaced, never mutated; the counter is atomic
Invariants:  I1 with nobody injecting, no allocation fails
Leaves out:  stack filters, task filters, the interval attribute
Read next:   slab/kmem_cache.py
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs


@attrs.define(eq=False)
class FaultAttr:
    """Which allocations are to fail (struct fault_attr), and how many were asked and refused."""

    cache: str | None = None
    nth: int = 0
    probability: float = 0.0
    seed: int = 0
    failed: int = 0
    _calls: Any = attrs.field(factory=lambda: itertools.count(1), init=False)
    _random: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def strikes(self, name: str) -> bool:
        """Whether this allocation, from the cache of that name, fails."""
        if self.cache is not None and self.cache != name:
            return False
        if self.nth:
            hit = bool(next(self._calls) == self.nth)
        else:
            hit = self._random.random() < self.probability
        if hit:
            self.failed += 1
        return hit


attr: FaultAttr | None = None
"""What is injected now."""


def should_failslab(name: str) -> bool:
    """Whether the allocation from the cache of that name that is about to be made shall fail."""
    return attr is not None and attr.strikes(name)


@contextmanager
def _injecting(new: FaultAttr) -> Iterator[FaultAttr]:
    global attr
    before = attr
    attr = new
    try:
        yield new
    finally:
        attr = before


def fail_nth(n: int, *, cache: str | None = None) -> Any:
    """Context manager: the n-th allocation from now on (from `cache`, if named) returns None; the others
    succeed.
    """
    return _injecting(FaultAttr(cache=cache, nth=n))


def fail_randomly(probability: float, *, seed: int, cache: str | None = None) -> Any:
    """Context manager: each allocation (from `cache`, if named) fails with that probability, by seed."""
    return _injecting(FaultAttr(cache=cache, probability=probability, seed=seed))
