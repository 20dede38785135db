"""What ends a sleep early: signal_pending_state(), which every killable or interruptible wait asks.

Models:      include/linux/sched/signal.h, signal_pending / fatal_signal_pending / signal_pending_state (7.2)
Guards:      none; the flags are set by others with a full barrier before they wake
Invariants:  N1 a sleeper that set its state before asking cannot miss a signal: the kill either is seen here
             or wakes it
Leaves out:  signals themselves: there are a fatal one and "some signal"
Read next:   rcuwait.py
"""

from kmodel.core import (
    TASK_INTERRUPTIBLE,
    TASK_WAKEKILL,
    TIF_SIGPENDING,
    current,
    fatal_signal_pending,
    test_bit,
)


def signal_pending() -> bool:
    """Whether any signal waits for current."""
    task = current()
    return test_bit(TIF_SIGPENDING, task, "thread_info_flags") or fatal_signal_pending(task)


def signal_pending_state(state: int) -> bool:
    """Whether a sleep of current in `state` ought to end now for a signal."""
    if not state & (TASK_INTERRUPTIBLE | TASK_WAKEKILL):
        return False
    return signal_pending() if state & TASK_INTERRUPTIBLE else fatal_signal_pending()
