"""`kmodel guards`: the lines of kernel code that can be taken away, and what each is for.

Models:      nothing in Linux
Guards:      none
Invariants:  none
Read next:   core/guards.py
"""

import argparse
import importlib
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from kmodel.core.guards import known_guards
from kmodel.torture import AIMED_AT

ROOMS = ("sync", "rcu", "slab", "fs", "mm", "uprobes", "proc", "torture")


def add_parser(subparsers: Any) -> None:
    """Add `guards` to the command."""
    parser = subparsers.add_parser(
        "guards",
        help="list the guards that can be removed",
        description="List every guard (barrier, recheck, inc-not-zero, wait) that --break can remove, "
        "and what goes wrong without it.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def known() -> dict[str, str]:
    """Every guard of every room."""
    for room in ROOMS:
        importlib.import_module(f"kmodel.{room}")
    return known_guards()


def run(arguments: argparse.Namespace) -> int:
    """Print the list."""
    guards = known()
    if arguments.json:
        print(
            json.dumps(
                {n: {"protects": text, "stress": n in AIMED_AT} for n, text in guards.items()}, indent=2
            )
        )
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("guard", no_wrap=True)
    table.add_column("stress", no_wrap=True)
    table.add_column("without it")
    for name, text in guards.items():
        table.add_row(name, "finds it" if name in AIMED_AT else "", text)
    Console().print(table)
    return 0
