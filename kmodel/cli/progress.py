"""What a long search shows while it runs: a line that changes in place on a terminal, else one now and then.

Models:      nothing in Linux
Guards:      only the main thread draws
Invariants:  none
Read next:   cli/explore.py
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kmodel.explore.progress import Progress

QUIET_SECONDS = 1.0  # a search that is over by then shows nothing
PLAIN_INTERVAL = 10.0


class Stopper:
    """Whether the user wants a search to end: a first Ctrl-C asks it to, a second is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False

    def _note(self, _number: int, _frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over Ctrl-C inside the block."""
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class ProgressLine:
    """Called with the Progress of a search now and then; False asks it to stop."""

    def __init__(self, stopper: Stopper, out: Any = None) -> None:
        self._stopper = stopper
        self._out = out if out is not None else sys.stderr
        self._live = self._out.isatty()
        self._shown = 0.0
        self._written = False

    def __call__(self, progress: Progress) -> bool:
        """Show it, if it is time to."""
        interval = 0.2 if self._live else PLAIN_INTERVAL
        now = time.monotonic()
        if progress.seconds >= QUIET_SECONDS and now - self._shown >= interval:
            self._shown = now
            text = describe(progress)
            if self._live:
                self._out.write(f"\r\033[K{text}")
                self._written = True
            else:
                self._out.write(f"{text}\n")
            self._out.flush()
        return not self._stopper.asked

    def clear(self) -> None:
        """Take the line away: the result comes in its place."""
        if self._written:
            self._out.write("\r\033[K")
            self._out.flush()


def describe(progress: Progress) -> str:
    """Progress in words."""
    text = f"{progress.executions:,} executions in {duration(progress.seconds)}, {progress.rate:,.0f}/s"
    if progress.blocked:
        text += f" ({progress.blocked:,} cut short as redundant)"
    left = progress.remaining
    if left is not None:
        text += f", at least {duration(left)} left"  # alternatives not met yet only add to it
    return text


def duration(seconds: float) -> str:
    """Seconds in the unit a person would choose."""
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 86400 * 2:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.0f} days"
