"""`kmodel stress`: a real process's address space, probed, remapped and looked up by many threads at once.

Models:      nothing in Linux; the command is to this model what rcutorture is to RCU
Guards:      none
Invariants:  exit status 0 clean, 1 a violation (or hard paths not met), 2 bad usage
Read next:   torture/run.py
"""

import argparse
import os
import secrets
import sys
import time
from typing import Any

from kmodel.cli.guards import known
from kmodel.cli.view import WORK, open_view
from kmodel.core import gil_enabled, gil_was_reenabled
from kmodel.explore.tracefile import write_text
from kmodel.torture import (
    AIMED_AT,
    HARD_PATHS,
    SHORT_RUN_SECONDS,
    BadUsage,
    Config,
    Report,
    Torture,
    check_writable,
    default_threads,
)

__all__ = ["BadUsage", "add_parser", "run"]

POLL_SECONDS = 0.1
SHOWN_VIOLATIONS = 3

EPILOG = """\
probes:
  PATH:SYMBOL            a function, e.g. /lib/x86_64-linux-gnu/libc.so.6:fopen (SYMBOL+0x4 works too)
  PATH:0xOFFSET          a byte offset in the file
  'p:NAME PATH:0xOFFSET' a line as written to tracefs's uprobe_events

exit status: 0 clean, 1 a violation or a hard path that was never met, 2 bad usage.
A seed repeats every decision of the tasks and the choice of probes; how the system schedules the threads it
does not repeat.
"""


