"""Registering a consumer at a place of a file, in every address space that maps it; and taking it back.

Models:      kernel/events/uprobes.c, uprobe_register, uprobe_unregister_nosync / _sync, uprobe_apply,
             register_for_each_vma (7.2)
Guards:      register_rwsem for writing around each change of consumers and breakpoints of one uprobe;
             dup_mmap_sem for writing keeps forks out while the mappings are listed and visited; mmap_lock for
             writing per address space
Invariants:  P9 after uprobe_register() every mm that maps the place validly, and whose filter says yes, has
             the breakpoint; after an unregister none has it that nobody wants, P7 after
             uprobe_unregister_sync() no handler of the consumer runs
Leaves out:  docs/limits.md: the retry loop for memory under i_mmap_rwsem, the reference the caller has on the
             inode's mount
Read next:   uprobes/mm_hooks.py, the other side of P9: mappings that appear after the scan
"""

import errno
from typing import Any

from kmodel.core import WARN, guards, initcall, shared_int, test_bit
from kmodel.fs import (
    PAGE_SHIFT,
    i_mmap_lock_read,
    i_mmap_unlock_read,
    i_size_read,
    shmem_mapping,
    vma_interval_tree_foreach,
)
from kmodel.mm import (
    MMF_HAS_UPROBES,
    MMF_UNSTABLE,
    find_vma,
    mmap_read_lock,
    mmap_read_unlock,
    mmap_write_lock,
    mmap_write_unlock,
    mmget_not_zero,
    mmput,
)
from kmodel.rcu import (
    list_for_each_entry_rcu,
    rcu_read_lock_trace,
    rcu_read_unlock_trace,
    synchronize_srcu,
)
from kmodel.slab import kfree, kzalloc
from kmodel.sync import (
    PercpuRwSemaphore,
    down_write,
    percpu_down_write,
    percpu_up_write,
    up_write,
)
from kmodel.uprobes import lifetime, protection, references
from kmodel.uprobes.arch import UPROBE_SWBP_INSN_SIZE
from kmodel.uprobes.breakpoint import install_breakpoint, remove_breakpoint, valid_vma
from kmodel.uprobes.consumer import UprobeConsumer, consumer_add, consumer_del, consumer_filter, filter_chain
from kmodel.uprobes.lifetime import put_uprobe
from kmodel.uprobes.pages import offset_to_vaddr, vaddr_to_offset
from kmodel.uprobes.tree import insert_uprobe
from kmodel.uprobes.uprobe import Uprobe, init_uprobe

guards.register("no-unregister-sync", "H44, H45, P7: a consumer is freed while a handler chain is at it")
guards.register(
    "no-register-rollback", "H45: a registration that fails halfway leaves its consumer on the list"
)
guards.register("no-consumer-before-scan", "H49: a mapping made during the scan is seen by neither side")
guards.register(
    "no-install-write-lock", "H50: a breakpoint of ours appears between lookup and trap test: SIGTRAP"
)

dup_mmap_sem: PercpuRwSemaphore


@initcall
def uprobes_register_init() -> None:
    """Create the semaphore between forks and register/unregister."""
    global dup_mmap_sem
    dup_mmap_sem = PercpuRwSemaphore()


# -------------------------------------------------------------------------- the uprobe


def alloc_uprobe(inode: Any, offset: int, ref_ctr_offset: int) -> Uprobe | int:
    """The uprobe of this place, new or old, with a reference for the consumer to come. -ENOMEM, or -EINVAL
    for one place with two different reference counters.
    """
    uprobe = new_uprobe(inode, offset, ref_ctr_offset)
    if uprobe is None:
        return -errno.ENOMEM
    return settle_uprobe(uprobe, insert_uprobe(uprobe), ref_ctr_offset)


def new_uprobe(inode: Any, offset: int, ref_ctr_offset: int) -> Uprobe | None:
    """alloc_uprobe() up to the insertion: a uprobe that nobody else can see yet, with its first reference."""
    uprobe = kzalloc(Uprobe)
    if uprobe is not None:
        init_uprobe(uprobe, inode, shared_int(offset), shared_int(ref_ctr_offset))
        references.implementation.init(uprobe, 1)
    return uprobe


