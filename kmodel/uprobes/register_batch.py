"""Registering many consumers of one file at once, and taking them back with one wait for readers.

Models:      "uprobes: add batch uprobe register/unregister APIs" (v2 of July 2024, not merged):
             uprobe_register_batch, uprobe_unregister_batch
Guards:      uprobes_treelock once for all insertions; register_rwsem for each uprobe in its turn
Invariants:  A1 after a batch that failed no consumer of it is registered, and no handler of it runs
Leaves out:  nothing; but not atomic, as there: handlers of the first consumers run while the others are being
             registered, and may have run when the batch fails
Read next:   register.py, whose split into _nosync and _sync made this unnecessary

    1. check every consumer
    2. allocate a uprobe for each, insert all of them in one hold of the treelock
    3. register one after the other; what fails undoes all of it, in reverse, and waits once

A writer of the treelock that waits for a grace period each time (percpu_rw_semaphore) makes 2 worth while;
one wait for readers in place of N is what everybody wanted, and the split gives that without any batch.
"""

import errno
from collections.abc import Callable
from typing import Any

from kmodel.core import guards, kernel_struct, untraced
from kmodel.slab import kfree
from kmodel.sync import down_write, up_write
from kmodel.uprobes import references
from kmodel.uprobes.consumer import UprobeConsumer
from kmodel.uprobes.lifetime import put_uprobe
from kmodel.uprobes.register import (
    add_consumer,
    alloc_uprobe,
    check_uprobe,
    new_uprobe,
    settle_uprobe,
    uprobe_unregister_nosync,
    uprobe_unregister_sync,
)
from kmodel.uprobes.tree import insert_uprobes
from kmodel.uprobes.uprobe import Uprobe

_ROLLBACK = guards.register("no-batch-rollback", "A1: a batch that failed leaves consumers registered")


@kernel_struct
class BatchConsumer(UprobeConsumer):
    """struct uprobe_consumer as the series had it: it knows its place, and its uprobe while registered."""

    offset: int = untraced(default=0)
    ref_ctr_offset: int = untraced(default=0)
    uprobe: Any = untraced(default=None)


type GetConsumer = Callable[[int, Any], BatchConsumer | None]


def uprobe_register_batch(inode: Any, cnt: int, get_consumer: GetConsumer, ctx: Any) -> int:
    """Register get_consumer(0, ctx) ... get_consumer(cnt - 1, ctx), all or none.

    0, or what uprobe_register() would have said to the first that was refused; -EINVAL also for no consumers.
    May sleep; the caller keeps the inode alive.
    """
    if cnt <= 0:
        return -errno.EINVAL
    consumers: list[BatchConsumer] = []
    for i in range(cnt):
        uc = get_consumer(i, ctx)
        if uc is None or uc.uprobe is not None:
            return -errno.EINVAL
        ret = check_uprobe(inode, uc.offset, uc.ref_ctr_offset, uc)
        if ret:
            return ret
        consumers.append(uc)

    ret = alloc_uprobes(inode, consumers)
    if ret:
        return ret
    for i, uc in enumerate(consumers):
        ret = register_one(inode, uc)
        if ret:
            roll_back(consumers, i)
            return ret
    return 0


def uprobe_unregister_batch(inode: Any, cnt: int, get_consumer: GetConsumer, ctx: Any) -> None:
    """Unregister all of them, and wait once until none of their handlers runs."""
    for i in range(cnt):
        uc = get_consumer(i, ctx)
        if uc is not None and uc.uprobe is not None:
            uprobe_unregister_nosync(uc.uprobe, uc)
            uc.uprobe = None
    uprobe_unregister_sync()


def alloc_uprobes(inode: Any, consumers: list[BatchConsumer]) -> int:
    """Step 2: every consumer gets a uprobe with a reference, or (-ENOMEM, -EINVAL) none does."""
    new: list[Uprobe] = []
    for uc in consumers:
        uprobe = new_uprobe(inode, uc.offset, uc.ref_ctr_offset)
        if uprobe is None:
            for made in new:
                kfree(made)
            return -errno.ENOMEM
        new.append(uprobe)

    ret = 0
    for uc, uprobe, found in zip(consumers, new, insert_uprobes(new), strict=True):
        settled = settle_uprobe(uprobe, found, uc.ref_ctr_offset)
        if isinstance(settled, Uprobe):
            uc.uprobe = settled
        else:
            ret = ret or settled
    if ret:
        roll_back(consumers, -1)
    return ret


def register_one(inode: Any, uc: BatchConsumer) -> int:
    """Step 3 for one of them."""
    while True:
        ret = add_consumer(uc.uprobe, uc)
        if ret != -errno.EAGAIN:
            return ret
        # It left the tree before its turn came (ref_tree.py): look for its successor, alone.
        put_uprobe(uc.uprobe)
        again = alloc_uprobe(inode, uc.offset, uc.ref_ctr_offset)
        if isinstance(again, int):
            uc.uprobe = None
            return again
        uc.uprobe = again


def roll_back(consumers: list[BatchConsumer], last: int) -> None:
    """Undo a batch of which consumers[0 .. last] were added to their uprobes (the last perhaps), in
    reverse.
    """
    for i in range(len(consumers) - 1, -1, -1):
        uc = consumers[i]
        uprobe, uc.uprobe = uc.uprobe, None
        if uprobe is None:
            continue
        if i > last:
            drop_unused(uprobe)
        elif not (guards.any_removed and _ROLLBACK in guards.removed):
            uprobe_unregister_nosync(uprobe, uc)
    if last >= 0:
        uprobe_unregister_sync()  # handlers of the first ones may be running


def drop_unused(uprobe: Uprobe) -> None:
    """Give back the reference of a consumer that was never added."""
    down_write(uprobe.register_rwsem)
    references.implementation.delete_uprobe(uprobe)
    up_write(uprobe.register_rwsem)
    put_uprobe(uprobe)
