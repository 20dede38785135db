"""What a running stress shows: a table that refreshes on a terminal, a line now and then elsewhere.

Models:      nothing in Linux
Guards:      only the main thread draws
Invariants:  none
Read next:   cli/stress.py
"""

import sys
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kmodel.torture import HARD_PATHS, Progress

PLAIN_INTERVAL = 2.0

# Counter -> its name on the screen.
WORK = {
    "hit": "breakpoints hit",
    "handler_call": "handlers called",
    "slow_path": "hits resolved under mmap_lock",
    "remap": "mappings replaced",
    "file_churn": "files opened and closed",
    "register": "uprobes registered",
    "unregister": "uprobes unregistered",
    "descent": "tree descents checked",
    "ref_get": "references taken (S2 variant)",
    "maps_read": "maps files read",
}


class View(Protocol):
    """Something that shows progress while it is entered."""

    def __enter__(self) -> Self:
        """Start showing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""

    def show(self, progress: Progress) -> None:
        """Show this now (or skip it, if the last one was shown only just)."""


def open_view(out: Any = None) -> View:
    """A live table if the output is a terminal that can move its cursor, else plain lines."""
    console = Console(file=out if out is not None else sys.stdout)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console)
    return PlainView(console.file)


class PlainView:
    """One line every two seconds."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, progress: Progress) -> None:
        """Print a line if two seconds have passed since the last one."""
        if progress.elapsed - self._last < PLAIN_INTERVAL:
            return
        self._last = progress.elapsed
        counts = progress.counts
        met = sum(1 for name in HARD_PATHS if counts.get(name))
        print(
            f"{progress.elapsed:6.1f} s  {counts.get('hit', 0):>10,} hits  "
            f"{counts.get('remap', 0):>8,} remaps  {counts.get('register', 0):>7,} registrations  "
            f"{counts.get('speculation_retried', 0):>7,} retried  "
            f"hard paths {met}/{len(HARD_PATHS)}",
            file=self._out,
            flush=True,
        )


class LiveView:
    """A table in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._before: Progress | None = None
        self._rates: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, progress: Progress) -> None:
        """Redraw."""
        self._measure(progress)
        counts = progress.counts
        head = Text.assemble(
            ("kmodel stress", "bold"),
            f"   seed {progress.seed}   {progress.threads} threads   ",
            f"{progress.elapsed:.1f} of {progress.seconds:g} s   ",
            (progress.stage, "cyan"),
        )
        work = Table(box=None, padding=(0, 2), show_header=False)
        work.add_column(justify="left")
        work.add_column(justify="right")
        work.add_column(justify="right", style="dim")
        for name, text in WORK.items():
            work.add_row(text, f"{counts.get(name, 0):,}", f"{self._rates.get(name, 0.0):,.0f}/s")
        hard = Table(box=None, padding=(0, 2), show_header=False)
        hard.add_column(justify="left")
        hard.add_column(justify="right")
        for name, text in HARD_PATHS.items():
            count = counts.get(name, 0)
            hard.add_row(Text(text, style="green" if count else "yellow"), f"{count:,}")
        both = Table(box=None, padding=(0, 4, 0, 0), show_header=False)
        both.add_row(work, hard)
        parts: list[Any] = [head, both]
        if progress.violations:
            parts.append(Text(f"{progress.violations} violations", style="bold red"))
        self._live.update(Group(*parts))

    def _measure(self, progress: Progress) -> None:
        before = self._before
        if before is None or progress.elapsed - before.elapsed >= 1.0:
            if before is not None:
                span = progress.elapsed - before.elapsed
                self._rates = {
                    name: (count - before.counts.get(name, 0)) / span
                    for name, count in progress.counts.items()
                }
            self._before = progress
