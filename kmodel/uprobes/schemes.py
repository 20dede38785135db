"""The ways to get from a breakpoint to its handlers that were argued over, put together from their parts.

Models:      kernel/events/uprobes.c at several ages: 6.9, 6.10, 6.12, 6.13 and later, and the series of July
             2024
Guards:      each scheme's own; `lockdep` and refcounts object to combinations that cannot work
Invariants:  all find the same uprobe when nothing changes meanwhile
Leaves out:  what is not about locking: every scheme runs the same handlers and the same emulation
Read next:   uprobes/lookup.py, the last of them

A scheme is a choice of five parts, and its name says which:

    treelock    uprobes/treelock.py     spinlock, rwlock, percpu_rw_semaphore; taken by a hit, or ("RCU tree")
                                        only by changes, and hits have the seqcount and RCU
    references  uprobes/references.py   refcount, epoch refcount, the tree's reference; or none
    protection  uprobes/protection.py   RCU tasks trace, its older scan ("holdouts"), SRCU
    mapping     uprobes/find_vma.py     mmap_lock, per-VMA lock; or speculation (uprobes/lookup.py)

uprobe_scheme() makes treelock, references and protection those of the scheme; handle_swbp() and lookup()
of the scheme are to be called inside. In the schemes with references the handlers ran under register_rwsem
for reading then; here they are readers in every scheme, so that consumers can be freed by one set of rules
(changed: docs/limits.md).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs

from kmodel.core import TaskStruct, current
from kmodel.rcu.tasks_trace import Implementation, use_rcu_tasks_trace
from kmodel.uprobes import (
    find_refcount,
    find_rwlock,
    protection,
    ref_count,
    ref_epoch,
    ref_tree,
    references,
    tree,
    treelock,
)
from kmodel.uprobes.arch import PtRegs, uprobe_get_swbp_addr
from kmodel.uprobes.find_vma import FindUprobe, find_active_uprobe, find_active_uprobe_vma_lock
from kmodel.uprobes.handler import handle_swbp, handle_uprobe
from kmodel.uprobes.lifetime import put_uprobe
from kmodel.uprobes.lookup import find_active_uprobe_rcu
from kmodel.uprobes.protection import SRCU, TASKS_TRACE, Protection
from kmodel.uprobes.tree import find_uprobe_rcu
from kmodel.uprobes.treelock import PERCPU_RWSEM, RWLOCK, SPINLOCK, Treelock
from kmodel.uprobes.uprobe import Uprobe
from kmodel.uprobes.utask import SIGTRAP, force_sig

type FindActive = Callable[[int, TaskStruct], tuple[Uprobe | None, int]]


@attrs.frozen
class Scheme:
    """One way: handle_swbp(regs) is a whole hit, lookup(bp_vaddr, task) only the way to the uprobe."""

    name: str
    handle_swbp: Callable[[PtRegs], None]
    lookup: Callable[[int, TaskStruct], Uprobe | None]
    treelock: Treelock = RWLOCK
    references: Any = ref_count
    protection: Protection = TASKS_TRACE
    tasks_trace: Implementation = "srcu_fast"

    @property
    def is_default(self) -> bool:
        """Whether it runs outside of uprobe_scheme() too: nothing but lookup and hit differ."""
        parts = (self.treelock, self.references, self.protection, self.tasks_trace)
        return parts == (RWLOCK, ref_count, TASKS_TRACE, "srcu_fast")


@contextmanager
def uprobe_scheme(scheme: Scheme) -> Iterator[Scheme]:
    """Run the block with this scheme's treelock, references and protection. The block may boot, but need not.

    Nobody may use a uprobe when it begins or ends, and no free may be under way (wait_for_frees()).
    Uprobes in the tree go on with their references counted in the new way.
    """
    before = (treelock.implementation, references.implementation, protection.implementation)
    trace = use_rcu_tasks_trace(scheme.tasks_trace)
    _change(scheme.treelock, scheme.references, scheme.protection)
    try:
        yield scheme
    finally:
        _change(*before)
        use_rcu_tasks_trace(trace)


def _change(new_lock: Treelock, new_references: Any, new_protection: Protection) -> None:
    counts = {uprobe: references.implementation.users(uprobe) for uprobe in tree.uprobes()}
    if treelock.implementation is not new_lock:
        treelock.implementation = new_lock
        tree.uprobes_treelock = tree.uprobes_seqcount.lock = new_lock.make()
    references.implementation = new_references
    protection.implementation = new_protection
    for uprobe, users in counts.items():
        new_references.init(uprobe, users)


# -------------------------------------------------------------------------- a hit


def no_uprobe(regs: PtRegs, bp_vaddr: int, is_swbp: int, task: TaskStruct) -> None:
    """What handle_swbp does when there is no uprobe."""
    if is_swbp > 0:
        force_sig(SIGTRAP, task)
    else:
        regs.ip = bp_vaddr


def handle_swbp_ref(find_active: FindActive, regs: PtRegs) -> None:
    """handle_swbp with a reference from the lookup to the end."""
    task = current()
    bp_vaddr = uprobe_get_swbp_addr(regs)
    uprobe, is_swbp = find_active(bp_vaddr, task)
    if uprobe is None:
        no_uprobe(regs, bp_vaddr, is_swbp, task)
        return
    token = protection.implementation.read_lock(task)
    handle_uprobe(uprobe, regs, bp_vaddr, task)
    protection.implementation.read_unlock(task, token)
    put_uprobe(uprobe)


def handle_swbp_reader(find_active: FindActive, regs: PtRegs) -> None:
    """handle_swbp as a reader from the lookup to the end, without a reference."""
    task = current()
    bp_vaddr = uprobe_get_swbp_addr(regs)
    token = protection.implementation.read_lock(task)
    uprobe, is_swbp = find_active(bp_vaddr, task)
    if uprobe is None:
        no_uprobe(regs, bp_vaddr, is_swbp, task)
    else:
        handle_uprobe(uprobe, regs, bp_vaddr, task)
    protection.implementation.read_unlock(task, token)


# -------------------------------------------------------------------------- only the lookup


def lookup_ref(find_active: FindActive, bp_vaddr: int, task: TaskStruct) -> Uprobe | None:
    """Look up and give the reference back at once."""
    uprobe, _is_swbp = find_active(bp_vaddr, task)
    if uprobe is not None:
        put_uprobe(uprobe)
    return uprobe


def lookup_reader(find_active: FindActive, bp_vaddr: int, task: TaskStruct) -> Uprobe | None:
    """Look up as a reader."""
    token = protection.implementation.read_lock(task)
    uprobe, _is_swbp = find_active(bp_vaddr, task)
    protection.implementation.read_unlock(task, token)
    return uprobe


# -------------------------------------------------------------------------- putting together


def _mmap_lock(find_uprobe: FindUprobe) -> FindActive:
    return partial(find_active_uprobe, find_uprobe=find_uprobe)


def _vma_lock(find_uprobe: FindUprobe) -> FindActive:
    return partial(find_active_uprobe_vma_lock, find_uprobe=find_uprobe)


def _with_reference(name: str, find_active: FindActive, **parts: Any) -> Scheme:
    return Scheme(name, partial(handle_swbp_ref, find_active), partial(lookup_ref, find_active), **parts)


def _reader(name: str, find_active: FindActive, **parts: Any) -> Scheme:
    return Scheme(
        name, partial(handle_swbp_reader, find_active), partial(lookup_reader, find_active), **parts
    )


def _all() -> Iterator[Scheme]:
    locked, rcu = _mmap_lock(find_rwlock.find_uprobe), _mmap_lock(find_refcount.find_uprobe)
    plain = _mmap_lock(find_uprobe_rcu)
    yield _with_reference("rwlock tree + refcount + mmap_lock", locked)
    yield _with_reference("RCU tree + refcount + mmap_lock", rcu)
    yield _reader("RCU tree + mmap_lock", plain)
    yield Scheme("full speculation", handle_swbp, partial(lookup_reader, find_active_uprobe_rcu))

    yield _with_reference("spinlock tree + refcount + mmap_lock", locked, treelock=SPINLOCK)
    yield _with_reference("percpu_rwsem tree + refcount + mmap_lock", locked, treelock=PERCPU_RWSEM)
    yield _with_reference("rwlock tree + epoch + mmap_lock", locked, references=ref_epoch)
    yield _with_reference(
        "percpu_rwsem tree + epoch + mmap_lock", locked, treelock=PERCPU_RWSEM, references=ref_epoch
    )
    yield _with_reference(
        "percpu_rwsem tree + epoch + VMA lock",
        _vma_lock(find_rwlock.find_uprobe),
        treelock=PERCPU_RWSEM,
        references=ref_epoch,
    )
    yield _with_reference("RCU tree + tree's reference + mmap_lock", rcu, references=ref_tree)
    yield _with_reference(
        "RCU tree + tree's reference + SRCU + mmap_lock", rcu, references=ref_tree, protection=SRCU
    )
    yield _reader("RCU tree + SRCU + mmap_lock", plain, protection=SRCU)
    yield _reader("RCU tree + holdouts + mmap_lock", plain, tasks_trace="holdouts")
    yield _reader("RCU tree + VMA lock", _vma_lock(find_uprobe_rcu))
    yield _reader("full speculation + SRCU", find_active_uprobe_rcu, protection=SRCU)
    yield Scheme(
        "full speculation + holdouts",
        handle_swbp,
        partial(lookup_reader, find_active_uprobe_rcu),
        tasks_trace="holdouts",
    )


ALL_SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _all()}
"""Every scheme by name, in the order of the threads; those that are not `is_default` need uprobe_scheme()."""

SCHEMES: dict[str, Scheme] = {name: scheme for name, scheme in ALL_SCHEMES.items() if scheme.is_default}
"""Those that differ in nothing but how a hit gets to its uprobe, and need no block."""
