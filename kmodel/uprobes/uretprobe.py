"""Return probes: the return address is replaced at the entry, and the return comes to us.

Models:      kernel/events/uprobes.c, prepare_uretprobe, uprobe_handle_trampoline, handle_uretprobe_chain,
             dup_utask, uprobe_copy_process; arch/x86/kernel/uprobes.c, arch_uretprobe_hijack_return_addr
             (7.2)
Guards:      a task's instances are its own; RCU tasks trace while return handlers run; a lease or a reference
             keeps the uprobe from the entry to the return (uprobes/hprobe.py)
Invariants:  T1 a function returns where it would have returned, whatever was dropped or failed
             T2 a session's return handler runs exactly if its entry handler returned 0 for this call
Leaves out:  a user stack in memory: the words that a task pushed are in its PtRegs; shadow stacks; the
             messages of uprobe_warn()
Read next:   uprobes/return_instance.py, uprobes/ri_timer.py
"""

import errno
from typing import Any, Final

from kmodel.core import TaskStruct, current, guards, rcu_assign_pointer
from kmodel.rcu import (
    __srcu_read_lock,
    list_for_each_entry_rcu,
    rcu_read_lock_trace,
    rcu_read_unlock_trace,
    srcu_read_lock,
    srcu_read_unlock,
)
from kmodel.slab import kzalloc
from kmodel.sync import mod_timer
from kmodel.uprobes import lifetime
from kmodel.uprobes.arch import PtRegs, instruction_pointer_set
from kmodel.uprobes.consumer import Cookie
from kmodel.uprobes.hprobe import (
    hprobe_consume,
    hprobe_expire,
    hprobe_finalize,
    hprobe_init_leased,
    hprobe_init_stable,
)
from kmodel.uprobes.return_instance import (
    RP_CHECK_RET,
    ReturnConsumer,
    ReturnInstance,
    arch_uretprobe_is_alive,
    cleanup_return_instances,
    find_next_ret_chain,
    free_ret_instance,
    return_consumer_find,
    ri_free,
)
from kmodel.uprobes.ri_timer import RI_TIMER_PERIOD
from kmodel.uprobes.uprobe import Uprobe
from kmodel.uprobes.utask import SIGILL, alloc_utask, force_sig
from kmodel.uprobes.xol import get_xol_area, uprobe_get_trampoline_vaddr

MAX_URETPROBE_DEPTH: Final = 64
CLONE_VM: Final = 0x100
CLONE_VFORK: Final = 0x4000

_FORK_EXPIRE = guards.register(
    "no-fork-expire", "H63: a forked child has the parent's lease too, and ends it a second time"
)
_TIMER = guards.register("no-ri-timer", "H58: a function that does not return holds up SRCU for ever")


# ------------------------------------------------------------------------------------------------ the entry


def arch_uretprobe_hijack_return_addr(trampoline_vaddr: int, regs: PtRegs) -> int:
    """Let the function return to the trampoline; where it would have returned, or -1 if its stack cannot be
    written.
    """
    orig_ret_vaddr = regs.stack.get(regs.sp)
    if orig_ret_vaddr is None:
        return -1
    if orig_ret_vaddr != trampoline_vaddr:
        regs.stack[regs.sp] = trampoline_vaddr
    return orig_ret_vaddr


def prepare_uretprobe(uprobe: Uprobe, regs: PtRegs, ri: ReturnInstance) -> None:
    """At a function's entry: remember the call in `ri`, or free `ri` and let the call go unseen."""
    task = current()
    utask = task.utask
    if get_xol_area(task) is None or utask.depth >= MAX_URETPROBE_DEPTH:
        ri_free(ri)
        return
    trampoline_vaddr = uprobe_get_trampoline_vaddr(task)
    orig_ret_vaddr = arch_uretprobe_hijack_return_addr(trampoline_vaddr, regs)
    if orig_ret_vaddr == -1:
        ri_free(ri)
        return

    chained = orig_ret_vaddr == trampoline_vaddr
    cleanup_return_instances(utask, chained, regs)
    # A tail call: the caller's instance knows where its caller goes on. The trampoline's own address is of no
    # use to anybody.
    if chained:
        if utask.return_instances is None:  # the program itself put the trampoline's address there
            ri_free(ri)
            return
        orig_ret_vaddr = utask.return_instances.orig_ret_vaddr

    # Without lockdep: the section goes along to user space, and a timer may end it.
    srcu_idx = __srcu_read_lock(lifetime.uretprobes_srcu, task)

    ri.func = regs.ip
    ri.stack = regs.sp
    ri.orig_ret_vaddr = orig_ret_vaddr
    ri.chained = chained

    utask.depth += 1
    hprobe_init_leased(ri.hprobe, uprobe, srcu_idx)
    ri.next = utask.return_instances
    rcu_assign_pointer(utask, "return_instances", ri)  # RELEASE: pairs with rcu_dereference() in ri_timer()
    if _TIMER not in guards.removed:
        mod_timer(utask.ri_timer, RI_TIMER_PERIOD)


