"""Sleepable RCU: a domain of its own, readers that may block, counted on two indexes.

Models:      include/linux/srcu.h, include/linux/srcutree.h, kernel/rcu/srcutree.c: the read side (7.2)
Guards:      a task's counters are written by that task only; `srcu_idx` by the holder of srcu_gp_mutex;
             `srcu_data` by `lock`
Invariants:  U1 per domain and index, locks minus unlocks over all tasks is the number of readers on it, U2 a
             domain has one flavour
Leaves out:  the size-dependent tree of nodes, NMI-safe readers; a CPU here is a task, see SrcuData
Read next:   rcu/srcu_gp.py, the grace period

A reader fetches the index and adds one to its own CPU's `srcu_locks` of that index, then smp_mb (B). At the
end smp_mb (C), then one more `srcu_unlocks` of the same index, wherever it runs by then: only sums matter.
Between the fetch and the increment any number of grace periods may pass (H70).

SRCU-fast drops the two barriers; its increments are RCU read-side sections in themselves, because the grace
period then has synchronize_rcu() in the place of its own barrier.

srcu_read_lock and _unlock are a pair within one task (lockdep knows who is inside, which finds a
synchronize_srcu by the reader itself). A section that another task ends uses srcu_down_read and srcu_up_read,
or __srcu_read_lock and __srcu_read_unlock, which is the same thing.
"""

from functools import partial
from typing import Final

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    LockingBug,
    Pooled,
    RcuSpec,
    Struct,
    TaskStruct,
    access,
    atomic,
    current,
    embedded,
    engine,
    guards,
    kernel_struct,
    smp_load_acquire,
    smp_mb,
    smp_store_release,
    untraced,
)
from kmodel.rcu.cblist import RcuCbList
from kmodel.rcu.rcu import rcu_read_lock, rcu_read_unlock
from kmodel.sync import Mutex

SRCU_READ_FLAVOR_NORMAL: Final = 1
SRCU_READ_FLAVOR_FAST: Final = 2

_MB_B = guards.register("srcu-mb-b", "U1: a section's accesses stay behind its increment of srcu_locks")
_MB_C = guards.register("srcu-mb-c", "U1: a section's accesses stay before its increment of srcu_unlocks")
_IMPLICIT = guards.register(
    "srcu-fast-implicit-rcu", "SRCU-fast: the increments are RCU readers in themselves"
)


@kernel_struct
class SrcuCtr(Struct):
    """struct srcu_ctr of one CPU and one index."""

    # write: the owning task, as this_cpu_inc; read: grace periods, READ_ONCE
    srcu_locks: int = 0
    srcu_unlocks: int = 0


@kernel_struct
class SrcuData(Struct):
    """struct srcu_data: what one CPU counts in one domain.

    Every task counts as a CPU of its own, so that an increment needs no atomic operation (this_cpu_inc does
    not either). The data of a task exists from its first section in the domain on; when the task is dead a
    grace period adds it to the domain's base.
    """

    task: TaskStruct | None = untraced()
    flavor: int = untraced(default=0)
    srcu_ctrs: tuple[SrcuCtr, SrcuCtr] = untraced(factory=lambda: (SrcuCtr(), SrcuCtr()))
    # lockdep's: sections that this task began with srcu_read_lock and has not ended
    nesting: int = untraced(default=0)


@kernel_struct
class SrcuStruct(Pooled):
    """struct srcu_struct. `fast` declares an SRCU-fast domain (DEFINE_SRCU_FAST); otherwise the first reader
    decides (U2).

    use_implementation: run this module even where the engine offers a specification, to explore one against
    the other.
    """

    name: str = untraced()
    fast: bool = untraced(default=False)
    use_implementation: bool = untraced(default=False)

    # write: srcu_gp_mutex, by srcu_flip(); read: READ_ONCE. In 7.2 a pointer to the counters, srcu_ctrp
    srcu_idx: int = 0
    # write: lock, with release; read: acquire. All tasks' counters, the base first
    srcu_data: tuple[SrcuData, ...] = ()
    lock: int = atomic(default=0)
    srcu_reader_flavor: int = untraced(default=0)

    # write: srcu_gp_mutex; read: anybody. Low two bits: which phase of a grace period
    srcu_gp_seq: int = 0
    srcu_gp_mutex: Mutex = embedded(factory=Mutex)
    srcu_cblist: RcuCbList = untraced(default=None)
    # the model's own count of scans that had to be repeated
    srcu_retries: int = untraced(default=0)

    def __attrs_post_init__(self) -> None:
        from kmodel.rcu.srcu_gp import srcu_grace_period

        self.srcu_data = (SrcuData(None),)
        self.srcu_reader_flavor = SRCU_READ_FLAVOR_FAST if self.fast else 0
        self.srcu_cblist = RcuCbList(f"srcu:{self.name}", partial(srcu_grace_period, self))


