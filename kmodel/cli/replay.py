"""`kmodel replay`: run the execution of a saved trace again, and say whether it still breaks in the same way.

Models:      nothing in Linux
Guards:      none
Invariants:  exit status 0 it does not break any more, 1 it breaks, 2 bad usage, 3 the program has changed so
             that the execution cannot be repeated
Read next:   explore/tracefile.py, docs/trace-format.md
"""

import argparse
from typing import Any

from kmodel.cli.explore import EXIT, check_output, explained, find, quiet, write_outputs
from kmodel.cli.guards import known
from kmodel.core.guards import without
from kmodel.explore import Result, Verdict, replay
from kmodel.explore.tracefile import Trace, TraceError, read_trace
from kmodel.explore.words import violation_name
from kmodel.hazards import Scenario
from kmodel.torture import BadUsage

__all__ = ["add_parser", "run"]

EPILOG = """\
FILE is what kmodel explore --json or --html wrote: a page carries its execution inside it. The scenario that
it names is looked up again, with the guards removed that were removed then.

exit status: 0 nothing breaks any more, 1 it breaks (the message says whether as before), 2 bad usage, 3 the
program has changed so that this execution is no longer one of its executions.
"""


def add_parser(subparsers: Any) -> None:
    """Add `replay` to the command."""
    parser = subparsers.add_parser(
        "replay",
        help="run a saved execution again",
        description="Run the execution of a saved trace again, step by step, and print it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="a trace or a page")
    parser.add_argument(
        "--target", metavar="NAME|FILE.py:FUNCTION", help="the scenario, if not the one it names"
    )
    parser.add_argument("--html", metavar="FILE", help="write the execution there, as a page")
    parser.add_argument("--json", metavar="FILE", help="write it there as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Replay and compare; the exit status."""
    try:
        saved = read_trace(arguments.file)
    except OSError as error:
        raise BadUsage(f"{arguments.file}: {error.strerror or error}") from error
    except TraceError as error:
        raise BadUsage(str(error)) from error
    for option, path in (("--html", arguments.html), ("--json", arguments.json)):
        check_output(option, path)
    target = arguments.target or saved.get("target")
    if target is None:
        raise BadUsage(f"{arguments.file} does not name its scenario; say --target NAME or FILE.py:FUNCTION")
    result = again(find(target), saved)
    trace = result.trace
    if trace is not None:
        for key in ("scenario", "target", "summary", "broken", "removed_guards"):
            if key in saved:
                trace[key] = saved[key]
        print(f"{result.timeline()}\n")
    print(verdict(saved, result))
    if trace is not None:
        for line in write_outputs(trace, html=arguments.html, json=arguments.json):
            print(line)
    return EXIT[result.verdict]


def again(scenario: Scenario, saved: Trace) -> Result:
    """The saved execution, run now."""
    removed = tuple(saved.get("removed_guards", ()))
    unknown = [name for name in removed if name not in known()]
    if unknown:
        raise BadUsage(f"the trace was made without the guard {unknown[0]!r}, which there is not any more")
    with explained(scenario.name), quiet(), without(*removed):
        return replay(
            saved,
            scenario.setup,
            *scenario.tasks(broken=saved.get("broken", False)),
            final=scenario.final,
            outcome=scenario.outcome,
        )


def verdict(saved: Trace, result: Result) -> str:
    """What came of it, beside what was saved."""
    if result.verdict is Verdict.INCONCLUSIVE:
        return f"INCONCLUSIVE: this execution cannot be repeated: {result.reason}"
    before, now = saved.get("violation"), result.violation
    if now is None:
        return "nothing breaks any more" if before is not None else "nothing breaks, as before"
    text = f"FAIL: {violation_name(now.kind)}: {now.message}"
    if before is None:
        return f"{text}\n(nothing broke when it was saved)"
    if before["kind"] == now.kind:
        return f"{text}\n(as when it was saved)"
    return f"{text}\n(it was {violation_name(before['kind'])}: {before['message']} when it was saved)"
