"""What a run ends with: a verdict, the counts behind it, and both as text and as JSON.

Models:      nothing in Linux
Guards:      none; made when no task runs any more
Invariants:  V1 "clean" means: no violation, every ledger balances, every hard path was met (or the run was
             short)
Read next:   cli/stress.py, which prints it
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import attrs

from kmodel.torture.oracle import Violation

SHORT_RUN_SECONDS = 5.0
"""A run shorter than this, or interrupted, may end clean without having met every hard path."""

OVERTIME_SECONDS = 20.0
"""A run that is not short goes on for so long at most when a hard path was not met in its time (a busy
machine).
"""

# Counter -> what people call it. Each is a path that a run without it did not test.
HARD_PATHS = {
    "speculation_accepted": "speculations accepted and checked",
    "speculation_retried": "speculations thrown away by the final recheck",
    "file_reused": "struct files freed or reused under a speculation",
    "vma_reused": "VMAs freed or reused under a speculation",
    "uprobe_dying": "dying uprobes found by a lookup",
    "dead_twin": "registrations that met a dead twin in the tree",
    "tree_write_during_descent": "tree writers active during a checked descent",
    "get_refused": "references refused because the uprobe was dying",
}


@attrs.frozen
class Report:
    """The outcome of a run."""

    seed: int
    threads: int
    seconds: float
    elapsed: float
    source: str
    python: str
    parallel: bool
    removed_guards: tuple[str, ...]
    probes: dict[str, int]
    counts: dict[str, int]
    ledger: dict[str, int]
    violations: tuple[Violation, ...]
    violations_not_shown: int = 0
    interrupted: bool = False

    @property
    def hard_paths(self) -> dict[str, int]:
        """How often each hard path was met."""
        return {name: self.counts.get(name, 0) for name in HARD_PATHS}

    @property
    def not_met(self) -> list[str]:
        """The hard paths that were never met."""
        return [name for name, count in self.hard_paths.items() if not count]

    @property
    def short(self) -> bool:
        """Whether the run was too short for its hard paths to be demanded."""
        return self.interrupted or self.elapsed < SHORT_RUN_SECONDS

    @property
    def verdict(self) -> str:
        """ "clean", "violation", or "incomplete" if nothing was wrong but hard paths were not met."""
        if self.violations:
            return "violation"
        return "incomplete" if self.not_met and not self.short else "clean"

    @property
    def exit_status(self) -> int:
        """0 for clean, else 1."""
        return 0 if self.verdict == "clean" else 1

    def as_json(self) -> str:
        """The whole report for machines."""
        content: dict[str, Any] = {
            "verdict": self.verdict,
            **attrs.asdict(self),
            "hard_paths": self.hard_paths,
            "hard_paths_not_met": self.not_met,
        }
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def check_writable(path: str) -> None:
    """Raise OSError now if a file could not be written there later. A device or a pipe always can."""
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    if target.exists() and not target.is_file():
        return
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".kmodel-")
    os.close(descriptor)
    os.unlink(name)
