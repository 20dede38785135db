"""`kmodel explore`: look at every interleaving of a scenario, and show the one that breaks it.

Models:      nothing in Linux
Guards:      none
Invariants:  exit status 0 everything was looked at and nothing breaks, 1 something breaks, 2 bad usage, 3 no
             verdict: a bound was hit, or the model cannot be explored as it is
Read next:   explore/api.py, hazards/catalogue.py
"""

import argparse
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kmodel
from kmodel.cli.guards import known
from kmodel.cli.progress import ProgressLine, Stopper, duration
from kmodel.core.guards import without
from kmodel.core.report import log
from kmodel.explore import Result, Verdict
from kmodel.explore.html import write_page
from kmodel.explore.tracefile import Trace, trace_text, write_trace
from kmodel.explore.words import violation_name
from kmodel.hazards import CatalogueError, Scenario, load_scenario, scenarios
from kmodel.torture import BadUsage, check_writable

__all__ = [
    "EXIT",
    "add_parser",
    "check_output",
    "explained",
    "find",
    "positive",
    "quiet",
    "run",
    "seconds",
    "write_outputs",
]

EXIT: Mapping[Verdict, int] = {
    Verdict.PASS: 0,
    Verdict.FAIL: 1,
    Verdict.BOUNDED: 3,
    Verdict.INCONCLUSIVE: 3,
}

EPILOG = """\
what to explore:
  NAME                 a scenario of the catalogue (--list), or the hazard it shows, such as H10
  FILE.py:FUNCTION     a function that returns a kmodel.hazards.Scenario, or a dict of what explore() takes:
                       {"setup": make_state, "threads": [a, b], "final": check}

exit status: 0 PASS, everything was looked at and nothing breaks; 1 FAIL, with the execution that breaks it;
2 bad usage; 3 BOUNDED, nothing breaks but a bound kept something from being looked at, or INCONCLUSIVE, the
model cannot be explored as it is (the reason is printed). Ctrl-C ends a search with what it found so far.
"""


def add_parser(subparsers: Any) -> None:
    """Add `explore` to the command."""
    parser = subparsers.add_parser(
        "explore",
        help="look at every interleaving of a scenario",
        description="Run a scenario in every way it can happen, under the kernel's memory model, and "
        "print the execution that breaks it, if there is one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", nargs="?", metavar="NAME|FILE.py:FUNCTION", help="what to explore")
    parser.add_argument("--list", action="store_true", help="list the catalogue of scenarios")
    parser.add_argument(
        "--broken",
        "--without-guard",
        action="store_true",
        help="the scenario's broken twin: without the guard it is about",
    )
    parser.add_argument(
        "--break",
        dest="removed",
        action="append",
        default=[],
        metavar="GUARD",
        help="remove this guard of the model (repeatable; kmodel guards lists them)",
    )
    parser.add_argument(
        "--memory", choices=("sc", "tso", "lkmm"), help="memory model (default: the scenario's)"
    )
    parser.add_argument("--strategy", metavar="NAME", help="how to search (default: dpor, which exhausts)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of a random strategy")
    parser.add_argument(
        "--preemptions", type=_count, metavar="N", help="only executions with at most N forced switches"
    )
    parser.add_argument("--max-executions", type=positive, metavar="N", help="stop after so many")
    parser.add_argument("--seconds", type=seconds, metavar="S", help="stop after so long")
    parser.add_argument("--html", metavar="FILE", help="write the execution that breaks it there, as a page")
    parser.add_argument(
        "--json", metavar="FILE", help="... and there for kmodel replay ('-' for standard output)"
    )
    parser.set_defaults(run=run)


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    value = _count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def seconds(text: str) -> float:
    """A time, for argparse."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Explore and report; the exit status."""
    if arguments.list:
        return print_list()
    if arguments.target is None:
        raise BadUsage("name a scenario or FILE.py:FUNCTION; --list shows the catalogue")
    out = sys.stderr if arguments.json == "-" else sys.stdout
    scenario = find(arguments.target)
    if arguments.broken and not scenario.can_break:
        raise BadUsage(f"{scenario.name} has no broken twin; --break GUARD removes a guard by name")
    for name in arguments.removed:
        if name not in known():
            raise BadUsage(f"--break {name}: no such guard; kmodel guards lists them")
    for option, path in (("--html", arguments.html), ("--json", arguments.json)):
        check_output(option, path)

    removed = scenario.removed(broken=arguments.broken) + tuple(arguments.removed)
    print(head(scenario, arguments, removed), file=out, flush=True)
    began = time.monotonic()
    result = explore(scenario, arguments)
    took = time.monotonic() - began
    print("\n".join(summary(result, took)), file=out)
    trace = result.trace
    if trace is not None:
        trace.update(_origin(scenario, arguments, removed))
        print(f"\n{result.timeline()}", file=out)
    print("\n".join(closing(scenario, arguments, result, trace)), file=out, flush=True)
    return EXIT[result.verdict]


