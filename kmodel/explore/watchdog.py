"""Notices a task that never comes back to the explorer, and gets rid of it.

Models:      kernel/watchdog.c, the soft lockup detector
Guards:      looks from the thread that called explore()
Invariants:  X1 a search that makes progress is left alone
Leaves out:  a task stuck in C code: its thread is left behind
Read next:   explore/engine.py
"""

import ctypes
import sys
import time
import traceback
from typing import Any

from kmodel.explore.events import Aborted

_GRACE = 3.0


class Watchdog:
    """Watches one search."""

    def __init__(self, engine: Any, seconds: float) -> None:
        self.e = engine
        self.seconds = seconds
        self.seen: Any = None
        self.since = time.monotonic()
        self.bitten = False

    def look(self) -> bool:
        """Called now and then. False: the search is hopelessly stuck."""
        e = self.e
        now = time.monotonic()
        state = (e.executions, e.blocked, e.depth, len(e.runners))
        if state != self.seen:
            self.seen, self.since = state, now
            return True
        if self.bitten:
            return now - self.since < _GRACE
        if now - self.since < self.seconds:
            return True
        self.bitten, self.since = True, now
        self._bite()
        return True

    def _bite(self) -> None:
        e = self.e
        runner = e.cur
        ident = e.working.ident if e.working is not None else 0
        if runner is not None and runner.baton is not None:
            ident = runner.baton.ident
        frame = sys._current_frames().get(ident)
        who = runner.task.comm if runner is not None else "setup() or final()"
        stack = "" if frame is None else "".join(traceback.format_stack(frame)[-6:])
        e.hang = (
            f"{who} made no access for {self.seconds:g} seconds: it loops, or waits for something outside "
            f"the model. It is here:\n{stack}"
        )
        e.over = "hang"
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Aborted))
