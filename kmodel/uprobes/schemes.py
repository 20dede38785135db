"""The ways to get from a breakpoint to its handlers that were argued over, each behind the same two
functions.

Models:      kernel/events/uprobes.c at several ages: 6.10, the series of July 2024, 6.12, 6.13 and later
Guards:      each scheme's own, named in its text
Invariants:  all find the same uprobe when nothing changes meanwhile
Leaves out:  what is not about locking: every scheme runs the same handlers and the same emulation
Read next:   uprobes/lookup.py, the last of them

    name                                 address to file offset   offset to uprobe    uprobe stays because of
    rwlock tree + refcount + mmap_lock   mmap_lock for reading    treelock, reading   a reference
    RCU tree + refcount + mmap_lock      mmap_lock for reading    seqcount and RCU    a reference
    RCU tree + mmap_lock                 mmap_lock for reading    seqcount and RCU    RCU tasks trace
    full speculation                     mm_lock_seq and RCU      seqcount and RCU    RCU tasks trace

In the schemes with references the handlers ran under register_rwsem for reading then; here they are RCU tasks
trace readers in every scheme, so that consumers can be freed by one set of rules (changed: docs/limits.md).
"""

import errno
from collections.abc import Callable
from typing import Any

import attrs

from kmodel.core import TaskStruct, current
from kmodel.mm import mmap_read_lock, mmap_read_unlock, vma_lookup
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.uprobes import find_refcount, find_rwlock
from kmodel.uprobes.arch import PtRegs, uprobe_get_swbp_addr
from kmodel.uprobes.handler import handle_swbp, handle_uprobe
from kmodel.uprobes.lifetime import put_uprobe
from kmodel.uprobes.lookup import find_active_uprobe_rcu
from kmodel.uprobes.pages import is_trap_at_addr, vaddr_to_offset
from kmodel.uprobes.tree import find_uprobe_rcu
from kmodel.uprobes.uprobe import Uprobe
from kmodel.uprobes.utask import SIGTRAP, force_sig

type FindUprobe = Callable[[Any, int], Uprobe | None]


def find_active_uprobe(bp_vaddr: int, task: TaskStruct, find_uprobe: FindUprobe) -> tuple[Uprobe | None, int]:
    """(uprobe, is_swbp) under mmap_lock for reading: find_active_uprobe_rcu without its fast path."""
    mm = task.mm
    uprobe = None
    is_swbp = 0
    mmap_read_lock(mm)
    vma = vma_lookup(mm, bp_vaddr, task)
    if vma is None:
        is_swbp = -errno.EFAULT
    else:
        if vma.vm_file is not None:
            uprobe = find_uprobe(vma.vm_file.f_inode, vaddr_to_offset(vma, bp_vaddr))
        if uprobe is None:
            is_swbp = is_trap_at_addr(mm, bp_vaddr)
    mmap_read_unlock(mm)
    return uprobe, is_swbp


def no_uprobe(regs: PtRegs, bp_vaddr: int, is_swbp: int, task: TaskStruct) -> None:
    """What handle_swbp does when there is no uprobe."""
    if is_swbp > 0:
        force_sig(SIGTRAP, task)
    else:
        regs.ip = bp_vaddr


def handle_swbp_ref(regs: PtRegs, find_uprobe: FindUprobe) -> None:
    """handle_swbp with a reference from the lookup to the end."""
    task = current()
    bp_vaddr = uprobe_get_swbp_addr(regs)
    uprobe, is_swbp = find_active_uprobe(bp_vaddr, task, find_uprobe)
    if uprobe is None:
        no_uprobe(regs, bp_vaddr, is_swbp, task)
        return
    rcu_read_lock_trace(task)
    handle_uprobe(uprobe, regs, bp_vaddr, task)
    rcu_read_unlock_trace(task)
    put_uprobe(uprobe)


def handle_swbp_rwlock(regs: PtRegs) -> None:
    """The scheme "rwlock tree + refcount + mmap_lock"."""
    handle_swbp_ref(regs, find_rwlock.find_uprobe)


def handle_swbp_refcount(regs: PtRegs) -> None:
    """The scheme "RCU tree + refcount + mmap_lock"."""
    handle_swbp_ref(regs, find_refcount.find_uprobe)


def handle_swbp_mmap_lock(regs: PtRegs) -> None:
    """The scheme "RCU tree + mmap_lock"."""
    task = current()
    bp_vaddr = uprobe_get_swbp_addr(regs)
    rcu_read_lock_trace(task)
    uprobe, is_swbp = find_active_uprobe(bp_vaddr, task, find_uprobe_rcu)
    if uprobe is None:
        no_uprobe(regs, bp_vaddr, is_swbp, task)
    else:
        handle_uprobe(uprobe, regs, bp_vaddr, task)
    rcu_read_unlock_trace(task)


# -------------------------------------------------------------------------- only the lookup


def lookup_rwlock(bp_vaddr: int, task: TaskStruct) -> Uprobe | None:
    """Look up and give the reference back at once."""
    uprobe, _is_swbp = find_active_uprobe(bp_vaddr, task, find_rwlock.find_uprobe)
    if uprobe is not None:
        put_uprobe(uprobe)
    return uprobe


def lookup_refcount(bp_vaddr: int, task: TaskStruct) -> Uprobe | None:
    """Look up and give the reference back at once."""
    uprobe, _is_swbp = find_active_uprobe(bp_vaddr, task, find_refcount.find_uprobe)
    if uprobe is not None:
        put_uprobe(uprobe)
    return uprobe


def lookup_mmap_lock(bp_vaddr: int, task: TaskStruct) -> Uprobe | None:
    """Look up as a reader of RCU tasks trace."""
    rcu_read_lock_trace(task)
    uprobe, _is_swbp = find_active_uprobe(bp_vaddr, task, find_uprobe_rcu)
    rcu_read_unlock_trace(task)
    return uprobe


def lookup_speculation(bp_vaddr: int, task: TaskStruct) -> Uprobe | None:
    """Look up as a reader of RCU tasks trace."""
    rcu_read_lock_trace(task)
    uprobe, _is_swbp = find_active_uprobe_rcu(bp_vaddr, task)
    rcu_read_unlock_trace(task)
    return uprobe


@attrs.frozen
class Scheme:
    """One way: handle_swbp(regs) is a whole hit, lookup(bp_vaddr, task) only the way to the uprobe."""

    name: str
    handle_swbp: Callable[[PtRegs], None]
    lookup: Callable[[int, TaskStruct], Uprobe | None]


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("rwlock tree + refcount + mmap_lock", handle_swbp_rwlock, lookup_rwlock),
        Scheme("RCU tree + refcount + mmap_lock", handle_swbp_refcount, lookup_refcount),
        Scheme("RCU tree + mmap_lock", handle_swbp_mmap_lock, lookup_mmap_lock),
        Scheme("full speculation", handle_swbp, lookup_speculation),
    )
}
