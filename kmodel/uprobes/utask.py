"""struct uprobe_task: what a probed task carries with it, and how a breakpoint reaches us.

Models:      include/linux/uprobes.h, struct uprobe_task; kernel/events/uprobes.c, get_utask,
             uprobe_pre_sstep_notifier (7.2)
Guards:      a utask belongs to its task
Invariants:  K3 a trap in an mm without MMF_HAS_UPROBES is never ours: the flag is set before the first
             breakpoint is written
Leaves out:  signal delivery: force_sig only records
Read next:   uprobes/handler.py, uprobes/sstep.py, uprobes/uretprobe.py
"""

from typing import Any, Final

from kmodel.core import (
    Struct,
    TaskStruct,
    current,
    embedded,
    kernel_struct,
    set_bit,
    test_bit,
)
from kmodel.core.task import TIF_UPROBE
from kmodel.mm import MMF_HAS_UPROBES
from kmodel.sync import Seqcount, TimerList, timer_setup
from kmodel.uprobes.ri_timer import ri_timer

SIGILL: Final = 4
SIGTRAP: Final = 5

# Where a task is with a displaced instruction (enum uprobe_task_state).
UTASK_RUNNING: Final = 0
UTASK_SSTEP: Final = 1
UTASK_SSTEP_ACK: Final = 2
UTASK_SSTEP_TRAPPED: Final = 3


@kernel_struct
class UprobeTask(Struct):
    """struct uprobe_task. All but the return instances' list is the task's own."""

    state: int = UTASK_RUNNING

    # a single-step: whose, from where, in which slot; a signal that waits for its end
    active_uprobe: Any = None
    vaddr: int = 0
    xol_vaddr: int = 0
    signal_denied: bool = False

    # probed functions that have not returned: how many; the innermost first
    depth: int = 0
    # write: the task; read: the task, or ri_timer inside RCU
    return_instances: Any = None
    # instances to be used again; the task's own
    ri_pool: Any = None
    ri_timer: TimerList = embedded(factory=TimerList)
    # odd while ri_timer walks the list
    ri_seqcount: Seqcount = embedded(factory=Seqcount)

    # the place whose handlers run now, for fetch functions that a handler calls
    auprobe: Any = None


def alloc_utask() -> UprobeTask:
    """A fresh one, with its timer."""
    utask = UprobeTask()
    utask.ri_timer.container = utask
    timer_setup(utask.ri_timer, ri_timer)
    return utask


def get_utask(task: TaskStruct) -> UprobeTask:
    """The task's struct uprobe_task, made at its first hit. Only the task itself calls this."""
    utask: UprobeTask | None = task.utask
    if utask is None:
        utask = task.utask = alloc_utask()
    return utask


def force_sig(sig: int, task: TaskStruct | None = None) -> None:
    """Send the signal that a trap or a fault of current's own causes. Recorded, not delivered:
    forced_signals().
    """
    (task if task is not None else current()).local.setdefault("forced_signals", []).append(sig)


def forced_signals(task: TaskStruct | None = None) -> list[int]:
    """The signals force_sig() sent to the task, oldest first."""
    return list((task if task is not None else current()).local.get("forced_signals", ()))


def uprobe_pre_sstep_notifier(regs: Any) -> int:
    """In the breakpoint exception: 1 if this may be ours, and then uprobe_notify_resume() will look on the
    way to user space. Ours are breakpoints, and the trampoline of a task with pending returns (K3).
    """
    task = current()
    mm = task.mm
    if mm is None:
        return 0
    if not test_bit(MMF_HAS_UPROBES, mm, "flags"):
        utask = task.utask
        if utask is None or utask.return_instances is None:
            return 0
    set_bit(TIF_UPROBE, task, "thread_info_flags")
    return 1
