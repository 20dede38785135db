"""Measure how an operation scales over threads on a small, noisy machine, and say so in ratios.

What makes the numbers worth printing (each was a wrong result once):
  * threads are pinned to different processors, start together from a spin barrier, and a sample counts only
    if no thread's processor was taken from it for long and all of them really overlapped;
  * the loop over passes is the outermost one, so that a slow second of the machine hits every scheme alike;
  * scaling is the median over passes of (throughput with N threads) / (throughput with 1 thread) of the same
    pass.
"""

import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import attrs

from kmodel.core import adopt_thread, gil_enabled

MAX_STOLEN = 0.07
MIN_OVERLAP = 0.80
MAX_TRIES = 8


class Scheme(Protocol):
    """One way to do the operation."""

    name: str

    def prepare(self) -> Any:
        """Called in each measuring thread before it starts; the result is handed to `loop`."""

    def loop(self, prepared: Any, n: int) -> None:
        """Do the operation n times, with as little around it as possible."""


@attrs.frozen
class Sample:
    """One simultaneous run: nanoseconds per operation of a thread (mean) and operations per second of all of
    them."""

    ns: float
    throughput: float


@attrs.define
class Cell:
    """All samples of one scheme at one number of threads, one per pass (None where no try was valid)."""

    samples: list[Sample | None] = attrs.field(factory=list)
    rejected: int = 0

    def ns(self) -> float | None:
        """Median nanoseconds per operation."""
        return _median(sample.ns for sample in self.samples if sample is not None)


@attrs.define
class Table:
    """What a measurement gave."""

    schemes: list[str]
    threads: list[int]
    cells: dict[tuple[str, int], Cell]

    def scaling(self, scheme: str, n: int) -> list[float]:
        """Throughput with n threads over throughput with one, per pass in which both were valid."""
        pairs = zip(self.cells[scheme, 1].samples, self.cells[scheme, n].samples, strict=True)
        return [
            many.throughput / one.throughput for one, many in pairs if one is not None and many is not None
        ]

    def ratio(self, scheme: str, other: str, n: int) -> list[float]:
        """Throughput of `scheme` over that of `other` at n threads, per pass."""
        pairs = zip(self.cells[scheme, n].samples, self.cells[other, n].samples, strict=True)
        return [a.throughput / b.throughput for a, b in pairs if a is not None and b is not None]


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def allowed_cpus() -> list[int]:
    """The processors this process may use."""
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )


def run_once(scheme: Scheme, nr_threads: int, n: int) -> Sample | None:
    """One simultaneous run of n operations in each of nr_threads pinned threads; None if they did not really
    overlap."""
    cpus = allowed_cpus()
    arrived = [False] * nr_threads
    go = [False]
    spans: list[tuple[int, int, int]] = [(0, 0, 0)] * nr_threads
    errors: list[BaseException] = []

    def body(index: int) -> None:
        try:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {cpus[index % len(cpus)]})
            adopt_thread(f"bench-{index}")
            prepared = scheme.prepare()
            scheme.loop(prepared, max(n // 20, 1))
            arrived[index] = True
            while not go[0]:
                pass
            stolen, t0 = stolen_ns(), time.perf_counter_ns()
            scheme.loop(prepared, n)
            t1 = time.perf_counter_ns()
            spans[index] = (t0, t1, stolen_ns() - stolen)
        except BaseException as error:  # noqa: BLE001  # raised in the caller's thread below
            errors.append(error)
            arrived[index] = True

    threads = [threading.Thread(target=body, args=(i,)) for i in range(nr_threads)]
    for thread in threads:
        thread.start()
    while not all(arrived):
        time.sleep(0.0005)
    go[0] = True
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return judge(spans, n)


def stolen_ns() -> int:
    """How long the calling thread was ready to run and somebody else had its processor, up to now.

    Not the time it slept: a thread that waits for a lock of the scheme pays the scheme's own price.
    """
    try:
        with open(f"/proc/self/task/{threading.get_native_id()}/schedstat", "rb") as stat:
            return int(stat.read().split()[1])
    except (OSError, IndexError):
        # No such statistics in this kernel: whatever was not computing counts as stolen.
        return time.perf_counter_ns() - time.thread_time_ns()


def judge(spans: Sequence[tuple[int, int, int]], n: int) -> Sample | None:
    """The sample that (start, end, stolen time) of each thread make, or None if the run does not count."""
    walls = [t1 - t0 for t0, t1, _stolen in spans]
    if any(stolen > MAX_STOLEN * wall for (_t0, _t1, stolen), wall in zip(spans, walls, strict=True)):
        return None
    overlap = min(t1 for _t0, t1, _stolen in spans) - max(t0 for t0, _t1, _stolen in spans)
    if overlap < MIN_OVERLAP * max(walls):
        return None
    return Sample(ns=statistics.mean(walls) / n, throughput=sum(n / wall * 1e9 for wall in walls))


def calibrate(scheme: Scheme, milliseconds: float) -> int:
    """How many operations take about that long in one thread."""
    n = 20
    while True:
        sample = run_once(scheme, 1, n)
        if sample is None:
            n = min(n * 2, 4000)
            sample = Sample(ns=5000.0, throughput=2e5) if n >= 4000 else None
        if sample is not None:
            if sample.ns * n >= milliseconds * 2e5:
                return max(int(milliseconds * 1e6 / sample.ns), 10)
            n *= 4


def measure(
    schemes: Sequence[Scheme],
    threads: Sequence[int],
    *,
    passes: int = 7,
    milliseconds: float = 8.0,
    progress: Callable[[str], None] = lambda _line: None,
    around: Callable[[Scheme], AbstractContextManager[None]] = lambda _scheme: nullcontext(),
) -> Table:
    """Measure every scheme at every number of threads (1 is always included); passes are the outermost
    loop. Each run of a scheme is inside a block of around(scheme)."""
    counts = sorted({1, *threads})
    table = Table(
        [scheme.name for scheme in schemes],
        counts,
        {(scheme.name, n): Cell() for scheme in schemes for n in counts},
    )
    loops = {}
    for scheme in schemes:
        with around(scheme):
            loops[scheme.name] = calibrate(scheme, milliseconds)
    for number in range(passes):
        for scheme in schemes:
            for n in counts:
                progress(f"pass {number + 1}/{passes}: {scheme.name}, {n} thread{'s' if n > 1 else ''}")
                cell = table.cells[scheme.name, n]
                for _try in range(MAX_TRIES):
                    with around(scheme):
                        sample = run_once(scheme, n, loops[scheme.name])
                    if sample is not None:
                        break
                    cell.rejected += 1
                cell.samples.append(sample)
    return table


def machine() -> dict[str, str]:
    """What a result was measured on; every report begins with it."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    cpu = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "commit": commit or "unknown",
        "python": sys.version.split(" (")[0] + (" free-threaded" if sys.abiflags == "t" else ""),
        "gil": "on" if gil_enabled() else "off",
        "cpus": f"{len(allowed_cpus())} x {cpu}",
    }