def settle_uprobe(uprobe: Uprobe, cur_uprobe: Uprobe, ref_ctr_offset: int) -> Uprobe | int:
    """alloc_uprobe() after the insertion, which took `uprobe` or found `cur_uprobe` at its place."""
    if cur_uprobe is not uprobe:
        kfree(uprobe)
        if cur_uprobe.ref_ctr_offset != ref_ctr_offset:
            put_uprobe(cur_uprobe)
            return -errno.EINVAL
    return cur_uprobe


# -------------------------------------------------------------------------- every mapping of it


def build_map_info(mapping: Any, offset: int, is_register: bool) -> list[tuple[Any, int]]:
    """(mm, vaddr) of every valid mapping of the byte, each mm with a reference (mmget)."""
    info: list[tuple[Any, int]] = []
    pgoff = offset >> PAGE_SHIFT
    i_mmap_lock_read(mapping)
    for vma in vma_interval_tree_foreach(mapping, pgoff, pgoff):
        if valid_vma(vma, is_register) and mmget_not_zero(vma.vm_mm):
            info.append((vma.vm_mm, offset_to_vaddr(vma, offset)))
    i_mmap_unlock_read(mapping)
    return info


def register_for_each_vma(uprobe: Uprobe, new: UprobeConsumer | None) -> int:
    """Install for the consumer `new` wherever it wants, or (None) remove wherever nobody wants. 0 or a
    negative errno.

    Needs register_rwsem held for writing. The list of mappings is made first and may be old when its turn
    comes: nothing of it is believed before mmap_lock is held.
    """
    err = 0
    percpu_down_write(dup_mmap_sem)
    for mm, vaddr in build_map_info(uprobe.inode.i_mapping, uprobe.offset, new is not None):
        if not (err and new is not None):  # after the first failed installation only drop the references
            err |= register_one_vma(uprobe, new, mm, vaddr)
        mmput(mm)
    percpu_up_write(dup_mmap_sem)
    return err


def register_one_vma(uprobe: Uprobe, new: UprobeConsumer | None, mm: Any, vaddr: int) -> int:
    """register_for_each_vma's work in one address space."""
    is_register = new is not None
    err = 0
    # For writing, although a page is all that changes: find_active_uprobe_rcu() looks up and tests for a trap
    # under one read hold, and a breakpoint of ours must not appear in between (H50).
    lock, unlock = mmap_write_lock, mmap_write_unlock
    if "no-install-write-lock" in guards.removed:
        lock, unlock = mmap_read_lock, mmap_read_unlock
    lock(mm)
    vma = find_vma(mm, vaddr)
    if (
        not test_bit(MMF_UNSTABLE, mm, "flags")  # check_stable_address_space: a fork that failed halfway
        and vma is not None
        and vma.vm_start <= vaddr
        and valid_vma(vma, is_register)
        and vma.vm_file.f_inode is uprobe.inode
        and vaddr_to_offset(vma, vaddr) == uprobe.offset
    ):
        if new is not None:
            # Only the new consumer is asked: the others got theirs when they came.
            if consumer_filter(new, mm):
                err = install_breakpoint(uprobe, vma, vaddr)
        elif test_bit(MMF_HAS_UPROBES, mm, "flags") and not filter_chain(uprobe, mm):
            err = remove_breakpoint(uprobe, vma, vaddr)
    unlock(mm)
    return err


# -------------------------------------------------------------------------- the calls


def uprobe_register(inode: Any, offset: int, ref_ctr_offset: int, uc: UprobeConsumer) -> Uprobe | int:
    """Call `uc` whenever a task executes the byte at `offset` of the file. The uprobe, or a negative errno
    (ERR_PTR):

    -EINVAL  no handler; offset past the end of the file or unaligned; another ref_ctr_offset than others gave
    for the place
    -EIO     a file whose pages cannot be read; nothing to read at the offset
    -ENOTSUPP (524)  a breakpoint is in the file there, or an instruction that must not be probed (if any mm
    maps the place)

    The caller keeps the inode alive until after the unregister.
    """
    ret = check_uprobe(inode, offset, ref_ctr_offset, uc)
    if ret:
        return ret
    while True:
        uprobe = alloc_uprobe(inode, offset, ref_ctr_offset)
        if isinstance(uprobe, int):
            return uprobe
        ret = add_consumer(uprobe, uc)
        if ret != -errno.EAGAIN:
            break
        put_uprobe(uprobe)

    if ret:
        if "no-register-rollback" not in guards.removed:
            uprobe_unregister_nosync(uprobe, uc)
        uprobe_unregister_sync()  # some mms had the breakpoint already: handlers may run at this moment (H45)
        return ret
    return uprobe


