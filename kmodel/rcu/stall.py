"""Stall warnings: a grace period that waits too long says for whom, and where that task is.

Models:      kernel/rcu/tree_stall.h, print_cpu_stall and the blocked-task lines; kernel/rcu/tasks.h,
             check_holdout_task (7.2)
Guards:      none; it reads what may change meanwhile, as the kernel's stall warning does
Invariants:  T1 a stall is a kernel warning, so a run with one did not end clean
Leaves out:  CPU and kthread starvation; traced engines have no clock, they report a reader that never ends as
             a deadlock
Read next:   rcu/readers.py

Where a reader entered is not recorded on its way in: that costs more than the whole read side (measured,
docs/limits.md). The warning shows the reader's stack of now, whose function names nearly always include
the one that entered; record_entries(True) adds the exact line.
"""

import faulthandler
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Final

from kmodel.core import WARN, TaskStruct, engine, threads
from kmodel.core.report import log

_FRAMES: Final = 8
_ENTRY: Final = "rcu_entry"
_FRAME: Final = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')
_ENGINE: Final = threads.__file__  # where a task's own functions end

rcu_cpu_stall_timeout: float = 21.0
"""Seconds after which RCU warns; again every three times as long."""
rcu_task_stall_info: float = 10.0
"""Seconds after which the older RCU Tasks Trace tells the log."""
rcu_task_stall_timeout: float = 600.0
"""Seconds after which it warns."""


def note_entry(task: TaskStruct, depth: int = 2) -> None:
    """Record the line `depth` frames up as the place where `task` entered its section."""
    frame = sys._getframe(depth)
    task.local[_ENTRY] = (frame.f_code, frame.f_lineno)


def entry_of(task: TaskStruct) -> str:
    """The recorded entry, or nothing."""
    noted = task.local.get(_ENTRY)
    if noted is None:
        return ""
    code, line = noted
    return f"{code.co_qualname} ({_file(code.co_filename)}:{line})"


def _file(path: str) -> str:
    return "/".join(path.rsplit("/", 2)[-2:])


def stack_of(task: TaskStruct) -> str:
    """The functions that `task` is in now, innermost first."""
    # Another thread's frames may not be walked while it runs (a free-threaded interpreter frees them under
    # us); faulthandler stops all threads for as long as it writes.
    with tempfile.TemporaryFile() as out:
        faulthandler.dump_traceback(out)
        out.seek(0)
        text = out.read().decode(errors="replace")
    header = f"Thread 0x{task.thread_ident:016x}"
    _before, found, rest = text.partition(header)
    if not found:
        return "no stack: its thread has ended inside the section"
    names: list[str] = []
    for line in rest.partition("\n")[2].splitlines():
        frame = _FRAME.match(line)
        if frame is None or frame["file"] == _ENGINE or len(names) == _FRAMES:
            break
        names.append(f"{frame['function']} ({_file(frame['file'])}:{frame['line']})")
    return " < ".join(names)


class Stall:
    """The clock of one wait. `holdouts` is the wait's own table of tasks, which shrinks as they report."""

    __slots__ = ("began", "flavour", "holdouts", "inform_at", "warn_at", "warn_every")

    def __init__(self, flavour: str, *, warn_after: float, inform_after: float | None = None) -> None:
        self.flavour = flavour
        self.holdouts: dict[TaskStruct, Any] = {}
        self.began = engine().now()
        self.warn_every = warn_after
        self.warn_at = self.began + warn_after
        self.inform_at = None if inform_after is None else self.began + inform_after

    def check(self) -> None:
        """Warn if it is time."""
        now = engine().now()
        if self.inform_at is not None and now >= self.inform_at:
            self.inform_at = None
            log.info("INFO: %s", self.describe(now))
        if now >= self.warn_at:
            self.warn_at = now + 3 * self.warn_every
            WARN(True, self.describe(now))

    def describe(self, now: float) -> str:
        """What the grace period waits for."""
        lines = [
            f"{self.flavour} detected stalls on {len(self.holdouts)} task(s) after {now - self.began:.3g} s"
        ]
        for task in list(self.holdouts):
            entered = entry_of(task)
            lines.append(f"{task!r} {f'entered in {entered}, ' if entered else ''}is in {stack_of(task)}")
        return "; ".join(lines)


def rcu_stall() -> Stall:
    """The clock of an RCU grace period."""
    return Stall("rcu_preempt", warn_after=rcu_cpu_stall_timeout)


def tasks_trace_stall() -> Stall:
    """The clock of a grace period of the older RCU Tasks Trace."""
    return Stall("rcu_tasks_trace", warn_after=rcu_task_stall_timeout, inform_after=rcu_task_stall_info)


type MakeStall = Callable[[], Stall]