def find(target: str) -> Scenario:
    """The scenario, or BadUsage."""
    try:
        return load_scenario(target)
    except CatalogueError as error:
        raise BadUsage(str(error)) from error


def check_output(option: str, path: str | None) -> None:
    """BadUsage now rather than an error after a long search."""
    if path is None or path == "-":
        return
    try:
        check_writable(path)
    except OSError as error:
        raise BadUsage(f"{option} {path}: {error.strerror or error}") from error


def explore(scenario: Scenario, arguments: argparse.Namespace) -> Result:
    """Run the search with progress shown; Ctrl-C ends it early."""
    given = {
        "memory": arguments.memory,
        "strategy": arguments.strategy,
        "seed": arguments.seed,
        "preemptions": arguments.preemptions,
        "max_executions": arguments.max_executions,
        "max_seconds": arguments.seconds,
    }
    options = {name: value for name, value in given.items() if value is not None}
    stopper = Stopper()
    line = ProgressLine(stopper)
    try:
        with explained(arguments.target), stopper.listening(), quiet(), without(*arguments.removed):
            return scenario.explore(broken=arguments.broken, progress=line, **options)
    finally:
        line.clear()


@contextmanager
def explained(target: str) -> Iterator[None]:
    """Make a line of what setup() raises, or explore() about an option; tasks and final() have verdicts."""
    try:
        yield
    except BadUsage:
        raise
    except Exception as error:
        where = innermost(error)
        if isinstance(error, ValueError) and not where:
            raise BadUsage(" ".join(str(error).split())) from error
        if not where:
            traceback.print_exception(error)  # the explorer's own fault
        raise BadUsage(f"{target} cannot be explored: {one_line(error)}{where}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines of the model inside: a WARN is a violation here, and reported as one."""
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)


# ------------------------------------------------------------------------------------------------- in words


def head(scenario: Scenario, arguments: argparse.Namespace, removed: tuple[str, ...]) -> str:
    """What is about to be explored."""
    hazards = f" ({', '.join(scenario.hazards)})" if scenario.hazards else ""
    text = f"{scenario.name}{hazards}"
    if scenario.summary:
        text += f": {scenario.summary}"
    memory = arguments.memory or scenario.memory
    text += f"\nmemory model {memory}"
    if removed:
        text += f", without {', '.join(removed)}"
    elif arguments.broken:
        text += ", the broken twin"
    return text