def init_srcu_struct(ssp: SrcuStruct) -> int:
    """Make `ssp` a fresh domain (a new SrcuStruct already is); 0."""
    ssp.srcu_idx = 0
    ssp.srcu_gp_seq = 0
    ssp.srcu_data = (SrcuData(None),)
    current().percpu.pop(ssp, None)
    return 0


def specification(ssp: SrcuStruct) -> RcuSpec | None:
    """The engine's RcuSpec if this domain is to use it, else None."""
    return None if ssp.use_implementation else engine().rcu


# ------------------------------------------------------------------------------------------ a task's counters


def srcu_data_of(ssp: SrcuStruct, task: TaskStruct, flavor: int) -> SrcuData:
    """this_cpu_ptr(ssp->sda); LockingBug if the domain's readers are of the other flavour (U2)."""
    data: SrcuData | None = task.percpu.get(ssp)
    if data is None:
        data = task.percpu[ssp] = _add_srcu_data(ssp, task, flavor)
    if data.flavor != flavor:
        raise LockingBug(f"{task!r} mixes SRCU and SRCU-fast readers in domain {ssp.name}")
    return data


def _add_srcu_data(ssp: SrcuStruct, task: TaskStruct, flavor: int) -> SrcuData:
    if ssp.srcu_reader_flavor not in (0, flavor):
        raise LockingBug(f"{task!r} mixes SRCU and SRCU-fast readers in domain {ssp.name}")
    data = SrcuData(task, flavor)
    if specification(ssp) is not None:
        return data
    engine().spin_lock(ssp, "lock")
    ssp.srcu_reader_flavor = flavor
    # RELEASE: pairs with the acquire in srcu_readers_sum(). A grace period that does not find these counters
    # has read the list before the first increment, just as if it had read a 0 in them.
    smp_store_release(ssp, "srcu_data", (*ssp.srcu_data, data))
    engine().spin_unlock(ssp, "lock")
    return data


def _inc(ctr: SrcuCtr, field: str) -> None:
    """this_cpu_inc: no other task writes here, so it need not be atomic. No ordering."""
    WRITE_ONCE(ctr, field, READ_ONCE(ctr, field) + 1)


# ----------------------------------------------------------------------------------- readers, without lockdep


def __srcu_read_lock(ssp: SrcuStruct, task: TaskStruct | None = None) -> int:
    """Begin a section that any task may end, with the index that is returned."""
    if task is None:
        task = current()
    if access._tracer is None:
        idx: int = ssp.srcu_idx
        srcu_data_of(ssp, task, SRCU_READ_FLAVOR_NORMAL).srcu_ctrs[idx].srcu_locks += 1
        return idx
    spec = specification(ssp)
    if spec is not None:
        return spec.read_lock(ssp)
    data = srcu_data_of(ssp, task, SRCU_READ_FLAVOR_NORMAL)
    idx = READ_ONCE(ssp, "srcu_idx")
    _inc(data.srcu_ctrs[idx], "srcu_locks")
    if _MB_B not in guards.removed:
        smp_mb()  # B: pairs with A, E and the updater's first barrier. The section does not leak out.
    return idx


def __srcu_read_unlock(ssp: SrcuStruct, idx: int, task: TaskStruct | None = None) -> None:
    """End the section that began with `idx`."""
    if task is None:
        task = current()
    if access._tracer is None:
        srcu_data_of(ssp, task, SRCU_READ_FLAVOR_NORMAL).srcu_ctrs[idx].srcu_unlocks += 1
        return
    spec = specification(ssp)
    if spec is not None:
        spec.read_unlock(ssp, idx)
        return
    data = srcu_data_of(ssp, task, SRCU_READ_FLAVOR_NORMAL)
    if _MB_C not in guards.removed:
        smp_mb()  # C: pairs with A and with D. The section does not leak out.
    _inc(data.srcu_ctrs[idx], "srcu_unlocks")


srcu_down_read = __srcu_read_lock
srcu_up_read = __srcu_read_unlock


# ------------------------------------------------------------------------------------------------ readers


