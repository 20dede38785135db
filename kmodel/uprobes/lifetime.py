"""How a uprobe lives and dies: references, and the chain that ends in its free.

Models:      kernel/events/uprobes.c, get_uprobe, try_get_uprobe, put_uprobe, uprobe_free_deferred (7.2)
Guards:      ref is a refcount_t (references.py: or another count); the tree link is under uprobes_treelock
Invariants:  U1 ref never goes from 0 to 1, U3 freed only after work -> SRCU -> RCU tasks trace, U4 out of the
             tree before either grace period starts, so that no new reader can find it while it is waited for
Leaves out:  nothing
Read next:   uprobes/find_refcount.py, where U1 was in danger (H01)

Who may still look at a uprobe when its last reference goes, and what waits for them:
    a task in handle_swbp, as RCU tasks trace reader        call_rcu_tasks_trace (protection.py: or another)
    a task whose probed function has not returned yet       call_srcu(uretprobes_srcu)
put_uprobe() may be called from a timer (softirq), where taking the treelock is not allowed: hence the work
item (H56).
"""

from collections.abc import Callable
from functools import partial

from kmodel.core import (
    Struct,
    atomic,
    atomic_dec,
    atomic_inc,
    guards,
    initcall,
    kernel_struct,
    reboot_notifier,
    smp_cond_load_acquire,
)
from kmodel.rcu import (
    SrcuStruct,
    call_srcu,
    rb_erase,
    srcu_barrier,
)
from kmodel.slab import kfree
from kmodel.sync import (
    WorkStruct,
    flush_scheduled_work,
    mutex_lock,
    mutex_unlock,
    schedule_work,
    write_seqcount_begin,
    write_seqcount_end,
)
from kmodel.uprobes import delayed, protection, references, tree, treelock
from kmodel.uprobes.uprobe import Uprobe

guards.register(
    "free-without-grace-period", "H08: a task in handle_swbp walks the consumers of a freed uprobe"
)
guards.register("no-srcu-wait", "H08: the uprobe is freed while a return instance still leases it")
guards.register("no-tasks-trace-wait", "H08: the uprobe is freed while a task in handle_swbp still uses it")
guards.register(
    "srcu-wait-first",
    "what Linux 7.2 does, rather than a guard: a lease that a task takes after the SRCU wait, and before it "
    "leaves RCU tasks trace, is not waited for. Without it the two waits change places",
)
guards.register("no-callback-chain", "H09: one rcu_head is queued for two grace periods at a time")
guards.register("no-free-work", "H56: the last put is a timer's, and takes a mutex")
guards.register("no-active-test", "H07: a node that __insert_uprobe took out of the tree is taken out again")


@kernel_struct
class UprobeLedger(Struct):
    """The model's own count of the dying: uprobes whose last reference is gone and whose free is not done."""

    dying: int = atomic(default=0)


uretprobes_srcu: SrcuStruct
ledger: UprobeLedger


@initcall
def uprobes_lifetime_init() -> None:
    """Create the SRCU domain that return probes live in."""
    global uretprobes_srcu, ledger
    uretprobes_srcu = SrcuStruct("uretprobes_srcu")
    ledger = UprobeLedger()


def get_uprobe(uprobe: Uprobe) -> Uprobe:
    """One more reference, by somebody who has one."""
    references.implementation.get(uprobe)
    return uprobe


def try_get_uprobe(uprobe: Uprobe) -> Uprobe | None:
    """A reference by somebody who only knows that the memory stays: a reader (tasks trace, SRCU) or holder of
    the treelock.

    None if the uprobe is dying already: nothing may revive it (U1).
    """
    if references.implementation.try_get(uprobe):
        return uprobe
    return None


def put_uprobe(uprobe: Uprobe) -> None:
    """Drop a reference; the last one starts the chain below."""
    if not references.implementation.put(uprobe):
        return
    if "free-without-grace-period" in guards.removed:
        erase_uprobe(uprobe)
        kfree(uprobe)
        return
    atomic_inc(ledger, "dying")
    uprobe.work = WorkStruct(uprobe_free_deferred, container=uprobe)
    if "no-free-work" in guards.removed:
        uprobe_free_deferred(uprobe.work)
        return
    schedule_work(uprobe.work)


