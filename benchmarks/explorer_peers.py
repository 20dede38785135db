"""One case, explored by one of three tools: what benchmarks/explorer.py runs in a process of its own.

    PYTHON benchmarks/explorer_peers.py TOOL CASE SECONDS      TOOL: kmodel, frontrun, interleave-test

A case has the same tasks, accesses and locks in each tool. frontrun and interleave-test have no atomics: a
read-modify-write is a load and a store under a lock, for kmodel as well. Each access stands on a line of its
own, for interleave-test switches at lines here (at opcodes it has more to do). No bound on preemptions; no
case fails, so that whole searches are timed. interleave-test's has no reduction: it ends after SCHEDULES of
them. The search is repeated until SECONDS of processor time are gone.

Prints one line of JSON: executions that ran to their end, searches, seconds of processor and wall time.
This file runs in other interpreters than kmodel's: only kmodel's runs import kmodel.
"""

import argparse
import importlib
import importlib.metadata
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOOLS = {"kmodel": "kmodel", "frontrun": "frontrun", "interleave-test": "interleave_test"}
"""A tool's name, by which pip installs it, and its module's."""

SCHEDULES = 200

CASES = {"lost-update": ("bump", "bump", "bump"), "refcount": ("put", "get_not_zero", "get_not_zero")}


class Plain:
    """The state of both cases as the other tools see it, and its tasks."""

    def __init__(self) -> None:
        self.x = 0
        self.lock = threading.Lock()
        self.ref = 1
        self.slot: int | None = 1
        self.freed = 0

    def bump(self) -> None:
        """One part of a lost update."""
        seen = self.x
        self.x = seen + 1

    def put(self) -> None:
        """Drop the reference; the last one frees."""
        with self.lock:
            left = self.ref - 1
            self.ref = left
        if left == 0:
            self.slot = None
            self.freed = 1

    def get_not_zero(self) -> None:
        """Take a reference unless there is none."""
        if self.slot is None:
            return
        with self.lock:
            ref = self.ref
            if ref:
                self.ref = ref + 1
        if ref:
            assert not self.freed, "used after it was freed"


def kmodel_search(case: str) -> int:
    """Executions of one whole search by kmodel, under sc: the others know no other memory model."""
    core, explore = importlib.import_module("kmodel.core"), importlib.import_module("kmodel.explore")
    sync = importlib.import_module("kmodel.sync")
    read, write = core.READ_ONCE, core.WRITE_ONCE

    def bump(v: Any) -> None:
        seen = read(v, "x")
        write(v, "x", seen + 1)

    def put(v: Any) -> None:
        sync.spin_lock(v.lock)
        left = read(v, "ref") - 1
        write(v, "ref", left)
        sync.spin_unlock(v.lock)
        if left == 0:
            write(v, "slot", None)
            write(v, "freed", 1)

    def get_not_zero(v: Any) -> None:
        if read(v, "slot") is None:
            return
        sync.spin_lock(v.lock)
        ref = read(v, "ref")
        if ref:
            write(v, "ref", ref + 1)
        sync.spin_unlock(v.lock)
        if ref:
            assert not read(v, "freed"), "used after it was freed"

    def setup() -> Any:
        return core.variables(x=0, lock=sync.SpinLock(), ref=1, slot=1, freed=0)

    tasks = {"bump": bump, "put": put, "get_not_zero": get_not_zero}
    result = explore.explore(setup, *[tasks[name] for name in CASES[case]], memory="sc")
    assert result.passed, result
    return int(result.executions)


def frontrun_search(case: str) -> int:
    """Executions of one whole search by frontrun (DPOR)."""
    workers = [getattr(Plain, name) for name in CASES[case]]
    result = importlib.import_module("frontrun").explore(
        Plain, workers, lambda _state: True, preemption_bound=None, detect_io=False
    )
    assert result.property_holds, result
    return int(result.num_explored)


def interleave_search(case: str) -> int:
    """Schedules of a search of SCHEDULES by interleave-test (depth first, at lines)."""
    tool = importlib.import_module("interleave_test")

    def model() -> None:
        state = Plain()
        tasks = [tool.spawn(getattr(state, name)) for name in CASES[case]]
        for task in tasks:
            task.join()

    result = tool.explore(
        model, iterations=SCHEDULES, strategy="dfs", granularity="line", max_preemptions=1_000_000
    )
    assert result.failure is None, result
    return int(result.schedules_run)


SEARCHES: dict[str, Callable[[str], int]] = {
    "kmodel": kmodel_search,
    "frontrun": frontrun_search,
    "interleave-test": interleave_search,
}


def main(arguments: list[str] | None = None) -> int:
    """Search again and again for SECONDS; print the counts."""
    parser = argparse.ArgumentParser(prog="explorer_peers.py", description=__doc__.split("\n")[0])
    parser.add_argument("tool", choices=SEARCHES)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("seconds", type=float)
    options = parser.parse_args(arguments)
    search = SEARCHES[options.tool]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    search(options.case)  # warms up
    executions = searches = 0
    cpu, wall = time.process_time(), time.perf_counter()
    while time.process_time() - cpu < options.seconds:
        executions += search(options.case)
        searches += 1
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(json.dumps({"executions": executions, "searches": searches, "cpu": cpu, "wall": wall}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