def check_uprobe(inode: Any, offset: int, ref_ctr_offset: int, uc: UprobeConsumer) -> int:
    """What uprobe_register() refuses before it does anything: 0 or a negative errno."""
    if uc.handler is None and uc.ret_handler is None:
        return -errno.EINVAL
    if inode.i_mapping.a_ops.read_folio is None and not shmem_mapping(inode.i_mapping):
        return -errno.EIO
    if offset > i_size_read(inode):  # racy, catches the obvious mistakes
        return -errno.EINVAL
    if offset % UPROBE_SWBP_INSN_SIZE or ref_ctr_offset % 2:
        return -errno.EINVAL
    return 0


def add_consumer(uprobe: Uprobe, uc: UprobeConsumer) -> int:
    """The part of uprobe_register() that is under register_rwsem. 0; what an installation failed with, and
    then `uc` is to be unregistered; -EAGAIN if the uprobe has left the tree (ref_tree.py alone), and then
    nothing was done.
    """
    down_write(uprobe.register_rwsem)
    if not references.implementation.usable(uprobe):
        up_write(uprobe.register_rwsem)
        return -errno.EAGAIN
    if "no-consumer-before-scan" in guards.removed:
        ret = register_for_each_vma(uprobe, uc)
        consumer_add(uprobe, uc)
    else:
        # Publish first, scan afterwards; uprobe_mmap() links its VMA first and looks for uprobes afterwards.
        # Whoever is second sees the other: no mapping is missed by both (H49). If both see each other, the
        # second installation changes nothing.
        consumer_add(uprobe, uc)
        ret = register_for_each_vma(uprobe, uc)
    up_write(uprobe.register_rwsem)
    return ret


def uprobe_unregister_nosync(uprobe: Uprobe, uc: UprobeConsumer) -> None:
    """Stop wanting hits. Handlers of `uc` may still run until uprobe_unregister_sync(); the uprobe is not to
    be used any more.

    Who unregisters many waits once: N times this, then one uprobe_unregister_sync().
    """
    down_write(uprobe.register_rwsem)
    consumer_del(uprobe, uc)
    err = register_for_each_vma(uprobe, None)
    if not err:
        references.implementation.delete_uprobe(uprobe)
    up_write(uprobe.register_rwsem)
    if WARN(err, "unregister, leaking uprobe"):
        return  # a breakpoint stayed somewhere, and whoever hits it must find the uprobe
    put_uprobe(uprobe)


def uprobe_unregister_sync() -> None:
    """Wait until nobody can be calling into a consumer that was unregistered before."""
    if "no-unregister-sync" in guards.removed:
        return
    protection.implementation.synchronize()  # synchronize_rcu_tasks_trace(): handler_chain
    synchronize_srcu(lifetime.uretprobes_srcu)  # return handlers


def uprobe_unregister(uprobe: Uprobe, uc: UprobeConsumer) -> None:
    """Stop, and wait: afterwards `uc` may be freed (the one call there was before it was split in two)."""
    uprobe_unregister_nosync(uprobe, uc)
    uprobe_unregister_sync()


def uprobe_apply(uprobe: Uprobe, uc: UprobeConsumer, add: bool) -> int:
    """Ask the filter of `uc` again: with `add` install where it now says yes, else remove where now nobody
    does.

    0, -ENOENT if `uc` is not registered here, or what the installation failed with.
    """
    ret = -errno.ENOENT
    down_write(uprobe.register_rwsem)
    rcu_read_lock_trace()
    for con in list_for_each_entry_rcu(uprobe.consumers):
        if con is uc:
            ret = register_for_each_vma(uprobe, uc if add else None)
            break
    rcu_read_unlock_trace()
    up_write(uprobe.register_rwsem)
    return ret
