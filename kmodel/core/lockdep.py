"""Who holds what: the book every lock of sync/ writes, and the assertions made from it.

Models:      include/linux/lockdep.h, lock_acquire / lock_release / lockdep_assert_held; might_sleep()
Guards:      a task's list is its own
Invariants:  L1 a lock is released by the task that acquired it, L2 nothing sleeps inside an RCU reader or
             with preemption off
Leaves out:  lock classes and the dependency graph (the explorer's lock-order oracle reads the same events)
Read next:   core/engine.py
"""

from typing import Any

from kmodel.core import access
from kmodel.core.report import LockingBug
from kmodel.core.task import current


def lock_acquire(lock: Any, mode: str = "write", *, atomic: bool = False) -> None:
    """Note that current now holds `lock` ("read" or "write"); `atomic` locks also disable preemption."""
    task = current()
    task.held_locks.append((lock, mode))
    if atomic:
        task.preempt_count += 1
    if access._tracer is not None:
        access._tracer.lock_acquired(task, lock, mode)


def lock_release(lock: Any, *, atomic: bool = False) -> None:
    """Note that current released `lock`; LockingBug if it did not hold it."""
    task = current()
    held = task.held_locks
    for i in range(len(held) - 1, -1, -1):
        if held[i][0] is lock:
            del held[i]
            break
    else:
        raise LockingBug(f"{task!r} releases {lock!r}, which it does not hold; it holds {held!r}")
    if atomic:
        task.preempt_count -= 1
    if access._tracer is not None:
        access._tracer.lock_released(task, lock)


def lock_downgrade(lock: Any) -> None:
    """Note that current turned its write hold on `lock` into a read hold."""
    held = current().held_locks
    for i, (known, _mode) in enumerate(held):
        if known is lock:
            held[i] = (lock, "read")
            return
    raise LockingBug(f"{current()!r} downgrades {lock!r}, which it does not hold")


def lock_is_held(lock: Any, mode: str | None = None) -> bool:
    """Whether current holds `lock` (in `mode`, if given)."""
    return any(known is lock and (mode is None or mode == how) for known, how in current().held_locks)


def lockdep_assert_held(lock: Any) -> None:
    """LockingBug unless current holds `lock` in any mode."""
    if not lock_is_held(lock):
        raise LockingBug(f"{current()!r} must hold {lock!r}; it holds {current().held_locks!r}")


def lockdep_assert_held_write(lock: Any) -> None:
    """LockingBug unless current holds `lock` for writing."""
    if not lock_is_held(lock, "write"):
        raise LockingBug(f"{current()!r} must hold {lock!r} for writing; it holds {current().held_locks!r}")


def might_sleep() -> None:
    """LockingBug if current may not block here: inside an RCU reader, or holding a spinning lock."""
    task = current()
    if task.preempt_count:
        raise LockingBug(f"{task!r} sleeps with preemption disabled; it holds {task.held_locks!r}")
    if task.rcu_read_lock_nesting:
        raise LockingBug(f"{task!r} sleeps inside an RCU read-side critical section")