def add_parser(subparsers: Any) -> None:
    """Add `stress` to the command."""
    parser = subparsers.add_parser(
        "stress",
        help="torture the model on real threads",
        description="Load a process's address space, put uprobes on functions of its files, and let "
        "threads hit them while others replace mappings, recycle files and VMAs, register and unregister. "
        "An oracle checks every answer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--pid", type=_positive, metavar="PID", help="load this process's maps (default: its own)"
    )
    source.add_argument("--maps", metavar="FILE", help="load a saved copy of /proc/PID/maps")
    parser.add_argument(
        "--probe", action="append", default=[], metavar="SPEC", help="probe this place too (repeatable)"
    )
    parser.add_argument(
        "--threads", type=_threads, metavar="N", help=f"OS threads (default here: {default_threads()})"
    )
    parser.add_argument("--seconds", type=_seconds, default=10.0, metavar="S", help="how long (default: 10)")
    parser.add_argument(
        "--seed", type=_seed, metavar="N", help="repeat the decisions of a run (default: random)"
    )
    parser.add_argument(
        "--break",
        dest="broken",
        action="append",
        default=[],
        metavar="NAME",
        help="remove a guard of the model and see the oracle find out (repeatable; 'list' names them)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there ('-' for standard output)")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _integer(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _threads(text: str) -> int:
    value = _integer(text)
    if not 2 <= value <= 512:
        raise argparse.ArgumentTypeError(f"{text}: from 2 to 512 threads")
    return value


def _seed(text: str) -> int:
    value = _integer(text)
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text}: a seed is a number from 0 to 2^64-1")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < value <= 7 * 86400:
        raise argparse.ArgumentTypeError(f"{text}: between 0 and 604800 (a week)")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Run the stress and print its report; the exit status."""
    if "list" in arguments.broken:
        for name, text in known().items():
            print(f"{name:32} {text}{'' if name in AIMED_AT else '  [stress does not aim at it]'}")
        return 0
    out = sys.stderr if arguments.json == "-" else sys.stdout
    check_interpreter(out)
    for name in arguments.broken:
        if name not in known():
            raise BadUsage(f"--break {name}: no such guard; --break list names them")
    if arguments.json not in (None, "-"):
        try:
            check_writable(arguments.json)
        except OSError as error:
            raise BadUsage(f"--json {arguments.json}: {error.strerror or error}") from error

    config = Config(
        seed=arguments.seed if arguments.seed is not None else secrets.randbits(32),
        threads=arguments.threads or default_threads(),
        seconds=arguments.seconds,
        pid=arguments.pid,
        maps=arguments.maps,
        probes=tuple(arguments.probe),
        removed_guards=tuple(arguments.broken),
    )
    torture = Torture(config)
    report = drive(torture, out)
    for line in summary(report, torture):
        print(line, file=out)
    out.flush()
    if arguments.json == "-":
        print(report.as_json(), end="")
    elif arguments.json is not None:
        write_text(arguments.json, report.as_json())
    return report.exit_status


def check_interpreter(out: Any) -> None:
    """Say what this interpreter can do; BadUsage if it was made to do less than it could."""
    if gil_was_reenabled():
        raise BadUsage(
            "this free-threaded Python runs with its GIL switched on (PYTHON_GIL=1, -X gil=1 or an extension "
            "module that needs it): unset that"
        )
    if gil_enabled():
        print("note: this Python has a GIL, so threads take turns instead of running in parallel", file=out)


def drive(torture: Torture, out: Any) -> Report:
    """Prepare, run with progress shown, and finish; Ctrl-C finishes early."""
    interrupted = False
    try:
        torture.prepare()
        seed = torture.config.seed
        print(
            f"seed {seed}: repeats every decision of the tasks, not how the system schedules them", file=out
        )
        for line in torture.describe():
            print(line, file=out)
        with open_view(out) as view:
            torture.start()
            while torture.running():
                time.sleep(POLL_SECONDS)
                view.show(torture.poll())
    except KeyboardInterrupt:
        if not torture.started:
            raise
        interrupted = True
    return torture.finish(interrupted=interrupted)


def summary(report: Report, torture: Torture) -> list[str]:
    """The report as lines for people."""
    counts = report.counts
    took = max(report.elapsed, 1e-9)
    lines = [
        f"{'interrupted after' if report.interrupted else 'ran'} {report.elapsed:.1f} s on {report.threads} "
        f"threads ({os.cpu_count()} processors{'' if report.parallel else ', taking turns under the GIL'})",
        "",
    ]
    for name, text in WORK.items():
        lines.append(f"  {text:52} {counts.get(name, 0):>12,}  {counts.get(name, 0) / took:>10,.0f}/s")
    lines += ["", "hard paths met:"]
    for name, text in HARD_PATHS.items():
        count = counts.get(name, 0)
        lines.append(f"  {text:52} {count:>12,}{'' if count else '  NOT MET'}")
    if report.ledger:
        lines += ["", "left over at the end (all must be 0):"]
        lines += [f"  {text:52} {count:>12,}" for text, count in report.ledger.items()]
    lines.append("")
    for violation in report.violations[:SHOWN_VIOLATIONS]:
        lines += violation.lines()
        lines.append("")
    more = len(report.violations) - SHOWN_VIOLATIONS + report.violations_not_shown
    if more > 0:
        lines += [f"... and {more} more violations", ""]
    lines += [verdict_line(report), f"again: {torture.again()}"]
    return lines


def verdict_line(report: Report) -> str:
    """The last word."""
    if report.verdict == "violation":
        broken = f" without {', '.join(report.removed_guards)}" if report.removed_guards else ""
        first = report.violations[0]
        return f"VIOLATION{broken}: {first.property}, found after {first.after:.2f} s"
    if report.verdict == "incomplete":
        names = "; ".join(HARD_PATHS[name] for name in report.not_met)
        return f"INCOMPLETE: nothing was wrong, but this never happened: {names}"
    suffix = ""
    if report.not_met:
        suffix = (
            f" as far as it went (interrupted or under {SHORT_RUN_SECONDS:g} s: not every hard path was met)"
        )
    if report.removed_guards:
        return f"NOTHING FOUND without {', '.join(report.removed_guards)}{suffix}"
    return f"CLEAN{suffix}"