def srcu_read_lock(ssp: SrcuStruct, task: TaskStruct | None = None) -> int:
    """Begin a section of this task, which may sleep in it; they nest. Hand the index to
    srcu_read_unlock().
    """
    if task is None:
        task = current()
    idx = __srcu_read_lock(ssp, task)
    srcu_data_of(ssp, task, SRCU_READ_FLAVOR_NORMAL).nesting += 1
    return idx


def srcu_read_unlock(ssp: SrcuStruct, idx: int, task: TaskStruct | None = None) -> None:
    """End a section of this task. LockingBug if it is in none: srcu_up_read() is for those that another task
    began.
    """
    if task is None:
        task = current()
    data = srcu_data_of(ssp, task, SRCU_READ_FLAVOR_NORMAL)
    if data.nesting <= 0:
        raise LockingBug(f"{task!r} calls srcu_read_unlock({ssp.name}) but is in no section of its own")
    data.nesting -= 1
    __srcu_read_unlock(ssp, idx, task)


def srcu_read_lock_held(ssp: SrcuStruct, task: TaskStruct | None = None) -> bool:
    """Whether current is in a section of its own."""
    data = (task if task is not None else current()).percpu.get(ssp)
    return data is not None and data.nesting > 0


# ------------------------------------------------------------------------------------------------ SRCU-fast


def __srcu_read_lock_fast(ssp: SrcuStruct, task: TaskStruct) -> SrcuCtr:
    """Begin an SRCU-fast section without telling lockdep; return the task's own counter of the index."""
    data = srcu_data_of(ssp, task, SRCU_READ_FLAVOR_FAST)
    if access._tracer is None:
        scp: SrcuCtr = data.srcu_ctrs[ssp.srcu_idx]
        scp.srcu_locks += 1
        return scp
    scp = data.srcu_ctrs[READ_ONCE(ssp, "srcu_idx")]
    implicit = _IMPLICIT not in guards.removed
    if implicit:
        rcu_read_lock(task)
    _inc(scp, "srcu_locks")
    if implicit:
        rcu_read_unlock(task)
    return scp


def __srcu_read_unlock_fast(scp: SrcuCtr, task: TaskStruct) -> None:
    """End an SRCU-fast section on a counter of the calling task's own."""
    if access._tracer is None:
        scp.srcu_unlocks += 1
        return
    implicit = _IMPLICIT not in guards.removed
    if implicit:
        rcu_read_lock(task)
    _inc(scp, "srcu_unlocks")
    if implicit:
        rcu_read_unlock(task)


def srcu_read_lock_fast(ssp: SrcuStruct, task: TaskStruct | None = None) -> int:
    """Begin an SRCU-fast section of this task: no barrier. Hand the index to srcu_read_unlock_fast().

    The kernel returns a per-CPU pointer, which the unlocking CPU applies to its own memory, as an index is
    here.
    """
    if task is None:
        task = current()
    data = srcu_data_of(ssp, task, SRCU_READ_FLAVOR_FAST)
    spec = None if access._tracer is None else specification(ssp)
    data.nesting += 1
    if spec is not None:
        return spec.read_lock(ssp)
    return 1 if __srcu_read_lock_fast(ssp, task) is data.srcu_ctrs[1] else 0


def srcu_read_unlock_fast(ssp: SrcuStruct, idx: int, task: TaskStruct | None = None) -> None:
    """End an SRCU-fast section of this task."""
    if task is None:
        task = current()
    data = srcu_data_of(ssp, task, SRCU_READ_FLAVOR_FAST)
    if data.nesting <= 0:
        raise LockingBug(f"{task!r} calls srcu_read_unlock_fast({ssp.name}) but is in no section of its own")
    data.nesting -= 1
    spec = None if access._tracer is None else specification(ssp)
    if spec is not None:
        spec.read_unlock(ssp, idx)
        return
    __srcu_read_unlock_fast(data.srcu_ctrs[idx], task)


# ------------------------------------------------------------------------------------------------ sums


def srcu_readers_sum(ssp: SrcuStruct, idx: int, field: str) -> int:
    """Sum of "srcu_locks" or "srcu_unlocks" of an index over all tasks, each read once, at
    different times.
    """
    total = 0
    for data in smp_load_acquire(ssp, "srcu_data"):
        total += READ_ONCE(data.srcu_ctrs[idx], field)
    return total


def srcu_readers_active(ssp: SrcuStruct) -> int:
    """How many sections are open; exact only when nothing moves."""
    return sum(
        srcu_readers_sum(ssp, idx, "srcu_locks") - srcu_readers_sum(ssp, idx, "srcu_unlocks")
        for idx in (0, 1)
    )
