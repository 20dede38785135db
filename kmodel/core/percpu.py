"""Per-CPU data: one instance of a struct for each CPU, found through current.

Models:      include/linux/percpu-defs.h, this_cpu_ptr / per_cpu_ptr / this_cpu_inc (7.2)
Guards:      this_cpu_* operations are atomic with respect to other tasks of the same CPU
Invariants:  C1 a task's CPU does not change (no migration: docs/limits.md), sums over all CPUs see every
             increment
Leaves out:  hotplug, migration between this_cpu operations
Read next:   rcu/srcu.py, its first user
"""

from collections.abc import Callable, Iterator
from typing import Any

from kmodel.core import access
from kmodel.core.engine import engine
from kmodel.core.struct import Pooled, kernel_struct, untraced
from kmodel.core.task import current


@kernel_struct
class PerCpu(Pooled):
    """A per-CPU variable; `cpus` holds one struct per CPU."""

    cpus: tuple[Any, ...] = untraced(default=())

    __hash__ = object.__hash__


def alloc_percpu(factory: Callable[[], Any]) -> PerCpu:
    """One struct from `factory` for each CPU."""
    return PerCpu(cpus=tuple(factory() for _ in range(engine().nr_cpu_ids)))


def this_cpu_ptr(pcpu: PerCpu) -> Any:
    """The calling CPU's struct."""
    cache = current().percpu
    try:
        return cache[pcpu]
    except KeyError:
        mine = cache[pcpu] = pcpu.cpus[current().cpu % len(pcpu.cpus)]
        return mine


def per_cpu_ptr(pcpu: PerCpu, cpu: int) -> Any:
    """CPU `cpu`'s struct."""
    return pcpu.cpus[cpu]


def for_each_possible_cpu(pcpu: PerCpu) -> Iterator[Any]:
    """Every CPU's struct, in CPU order."""
    return iter(pcpu.cpus)


def this_cpu_inc(pcpu: PerCpu, field: str) -> None:
    """Add one to the calling CPU's counter; no ordering."""
    access.rmw(this_cpu_ptr(pcpu), field, lambda old: old + 1, "relaxed")


def this_cpu_dec(pcpu: PerCpu, field: str) -> None:
    """Subtract one from the calling CPU's counter; no ordering."""
    access.rmw(this_cpu_ptr(pcpu), field, lambda old: old - 1, "relaxed")