def erase_uprobe(uprobe: Uprobe) -> None:
    """Take the uprobe out of the tree, unless __insert_uprobe did so when it met it dead."""
    treelock.implementation.write_lock(tree.uprobes_treelock)
    if tree.uprobe_is_active(uprobe) or "no-active-test" in guards.removed:
        write_seqcount_begin(tree.uprobes_seqcount)
        rb_erase(uprobe, tree.uprobes_tree)
        write_seqcount_end(tree.uprobes_seqcount)
    treelock.implementation.write_unlock(tree.uprobes_treelock)


def uprobe_free_deferred(work: WorkStruct) -> None:
    """In a worker, after the last put: out of the tree, then wait for both kinds of readers."""
    uprobe: Uprobe = work.container
    erase_uprobe(uprobe)

    # If the probed mapping went away before the unregister, no remove_breakpoint() dropped the entry (H53).
    mutex_lock(delayed.delayed_uprobe_lock)
    delayed.delayed_uprobe_remove(uprobe, None)
    mutex_unlock(delayed.delayed_uprobe_lock)

    if "no-srcu-wait" in guards.removed:
        uprobe_free_srcu(uprobe)
        return
    if "srcu-wait-first" in guards.removed:
        queue_rcu_head(protection.implementation.call, uprobe, uprobe_free_then_srcu)
        return
    # One after the other, never both at a time: there is one rcu_head, in the memory of the work item (H09).
    queue_rcu_head(partial(call_srcu, uretprobes_srcu), uprobe, uprobe_free_srcu)
    if "no-callback-chain" in guards.removed:
        queue_rcu_head(protection.implementation.call, uprobe, uprobe_free_rcu_tasks_trace)


def queue_rcu_head(
    call: Callable[[Uprobe, Callable[[Uprobe], None]], None],
    uprobe: Uprobe,
    func: Callable[[Uprobe], None],
) -> None:
    """call(&uprobe->rcu, func): the head keeps the function until the grace period is over."""
    uprobe.work = func  # the union of `rcu` and `work`; its worker has taken what it needs from the item
    call(uprobe, invoke_rcu_head)


def invoke_rcu_head(uprobe: Uprobe) -> None:
    """What rcu_do_batch does with a head: call the function that is in it, whoever put it there."""
    uprobe.work(uprobe)


def uprobe_free_srcu(uprobe: Uprobe) -> None:
    """After every return instance that leased the uprobe has given it back."""
    if "no-tasks-trace-wait" in guards.removed:
        uprobe_free_rcu_tasks_trace(uprobe)
        return
    queue_rcu_head(protection.implementation.call, uprobe, uprobe_free_rcu_tasks_trace)


def uprobe_free_then_srcu(uprobe: Uprobe) -> None:
    """Not in Linux: the other order. Nobody can take a lease any more; wait for those that were taken."""
    queue_rcu_head(partial(call_srcu, uretprobes_srcu), uprobe, uprobe_free_rcu_tasks_trace)


def uprobe_free_rcu_tasks_trace(uprobe: Uprobe) -> None:
    """After every task that was in handle_swbp has left it: nobody can see the uprobe now."""
    kfree(uprobe)
    atomic_dec(ledger, "dying")


def wait_for_frees() -> None:
    """Not in Linux: wait until every uprobe whose last reference was dropped is freed."""
    smp_cond_load_acquire(ledger, "dying", _none)


@reboot_notifier
def finish_frees() -> None:
    """Not in Linux: before a boot, let every free that was begun come to its end.

    Each step waits for what the one before it queued, whichever of the two orders is chosen.
    """
    flush_scheduled_work()
    protection.implementation.barrier()
    srcu_barrier(uretprobes_srcu)
    protection.implementation.barrier()


def _none(count: int) -> bool:
    return count == 0
