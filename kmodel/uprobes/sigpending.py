"""Signals that wait for a task, as far as a single-step has to put them off.

Models:      include/linux/sched/signal.h, struct sighand_struct (siglock), struct sigpending;
             kernel/signal.c, send_signal, recalc_sigpending, dequeue_signal (7.2)
Guards:      siglock
Invariants:  G1 TIF_SIGPENDING is set if a signal waits, unless a single-step put it off
Leaves out:  queued siginfo, masks, process-wide signals, real-time signals
Read next:   uprobes/sstep.py
"""

from typing import Final

from kmodel.core import (
    Struct,
    TaskStruct,
    clear_bit,
    embedded,
    kernel_struct,
    kill,
    lockdep_assert_held,
    set_bit,
)
from kmodel.core.task import TIF_SIGPENDING
from kmodel.sync import SpinLock, spin_lock, spin_unlock

SIGKILL: Final = 9


@kernel_struct
class SighandStruct(Struct):
    """struct sighand_struct, with the set of waiting signals (bit n: signal n)."""

    siglock: SpinLock = embedded(factory=SpinLock)
    pending: int = 0


def sighand_of(task: TaskStruct) -> SighandStruct:
    """The task's own."""
    local = task.local
    if "sighand" not in local:
        local.setdefault("sighand", SighandStruct())
    return local["sighand"]  # type: ignore[no-any-return]


def send_sig(sig: int, task: TaskStruct) -> None:
    """Make a signal wait for `task`, which looks on its way to user space."""
    sighand = sighand_of(task)
    spin_lock(sighand.siglock)
    sighand.pending |= 1 << sig
    set_bit(TIF_SIGPENDING, task, "thread_info_flags")
    spin_unlock(sighand.siglock)
    if sig == SIGKILL:
        kill(task)


def recalc_sigpending(task: TaskStruct) -> None:
    """Set or clear TIF_SIGPENDING by what waits. Needs siglock."""
    sighand = sighand_of(task)
    lockdep_assert_held(sighand.siglock)
    if sighand.pending:
        set_bit(TIF_SIGPENDING, task, "thread_info_flags")
    else:
        clear_bit(TIF_SIGPENDING, task, "thread_info_flags")


def dequeue_signal(task: TaskStruct) -> int:
    """Take the signal with the lowest number; 0 if none waits."""
    sighand = sighand_of(task)
    spin_lock(sighand.siglock)
    sig = (sighand.pending & -sighand.pending).bit_length() - 1 if sighand.pending else 0
    sighand.pending &= ~(1 << sig) if sig else ~0
    recalc_sigpending(task)
    spin_unlock(sighand.siglock)
    return sig
