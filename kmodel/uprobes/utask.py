"""struct uprobe_task: what a probed task carries with it, and how a breakpoint reaches us.

Models:      include/linux/uprobes.h, struct uprobe_task; kernel/events/uprobes.c, get_utask,
             uprobe_pre_sstep_notifier (7.2)
Guards:      a utask belongs to its task
Invariants:  K3 a trap in an mm without MMF_HAS_UPROBES is never ours: the flag is set before the first
             breakpoint is written
Leaves out:  single-stepping and return instances (a later part adds their fields here), signal delivery:
             force_sig only records
Read next:   uprobes/handler.py
"""

from typing import Any, Final

from kmodel.core import Struct, TaskStruct, clear_bit, current, kernel_struct, set_bit, test_bit
from kmodel.core.task import TIF_UPROBE
from kmodel.mm import MMF_HAS_UPROBES

SIGILL: Final = 4
SIGTRAP: Final = 5

UTASK_RUNNING: Final = 0


@kernel_struct
class UprobeTask(Struct):
    """struct uprobe_task."""

    state: int = UTASK_RUNNING
    # the place whose handlers run now, for fetch functions that a handler calls
    auprobe: Any = None


def get_utask(task: TaskStruct) -> UprobeTask:
    """The task's struct uprobe_task, made at its first hit. Only the task itself calls this."""
    utask: UprobeTask | None = task.utask
    if utask is None:
        utask = task.utask = UprobeTask()
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
    way to user space.
    """
    task = current()
    mm = task.mm
    if mm is None or not test_bit(MMF_HAS_UPROBES, mm, "flags"):
        return 0
    set_bit(TIF_UPROBE, task, "thread_info_flags")
    return 1


def exc_int3(regs: Any) -> None:
    """The breakpoint exception: the uprobes notifier, or else SIGTRAP (arch/x86/kernel/traps.c)."""
    from kmodel.uprobes.handler import handle_swbp

    if not uprobe_pre_sstep_notifier(regs):
        force_sig(SIGTRAP)
        return
    # The way back to user space: uprobe_notify_resume(), which has no single step to finish here.
    clear_bit(TIF_UPROBE, current(), "thread_info_flags")
    handle_swbp(regs)
