"""What the explorer reaches: executions, rates, and the litmus set, beside the two Python tools that were
measured.

    python -m benchmarks.explorer              everything (a minute on an idle machine)
    python -m benchmarks.explorer --quick      without the 14400 executions of five tasks
    python -m benchmarks.explorer --json FILE  the figures as JSON too

Rates are executions per second of processor time, so that a busy machine does not spoil them; wall time
stands beside. The other tools' figures are constants: frontrun 0.7.0 and interleave-test 0.1, on CPython
3.13.0 and the same class of machine.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    atomic_dec_and_test,
    atomic_inc,
    atomic_inc_not_zero,
    gil_enabled,
    variables,
)
from kmodel.explore import Result, Verdict, explore
from kmodel.explore.litmus import judge, read_litmus

LITMUS = Path(__file__).parent.parent / "tests" / "data" / "litmus.json.gz"

FRONTRUN_RATE = 147.0
INTERLEAVE_RATE = 990.0
FRONTRUN_LOST_UPDATE = {2: 6, 3: 90}
FRONTRUN_FIXED = 5
INTERLEAVE_FIXED = 14_861


def bump(v: Any) -> None:
    """One half of a lost update."""
    WRITE_ONCE(v, "x", READ_ONCE(v, "x") + 1)


def counted() -> Any:
    """An object with one reference, in a slot."""
    return variables(ref=1, slot=1, freed=0)


def put(v: Any) -> None:
    """Drop the reference; the last one frees."""
    if atomic_dec_and_test(v, "ref"):
        WRITE_ONCE(v, "slot", None)
        WRITE_ONCE(v, "freed", 1)


def get(v: Any) -> None:
    """Take a reference, from zero too."""
    if READ_ONCE(v, "slot"):
        atomic_inc(v, "ref")
        assert not READ_ONCE(v, "freed"), "used after it was freed"


def get_not_zero(v: Any) -> None:
    """Take a reference unless there is none."""
    if READ_ONCE(v, "slot") and atomic_inc_not_zero(v, "ref"):
        assert not READ_ONCE(v, "freed"), "used after it was freed"


def measured(run: Callable[[], Result]) -> tuple[Result, float, float]:
    """The result, and executions per second of processor and of wall time."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    count = result.executions + result.blocked
    return result, count / cpu, count / wall


def best(run: Callable[[], Result], times: int = 5) -> tuple[Result, float, float]:
    """The fastest of several runs, after one to warm up."""
    run()
    return max((measured(run) for _ in range(times)), key=lambda m: m[1])


def say(*columns: object) -> None:
    """A row."""
    widths = (34, 14, 14, 30)
    print("  ".join(str(c).ljust(w) for c, w in zip(columns, widths, strict=False)).rstrip(), flush=True)


def lost_updates(figures: dict[str, Any], quick: bool) -> None:
    """Exactly (n!)^2 executions."""
    for n in (2, 3, 4) if quick else (2, 3, 4, 5):
        result, cpu, _wall = measured(lambda n=n: explore(lambda: variables(x=0), *[bump] * n, memory="sc"))  # type: ignore[misc]
        exact = (result.executions, result.blocked) == (math.factorial(n) ** 2, 0)
        theirs = f"frontrun {FRONTRUN_LOST_UPDATE[n]}" if n in FRONTRUN_LOST_UPDATE else ""
        what = f"{result.executions}{'' if exact else ' NOT EXACT'}"
        say(f"lost update, {n} tasks: executions", what, f"{cpu:,.0f}/s", theirs)
        figures[f"lost_update_{n}"] = {
            "executions": result.executions,
            "blocked": result.blocked,
            "rate": cpu,
        }


def refcount(figures: dict[str, Any]) -> None:
    """The 0 to 1 race and its repair."""
    broken = explore(counted, put, get, memory="sc")
    fixed = explore(counted, put, get_not_zero, memory="sc")
    found = broken.executions if broken.verdict is Verdict.FAIL else None
    say("refcount 0 to 1: found by execution", found, "", "frontrun 3, interleave-test 1 to 34")
    total = fixed.executions + fixed.blocked
    say(
        "  repaired: exhausted in",
        total,
        "",
        f"frontrun {FRONTRUN_FIXED}, interleave-test {INTERLEAVE_FIXED}",
    )
    for memory in ("sc", "tso", "lkmm"):
        tasks = [put, *[get_not_zero] * 4]
        result, cpu, wall = best(lambda m=memory, t=tasks: explore(counted, *t, memory=m))  # type: ignore[misc]
        ratio = f"x{cpu / FRONTRUN_RATE:.0f} frontrun, x{cpu / INTERLEAVE_RATE:.1f} interleave-test"
        count = f"{result.executions}+{result.blocked}"
        say(
            f"  1 put + 4 get, {memory}: executions/s",
            f"{cpu:,.0f}",
            f"{wall:,.0f} wall",
            f"{ratio} ({count})",
        )
        figures[f"refcount_{memory}"] = {"rate": cpu, "wall_rate": wall, "executions": result.executions}
    figures["refcount"] = {"found_by": found, "fixed_executions": total}


def litmus(figures: dict[str, Any]) -> None:
    """All of the oracle's tests."""
    tests = read_litmus(LITMUS)
    cpu, wall = time.process_time(), time.perf_counter()
    judgements = [judge(test, max_executions=200_000) for test in tests]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    wrong = [j.name for j in judgements if j.forbidden or j.missing]
    bounded = [j.name for j in judgements if j.result.verdict is not Verdict.PASS]
    executions = sum(j.result.executions for j in judgements)
    say(
        "litmus tests that agree with herd7", f"{len(tests) - len(wrong)} of {len(tests)}", f"{cpu:.1f} s cpu"
    )
    say("  executions", f"{executions:,}", f"{wall:.1f} s wall", f"disagree: {', '.join(wrong) or 'none'}")
    figures["litmus"] = {
        "agree": len(tests) - len(wrong),
        "of": len(tests),
        "bounded": len(bounded),
        "executions": executions,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explorer", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave out what takes seconds")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    build = "with a GIL" if gil_enabled() else "free-threaded"
    print(f"CPython {platform.python_version()} {build}; rates are per second of processor time\n")
    figures: dict[str, Any] = {"python": sys.version, "gil": gil_enabled()}
    lost_updates(figures, options.quick)
    refcount(figures)
    litmus(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