def summary(result: Result, took: float) -> list[str]:
    """The verdict and what it rests on."""
    n = f"{result.executions:,} execution{'s' * (result.executions != 1)}"
    rate = f", {result.executions / took:,.0f}/s" if took > 0 and result.executions > 100 else ""
    effort = f"{n} in {duration(took)}{rate}"
    if result.blocked:
        effort += f" (and {result.blocked:,} cut short as redundant)"
    if result.verdict is Verdict.PASS:
        return [f"PASS: nothing breaks, and everything was looked at: {effort}"]
    if result.verdict is Verdict.BOUNDED:
        return [
            f"BOUNDED: nothing breaks so far, but not everything was looked at ({result.reason}): {effort}"
        ]
    if result.verdict is Verdict.INCONCLUSIVE:
        return [f"INCONCLUSIVE: {result.reason}", effort]
    assert result.violation is not None
    where = innermost(result.violation.error)
    return [
        f"FAIL: {violation_name(result.violation.kind)}: {result.violation.message}{where}",
        f"found by {effort}",
    ]


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def innermost(error: BaseException | None) -> str:
    """Where an exception came from in the scenario's or the model's code: " (FILE:LINE in FUNCTION)"."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    package = Path(kmodel.__file__).parent
    ours = [package / room for room in ("core", "explore", "hazards/catalogue.py", "cli")]
    for frame in reversed(frames):
        path = Path(frame.filename)
        if not any(path.is_relative_to(part) for part in ours):
            base = package.parent if path.is_relative_to(package) else Path.cwd()
            return f" ({os.path.relpath(path, base)}:{frame.lineno} in {frame.name})"
    return ""


def closing(
    scenario: Scenario, arguments: argparse.Namespace, result: Result, trace: Trace | None
) -> list[str]:
    """What was written, and whether the scenario did as it should."""
    lines = [""]
    if trace is not None:
        lines += write_outputs(trace, html=arguments.html, json=arguments.json)
        if not arguments.html and not arguments.json:
            lines.append("to see it in a browser: --html FILE; to keep it: --json FILE")
    elif arguments.html or arguments.json:
        lines.append("no execution that breaks anything was found, so none was written")
    if not arguments.removed:
        expected = scenario.expected_broken if arguments.broken else scenario.expected
        kind = result.violation.kind if result.violation is not None else ""
        wanted = scenario.breaks if arguments.broken and expected is Verdict.FAIL else ""
        if expected is not None and (result.verdict is not expected or (wanted and kind != wanted)):
            says = f"the catalogue says {expected.value}{f' ({wanted})' if wanted else ''}"
            other_model = arguments.memory not in (None, scenario.memory)
            lines.append(f"{says} of {scenario.memory}" if other_model else f"NOT AS EXPECTED: {says}")
    return lines if len(lines) > 1 else []


def write_outputs(trace: Trace, *, html: str | None, json: str | None) -> list[str]:
    """Write the trace where it was asked for; lines that say so."""
    lines = []
    replay = json if json and json != "-" else html
    try:
        if json == "-":
            print(trace_text(trace), end="")
        elif json is not None:
            write_trace(json, trace)
            lines.append(f"written: {json}")
        if html is not None:
            write_page(html, trace, replay=f"kmodel replay {shlex.quote(replay or html)}")
            lines.append(f"written: {html}")
    except OSError as error:
        raise BadUsage(f"{error.filename or html or json}: {error.strerror or error}") from error
    if replay is not None:
        lines.append(f"again: kmodel replay {shlex.quote(replay)}")
    return lines


def _origin(scenario: Scenario, arguments: argparse.Namespace, removed: tuple[str, ...]) -> Any:
    """What the trace is to say about where it comes from."""
    origin: dict[str, Any] = {"scenario": scenario.name, "target": arguments.target}
    if scenario.summary:
        origin["summary"] = scenario.summary
    if arguments.broken:
        origin["broken"] = True
    if removed:
        origin["removed_guards"] = list(removed)
    return origin


def print_list() -> int:
    """The catalogue, a line each: name, hazards, what happens without the guard."""
    known_ones = scenarios().values()
    width = max((len(scenario.name) for scenario in known_ones), default=0)
    hazards = max((len(" ".join(scenario.hazards)) for scenario in known_ones), default=0)
    for scenario in known_ones:
        print(f"{scenario.name:{width}}  {' '.join(scenario.hazards):{hazards}}  {scenario.summary}".rstrip())
    return 0
