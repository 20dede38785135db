"""What an exploration found, and which program it was about.

Models:      nothing in Linux
Guards:      none
Invariants:  Q1 the verdict is PASS only if nothing was left out
Read next:   explore/api.py
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from kmodel.explore.events import Verdict, Violation
from kmodel.explore.timeline import render
from kmodel.explore.tracefile import Trace, TraceError, write_trace


def _reference(function: Callable[..., Any] | None) -> dict[str, str] | None:
    """Where a function can be found again."""
    if function is None:
        return None
    module = getattr(function, "__module__", "") or ""
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    return {"module": module, "function": name, "file": os.path.relpath(code.co_filename) if code else ""}


def _load(reference: Any) -> Any:
    if reference is None:
        return None
    module, name, file = reference.get("module", ""), reference.get("function", ""), reference.get("file", "")
    if "<" in name:
        raise TraceError(
            f"the scenario's function {name} lives inside another one: give replay() the setup and "
            "the threads, as explore() had them, or let pytest run its test again with --explore-replay FILE"
        )
    found: Any = sys.modules.get(module)
    if found is None or module == "__main__":
        try:
            found = importlib.import_module(module)
            getattr(found, name.partition(".")[0])
        except (ImportError, AttributeError):
            found = _import_file(file)
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise TraceError(f"the scenario's function {name} is not in {file or module} any more") from None
    return found


def _import_file(file: str) -> Any:
    path = Path(file)
    if not path.is_file():
        raise TraceError(f"the scenario's file {file} is not there")
    spec = importlib.util.spec_from_file_location(f"kmodel_replay_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@attrs.frozen
class Program:
    """What explore() was given."""

    setup: Callable[[], Any]
    threads: tuple[Callable[[Any], Any], ...]
    final: Callable[[Any], Any] | None
    outcome: Callable[[Any], Any] | None
    memory: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """A title."""
        code = (
            getattr(self.setup, "__qualname__", "scenario").replace(".<locals>", "").replace(".<lambda>", "")
        )
        return code.rpartition(".")[0] or code

    def references(self) -> dict[str, Any]:
        """Where its functions can be found again."""
        return {
            "setup": _reference(self.setup),
            "threads": [_reference(t) for t in self.threads],
            "final": _reference(self.final),
            "outcome": _reference(self.outcome),
        }

    @classmethod
    def load(cls, references: Any, memory: str, options: dict[str, Any]) -> "Program":
        """The program that a trace names; TraceError if it cannot be found."""
        if not isinstance(references, dict) or not references.get("setup"):
            raise TraceError(
                "the trace does not say which functions it is about: give replay() setup and threads"
            )
        return cls(
            _load(references["setup"]),
            tuple(_load(t) for t in references["threads"]),
            _load(references.get("final")),
            _load(references.get("outcome")),
            memory,
            options,
        )


class Result:
    """What an exploration found."""

    def __init__(self, program: Program, engine: Any, search: Any, why: str | None) -> None:
        self.program = program
        self.memory: str = program.memory
        self.strategy: str = search.name
        self.seed: int | None = getattr(search, "seed", None)
        self.executions: int = engine.executions
        self.blocked: int = engine.blocked
        self.steps: int = engine.steps
        self.outcomes: set[Any] = engine.outcomes
        self.violation: Violation | None = engine.violation
        self.search_cut: int = search.cut
        self.lock_cycles: list[list[str]] = engine.oracles.lock_cycles()
        """Circles in the order in which locks were taken: a deadlock that no execution looked at may be
        able to reach.
        """
        self.nondeterminism: str | None = engine.nondeterminism
        self.hang: str | None = engine.hang
        self.reason = why
        self.trace: Trace | None = None
        self.preemptions: int | None = None
        self.verdict: Verdict
        self._judge(why)

    def _judge(self, why: str | None) -> None:
        if self.nondeterminism is not None:
            self.verdict, self.reason = Verdict.INCONCLUSIVE, self.nondeterminism
        elif self.hang is not None:
            self.verdict, self.reason = Verdict.INCONCLUSIVE, self.hang
        elif self.violation is not None:
            self.verdict, self.reason = Verdict.FAIL, str(self.violation)
        elif why is not None:
            self.verdict = Verdict.BOUNDED
        else:
            self.verdict = Verdict.PASS

    def shown(self, shown: Any, preemptions: int) -> None:
        """The violating execution ran again, recorded."""
        if shown.engine.nondeterminism is not None:
            self.nondeterminism = shown.engine.nondeterminism
        elif self.violation is not None and shown.violation is None:
            self.nondeterminism = (
                f"an execution that broke something ({self.violation}) did not when it was run again; "
                "the model depends on something that no schedule determines"
            )
        elif shown.violation is not None:
            self.violation = shown.violation
        if self.nondeterminism is not None:
            self._judge(None)
            return
        self._judge(self.reason)
        self.preemptions = shown.preemptions
        facts: dict[str, Any] = {
            "strategy": self.strategy,
            "executions": self.executions,
            "blocked": self.blocked,
        }
        facts["preemptions"] = shown.preemptions
        if self.seed is not None:
            facts["seed"] = self.seed
        trace = shown.recorder.trace(self.program.name, self.verdict.value, facts, self.violation)
        trace["program"] = self.program.references()
        trace["options"] = self.program.options
        self.trace = trace

    @property
    def passed(self) -> bool:
        """Whether everything was looked at and nothing is wrong; see also passed_within()."""
        return self.verdict is Verdict.PASS

    def passed_within(self, *bounds: Verdict) -> bool:
        """passed, or one of the verdicts that the caller allows by name (Verdict.BOUNDED)."""
        return self.passed or self.verdict in bounds

    def timeline(self) -> str:
        """The violating execution, a column per task; without one, what was looked at."""
        if self.trace is None:
            return str(self)
        return render(self.trace)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the violating execution as JSON that replay() runs again."""
        if self.trace is None:
            raise ValueError(f"{self.verdict.value}: there is no execution to save")
        write_trace(path, self.trace)

    def __str__(self) -> str:
        count = f"{self.executions} execution{'' if self.executions == 1 else 's'}"
        if self.blocked:
            count += f" ({self.blocked} more cut short as redundant)"
        text = f"{self.verdict.value} under {self.memory} after {count}"
        return f"{text}: {self.reason}" if self.reason else text

    def __repr__(self) -> str:
        return f"<Result {self}>"
