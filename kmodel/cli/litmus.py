"""`kmodel litmus`: run litmus tests and compare the final states seen with those allowed.

Models:      herd7, for the tests of explore/litmus.py
Guards:      none
Invariants:  exit status 0 all agree, 1 a disagreement, 2 bad usage, 3 a bound was hit and nothing disagrees
Read next:   explore/litmus.py
"""

import argparse
import fnmatch
import time
from typing import Any

from kmodel.cli.progress import ProgressLine, Stopper, duration
from kmodel.explore import Result, Verdict
from kmodel.explore.litmus import LitmusError, State, read_litmus, run_litmus, states
from kmodel.torture import BadUsage

__all__ = ["add_parser", "run"]

EXIT_BOUNDED = 3

EPILOG = """\
The file is JSON, plain or gzipped: {"tests": [{"name", "vars", "threads", "allowed"}]};
kmodel/explore/litmus.py says what a thread is made of. "allowed" lists the final states of the kernel's
memory model (lkmm). Under sc or tso fewer states are possible, so only forbidden ones count then. A test
without "allowed" is only run.

exit status: 0 all agree, 1 a forbidden state was seen or an allowed one is missing, 2 bad usage, 3 nothing
disagrees, but a bound kept the search from looking at everything.
"""


def add_parser(subparsers: Any) -> None:
    """Add `litmus` to the command."""
    parser = subparsers.add_parser(
        "litmus",
        help="run litmus tests against the memory model",
        description="Run every execution of each litmus test; compare the final states with those allowed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="the tests (.json or .json.gz)")
    parser.add_argument(
        "--test",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one, with its table ('rcu-*' for several; repeatable)",
    )
    parser.add_argument("--memory", choices=("sc", "tso", "lkmm"), default="lkmm", help="default: lkmm")
    parser.add_argument("--max-executions", type=int, metavar="N", help="per test")
    parser.add_argument("--seconds", type=float, metavar="S", help="per test")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the tests; the exit status."""
    tests = _chosen(arguments)
    bounds = {"max_executions": arguments.max_executions, "max_seconds": arguments.seconds}
    stopper = Stopper()
    began = time.monotonic()
    executions = done = bounded = 0
    wrong = []
    with stopper.listening():
        for test in tests:
            line = ProgressLine(stopper)
            started = time.monotonic()
            try:
                result = run_litmus(test, arguments.memory, **bounds, progress=line)
            except (LitmusError, KeyError, IndexError, TypeError, ValueError) as error:
                raise BadUsage(f"{arguments.file}: test {test.get('name', '?')}: {error!r}") from error
            finally:
                line.clear()
            if (
                result.verdict is Verdict.FAIL
            ):  # a litmus test asserts nothing, so it is the test that is wrong
                raise BadUsage(f"{arguments.file}: test {test.get('name', '?')}: {result.violation}")
            report = Report(test, arguments.memory, result, time.monotonic() - started)
            print(report.line(), flush=True)
            if arguments.test or not report.agrees:
                print("\n".join(f"    {row}" for row in report.table()), flush=True)
            executions += result.executions
            done += 1
            bounded += result.verdict is Verdict.BOUNDED
            if not report.agrees:
                wrong.append(report.name)
            if stopper.asked:
                break
    took = time.monotonic() - began
    print(f"{done} of {len(tests)} tests, {executions:,} executions in {duration(took)}")
    if wrong:
        print(f"DISAGREE: {', '.join(wrong)}")
        return 1
    if bounded or done < len(tests):
        left = " and not all were run" if done < len(tests) else ""
        print(f"NOTHING DISAGREES, but {bounded} of them hit a bound{left}")
        return EXIT_BOUNDED
    print("AGREE")
    return 0


def _chosen(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    try:
        tests = read_litmus(arguments.file)
    except OSError as error:
        raise BadUsage(f"{arguments.file}: {error.strerror or error}") from error
    except LitmusError as error:
        raise BadUsage(str(error)) from error
    for wanted in arguments.test:
        if not any(fnmatch.fnmatchcase(str(test.get("name")), wanted) for test in tests):
            raise BadUsage(f"{arguments.file} has no test {wanted}")
    if arguments.test:
        tests = [t for t in tests if any(fnmatch.fnmatchcase(str(t.get("name")), w) for w in arguments.test)]
    if not tests:
        raise BadUsage(f"{arguments.file} has no tests")
    return tests


class Report:
    """A test's result beside what is allowed."""

    def __init__(self, test: dict[str, Any], memory: str, result: Result, seconds: float) -> None:
        self.name = str(test.get("name", "?"))
        self.memory = memory
        self.result = result
        self.seconds = seconds
        self.seen: set[State] = set(result.outcomes)
        self.allowed: set[State] | None = states(test["allowed"]) if "allowed" in test else None

    @property
    def bounded(self) -> bool:
        """Whether states may be missing because the search was cut short."""
        return self.result.verdict is Verdict.BOUNDED

    @property
    def forbidden(self) -> set[State]:
        """Seen, but not allowed."""
        return set() if self.allowed is None else self.seen - self.allowed

    @property
    def missing(self) -> set[State]:
        """Allowed, but not seen."""
        return set() if self.allowed is None else self.allowed - self.seen

    @property
    def agrees(self) -> bool:
        """Nothing forbidden was seen, and nothing is missing that the model and the bounds let through."""
        if self.forbidden or self.result.verdict is Verdict.INCONCLUSIVE:
            return False
        return not self.missing or self.memory != "lkmm" or self.bounded

    def line(self) -> str:
        """The test in one line."""
        verdict = "agrees" if self.allowed is not None else "ran"
        if not self.agrees:
            verdict = "DISAGREES"
        elif self.bounded:
            verdict = "bounded"
        of = "" if self.allowed is None else f" of {len(self.allowed)}"
        text = f"{verdict:9}  {self.name:16} {len(self.seen & (self.allowed or self.seen))}{of} states"
        if self.forbidden:
            text += f", {len(self.forbidden)} FORBIDDEN"
        if self.missing and not self.bounded and self.memory == "lkmm":
            text += f", {len(self.missing)} MISSING"
        if self.result.verdict is Verdict.INCONCLUSIVE:
            text += f", {self.result.reason}"
        return f"{text}, {self.result.executions:,} executions, {duration(self.seconds)}"

    def table(self) -> list[str]:
        """Every state: whether it was seen, whether it is allowed, and what is wrong with that."""
        everything = sorted(self.seen | (self.allowed or set()))
        if not everything:
            return ["no states"]
        names = sorted({name for state in everything for name, _value in state}, key=_registers_first)
        rows = [[*names, "seen", "allowed", ""]]
        for state in everything:
            values = dict(state)
            rows.append([*(str(values.get(name, "")) for name in names), *self._judge(state)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]

    def _judge(self, state: State) -> tuple[str, str, str]:
        seen = "yes" if state in self.seen else "no"
        if self.allowed is None:
            return seen, "?", ""
        if state in self.forbidden:
            return seen, "no", "<-- FORBIDDEN"
        if state not in self.missing:
            return seen, "yes", ""
        if self.memory != "lkmm":
            return seen, "yes", f"(not under {self.memory})"
        return seen, "yes", "(not reached within the bound)" if self.bounded else "<-- MISSING"


def _registers_first(name: str) -> tuple[bool, str]:
    return (":" not in name, name)
