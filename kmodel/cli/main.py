"""The `kmodel` command: picks the subcommand, and answers for what any of them may run into.

Models:      nothing in Linux
Guards:      none
Invariants:  exit status 0 means clean, 1 a violation, 2 bad usage, 130 given up by a second Ctrl-C
Leaves out:  the subcommands; each is a module with `add_parser(subparsers)`, whose parser's default `run` is
             called
Read next:   cli/stress.py
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import kmodel

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = Parser(
        prog="kmodel",
        description="The Linux kernel's lockless uprobe lookup and per-VMA locking, to run and to break.",
    )
    parser.add_argument("--version", action="version", version=f"kmodel {kmodel.__version__}")
    subparsers: Any = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    from kmodel.cli import explore, guards, litmus, maps, replay, stress

    for command in (stress, explore, replay, litmus, maps, guards):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status. What no subcommand expects shows its traceback."""
    try:
        status = answer(argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone. Nothing more may be written, not even by the
        # interpreter's flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INTERRUPTED


def answer(argv: Sequence[str] | None) -> int:
    """The exit status of what was asked for. The rooms are imported here, where Ctrl-C is expected."""
    from kmodel.torture import BadUsage

    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except BadUsage as error:
        print(f"kmodel {arguments.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
