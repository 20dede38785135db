"""The table of docs/hazards.md: `python -m kmodel.hazards.table [NAME...] [--seconds S]`.

Models:      nothing in Linux
Guards:      none
Invariants:  every number in that table was printed by this
Read next:   docs/hazards.md
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from kmodel.core.report import log
from kmodel.explore import Result, Verdict
from kmodel.hazards.catalogue import Scenario, find_scenario, scenarios

HEAD = (
    "| hazard | scenario | without | memory | with the guard | executions | s "
    "| without it | executions | s |\n"
    "|---|---|---|---|---|---:|---:|---|---:|---:|"
)


def timed(scenario: Scenario, *, broken: bool, **options: Any) -> tuple[Result, float]:
    """One exploration and its seconds."""
    began = time.monotonic()
    result = scenario.explore(broken=broken, **options)
    return result, time.monotonic() - began


def outcome(result: Result) -> str:
    """PASS, or FAIL and the kind of violation, or BOUNDED."""
    if result.violation is not None:
        return f"{result.verdict.value} ({result.violation.kind})"
    return result.verdict.value


def row(scenario: Scenario, **options: Any) -> tuple[str, bool]:
    """A line of the table, and whether both explorations said what the catalogue expects of them."""
    kept, took = timed(scenario, broken=False, **options)
    broken, took_broken = timed(scenario, broken=True, **options)
    cells = (
        " ".join(scenario.hazards),
        f"`{scenario.name}`",
        " ".join(f"`{guard}`" for guard in scenario.without) or "(a line of the scenario)",
        scenario.memory,
        outcome(kept),
        f"{kept.executions:,}",
        f"{took:.1f}",
        outcome(broken),
        f"{broken.executions:,}",
        f"{took_broken:.1f}",
    )
    good = kept.verdict is scenario.expected and broken.verdict is scenario.expected_broken
    if good and broken.verdict is Verdict.FAIL and scenario.breaks:
        good = broken.violation is not None and broken.violation.kind == scenario.breaks
    return f"| {' | '.join(cells)} |", good


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a scenario did not do what the catalogue says."""
    parser = argparse.ArgumentParser(
        prog="python -m kmodel.hazards.table", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument(
        "--whole",
        type=float,
        metavar="S",
        help="drop the bounds that scenarios have, but stop each exploration after S seconds",
    )
    given = parser.parse_args(arguments)
    log.setLevel(logging.CRITICAL + 1)
    options: dict[str, Any] = {}
    if given.whole is not None:
        options = {"max_executions": sys.maxsize, "max_seconds": given.whole}
    chosen = [find_scenario(name) for name in given.names] or list(scenarios().values())
    print(HEAD)
    bad = []
    for scenario in chosen:
        if scenario.can_break:
            line, good = row(scenario, **options)
            print(line, flush=True)
            if not good:
                bad.append(scenario.name)
    if bad and given.whole is None:
        print(f"not as the catalogue says: {', '.join(bad)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