# ------------------------------------------------------------------------------------------------ the return


def handle_uretprobe_chain(ri: ReturnInstance, uprobe: Uprobe | None, regs: PtRegs) -> None:
    """Run the return handlers of the consumers there are now; none if the uprobe is gone.

    A consumer with only a ret_handler is called for every return; a session only if its entry handler
    left something in the instance.
    """
    if uprobe is None:
        return
    begin = 0
    rcu_read_lock_trace()
    for uc in list_for_each_entry_rcu(uprobe.consumers):
        if uc.ret_handler is None:
            continue
        ric: ReturnConsumer | None
        ric, begin = return_consumer_find(ri, begin, uc.id)
        if uc.handler is not None and ric is None:
            continue
        cookie = Cookie(ric.cookie) if ric is not None else None
        uc.ret_handler(uc, ri.func, regs, cookie)
        if ric is not None and cookie is not None:
            ric.cookie = cookie.value
    rcu_read_unlock_trace()


def uprobe_handle_trampoline(regs: PtRegs) -> None:
    """A probed function returned: go on where it was called, after the return handlers. SIGILL for a task
    that has no call to return from.
    """
    task = current()
    utask = task.utask
    ri = utask.return_instances if utask is not None else None
    if ri is None:
        force_sig(SIGILL, task)
        return
    valid = False
    while not valid:
        # Frames that a longjmp left out come first on the list. A chain is the one that returned if the next
        # is still alive, or there is no next.
        next_chain = find_next_ret_chain(ri)
        valid = next_chain is None or arch_uretprobe_is_alive(next_chain, RP_CHECK_RET, regs)

        instruction_pointer_set(regs, ri.orig_ret_vaddr)
        while ri is not next_chain:
            ri_next = ri.next
            rcu_assign_pointer(utask, "return_instances", ri_next)
            utask.depth -= 1
            uprobe, hstate = hprobe_consume(ri.hprobe)
            if valid:
                handle_uretprobe_chain(ri, uprobe, regs)
            hprobe_finalize(ri.hprobe, hstate)
            free_ret_instance(utask, ri, cleanup_hprobe=False)
            ri = ri_next


# ------------------------------------------------------------------------------------------------ fork


def dup_return_instance(old: ReturnInstance) -> ReturnInstance | None:
    """A copy for a forked child, without its hprobe."""
    ri = kzalloc(ReturnInstance)
    if ri is not None:
        ri.func, ri.stack = old.func, old.stack
        ri.orig_ret_vaddr, ri.chained = old.orig_ret_vaddr, old.chained
        ri.consumers = [ReturnConsumer(con.id, con.cookie) for con in old.consumers]
    return ri


def dup_utask(task: TaskStruct, o_utask: Any) -> int:
    """Give the child `task` a copy of current's pending returns; 0 or -ENOMEM.

    Not the leases: a lease has one owner (H63). The parent's are ended, and parent and child get a
    reference each.
    """
    n_utask = task.utask = alloc_utask()
    idx = srcu_read_lock(lifetime.uretprobes_srcu)  # keeps the uprobes while the leases change hands
    ret = 0
    last: ReturnInstance | None = None
    old = o_utask.return_instances
    while old is not None:
        new = dup_return_instance(old)
        if new is None:
            ret = -errno.ENOMEM
            break
        if _FORK_EXPIRE in guards.removed:
            hprobe_init_leased(new.hprobe, old.hprobe.uprobe, old.hprobe.srcu_idx)
        else:
            hprobe_init_stable(new.hprobe, hprobe_expire(old.hprobe, get=True))
        new.next = None
        if last is None:
            rcu_assign_pointer(n_utask, "return_instances", new)
        else:
            rcu_assign_pointer(last, "next", new)
        last = new
        n_utask.depth += 1
        old = old.next
    srcu_read_unlock(lifetime.uretprobes_srcu, idx)
    return ret


def uprobe_copy_process(task: TaskStruct, flags: int) -> int:
    """current forks `task`, whose mm is set: let it inherit the pending returns if it has a stack of its own
    or current waits for it. Returns the address at which the child has to call dup_xol_work(), or 0.
    """
    parent = current()
    utask = parent.utask
    task.utask = None
    if utask is None or utask.return_instances is None:
        return 0
    if parent.mm is task.mm and not flags & CLONE_VFORK:
        return 0  # a thread: it begins on a stack of its own
    if dup_utask(task, utask):
        return 0
    # A child whose dup_xol_work() failed has pending returns and no area, and may fork too.
    area = parent.mm.uprobes_state.xol_area
    if area is None or parent.mm is task.mm:
        return 0
    return area.vaddr  # type: ignore[no-any-return]
