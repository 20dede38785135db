"""What the explorer reaches: executions, rates, the litmus set, and two other Python tools on the same cases.

    python -m benchmarks.explorer                      everything (a minute on an idle machine)
    python -m benchmarks.explorer --quick              without the 14400 executions of five tasks
    python -m benchmarks.explorer --only-tools         only kmodel beside frontrun and interleave-test
    python -m benchmarks.explorer --tools-python PATH  the interpreter that has those two (default: this one)
    python -m benchmarks.explorer --json FILE          the figures as JSON too

Rates are executions per second of processor time, so that a busy machine does not spoil them; wall time
stands beside. The other tools run in processes of their own, in turn with kmodel on the same interpreter
(benchmarks/explorer_peers.py has the cases); where they are not installed, the table says so. kmodel does not
depend on them; a virtual environment of a build with a GIL that has both:

    python3.13 -m venv peers && peers/bin/pip install frontrun interleave-test
    python -m benchmarks.explorer --tools-python peers/bin/python
"""

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.explorer_peers import CASES, TOOLS
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

PEERS = Path(__file__).with_name("explorer_peers.py")


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
        what = f"{result.executions}{'' if exact else ' NOT EXACT'}"
        say(f"lost update, {n} tasks: executions", what, f"{cpu:,.0f}/s")
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
    say("refcount 0 to 1: found by execution", found)
    total = fixed.executions + fixed.blocked
    say("  repaired: exhausted in", total)
    for memory in ("sc", "tso", "lkmm"):
        tasks = [put, *[get_not_zero] * 4]
        result, cpu, wall = best(lambda m=memory, t=tasks: explore(counted, *t, memory=m))  # type: ignore[misc]
        count = f"{result.executions}+{result.blocked}"
        say(
            f"  1 put + 4 get, {memory}: executions/s",
            f"{cpu:,.0f}",
            f"{wall:,.0f} wall",
            count,
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


def tool_version(python: str, tool: str) -> str | None:
    """The version of `tool` that `python` can import, None if there is none."""
    ask = f"import importlib.metadata as m, {TOOLS[tool]}; print(m.version({tool!r}))"
    answer = subprocess.run([python, "-c", ask], check=False, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def one_tool(python: str, tool: str, case: str, seconds: float) -> dict[str, Any]:
    """What explorer_peers.py says. frontrun needs its own starter. Raises CalledProcessError."""
    command = [python, str(PEERS), tool, case, str(seconds)]
    if tool == "frontrun":
        command = [python, "-m", "frontrun.cli", *command]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return figures


def tools(figures: dict[str, Any], python: str, seconds: float, passes: int = 5) -> None:
    """kmodel and the other tools in turn, pass by pass, on one interpreter; ratios formed within a pass."""
    versions = {tool: tool_version(python, tool) for tool in TOOLS if tool != "kmodel"}
    ask = "import sys, platform as p; print(p.python_version(), getattr(sys, '_is_gil_enabled', bool)())"
    answer = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.split()
    gil = "free-threaded" if answer[1] == "False" else "with a GIL"
    print(f"\nthe same cases, each tool in a process of its own, CPython {answer[0]} {gil}")
    for tool, version in versions.items():
        if version is None:
            say(f"  {tool}: not run", "not installed", f"pip install {tool}, see --tools-python")
    present = ["kmodel", *(tool for tool, version in versions.items() if version)]
    for case in CASES if len(present) > 1 else ():
        samples: dict[str, list[dict[str, Any]]] = {tool: [] for tool in present}
        for _ in range(passes):
            for tool in present:
                samples[tool].append(one_tool(python, tool, case, seconds))
        rates = {tool: [s["executions"] / s["cpu"] for s in samples[tool]] for tool in present}
        for tool in present:
            ratios = [ours / theirs for ours, theirs in zip(rates["kmodel"], rates[tool], strict=True)]
            ratio = f"kmodel x{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
            each = samples[tool][0]["executions"] // samples[tool][0]["searches"]
            wall = median([s["executions"] / s["wall"] for s in samples[tool]])
            name = f"{tool} {versions.get(tool, '')}".strip()
            say(
                f"  {case}, {name}",
                f"{median(rates[tool]):,.0f}/s",
                f"{wall:,.0f} wall",
                f"{each} a search" + ("" if tool == "kmodel" else f"; {ratio}"),
            )
            figures[f"tools_{case}_{tool}"] = {
                "version": versions.get(tool),
                "rates": rates[tool],
                "ratios": ratios,
                "executions_a_search": each,
            }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explorer", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave out what takes seconds")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--only-tools", action="store_true", help="only the comparison with the other tools")
    parser.add_argument(
        "--tools-python",
        metavar="PATH",
        default=sys.executable,
        help="the interpreter that has frontrun and interleave-test (default: this one)",
    )
    options = parser.parse_args(arguments)
    if shutil.which(options.tools_python) is None:
        parser.error(f"--tools-python: {options.tools_python} is not a program")
    build = "with a GIL" if gil_enabled() else "free-threaded"
    print(f"CPython {platform.python_version()} {build}; rates are per second of processor time\n")
    figures: dict[str, Any] = {"python": sys.version, "gil": gil_enabled()}
    if not options.only_tools:
        lost_updates(figures, options.quick)
        refcount(figures)
        litmus(figures)
    tools(figures, options.tools_python, 0.3 if options.quick else 2.0)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
