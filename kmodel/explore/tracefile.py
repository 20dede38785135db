"""One execution as a JSON document: its types, and reading, checking and writing the files that hold it.

Models:      nothing in Linux
Guards:      none
Invariants:  J1 what write_trace() wrote read_trace() returns equal, J2 a damaged file is one clear sentence
Leaves out:  what `schedule` means, which belongs to the engine; docs/trace-format.md explains every key
Read next:   explore/words.py, which says each step in words
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

FORMAT = "kmodel-trace-1"

MemoryModel = Literal["sc", "tso", "lkmm"]


class Task(TypedDict):
    """A lane."""

    id: int
    name: str


class Location(TypedDict):
    """A field of a struct that the execution touched."""

    id: int
    name: str
    initial: str
    object: NotRequired[str]


class Store(TypedDict):
    """An entry of a location's history; step None is the initial value."""

    step: int | None
    value: str


class LocationState(TypedDict):
    """A location after a step: its stores in coherence order, and which of them each task may still read."""

    location: int
    history: list[Store]
    visible: dict[str, list[int]]


class ReadFrom(TypedDict):
    """Where a load got its value; step None is the initial value."""

    step: int | None
    stale: bool
    newest: NotRequired[int | None]


class Source(TypedDict):
    """A line of Python."""

    file: str
    line: int
    function: str
    text: NotRequired[str]


class Step(TypedDict):
    """One event of one task."""

    n: int
    task: int
    kind: str
    order: NotRequired[str]
    op: NotRequired[str]
    location: NotRequired[int]
    value: NotRequired[str]
    old: NotRequired[str]
    new: NotRequired[str]
    read_from: NotRequired[ReadFrom]
    memory: NotRequired[list[LocationState]]
    object: NotRequired[str]
    domain: NotRequired[str]
    lock: NotRequired[str]
    source: NotRequired[Source]
    stack: NotRequired[list[Source]]
    preemption: NotRequired[bool]
    notes: NotRequired[list[str]]


class Related(TypedDict):
    """Another step that belongs to a violation."""

    step: int
    text: str


Wait = TypedDict("Wait", {"task": int, "for": str, "held_by": int | None, "holds": list[str]})


class Violation(TypedDict):
    """The property that does not hold, and where that showed."""

    kind: str
    message: str
    task: NotRequired[int]
    step: NotRequired[int]
    related: NotRequired[list[Related]]
    waits: NotRequired[list[Wait]]


class Search(TypedDict, total=False):
    """How the execution was found."""

    strategy: str
    executions: int
    blocked: int
    preemptions: int
    seed: int


class Trace(TypedDict):
    """The whole document."""

    format: str
    scenario: str
    target: NotRequired[str]
    summary: NotRequired[str]
    removed_guards: NotRequired[list[str]]
    broken: NotRequired[bool]
    memory: MemoryModel
    verdict: str
    search: NotRequired[Search]
    violation: NotRequired[Violation]
    tasks: list[Task]
    locations: list[Location]
    steps: list[Step]
    schedule: Any
    program: NotRequired[dict[str, Any]]
    options: NotRequired[dict[str, Any]]


class TraceError(ValueError):
    """A file that is not a usable trace; the text says why, in one line."""


# What must be there, and of which type. A trace has come from a file, so nothing is taken for granted.
_REQUIRED: tuple[tuple[str, type], ...] = (
    ("scenario", str),
    ("memory", str),
    ("verdict", str),
    ("tasks", list),
    ("locations", list),
    ("steps", list),
)


def problem(document: object) -> str | None:
    """What makes `document` unusable as a trace, or None."""
    if not isinstance(document, dict):
        return "it is not a JSON object"
    if document.get("format") != FORMAT:
        return f"its format is {document.get('format')!r}, not {FORMAT!r}"
    for key, kind in _REQUIRED:
        if not isinstance(document.get(key), kind):
            return f"its {key!r} is missing or is no {kind.__name__}"
    if "schedule" not in document:
        return "its 'schedule' is missing"
    tasks = _ids(document["tasks"], ("name",))
    locations = _ids(document["locations"], ("name", "initial"))
    if tasks is None or not tasks:
        return "its 'tasks' are not [{id, name}]"
    if locations is None:
        return "its 'locations' are not [{id, name, initial}]"
    for n, step in enumerate(document["steps"], 1):
        wrong = _step_problem(step, n, len(document["steps"]), tasks, locations)
        if wrong is not None:
            return f"step {n}: {wrong}"
    violation = document.get("violation")
    if violation is not None:
        if not isinstance(violation, dict) or not isinstance(violation.get("message"), str):
            return "its 'violation' has no message"
        at = violation.get("step")
        if at is not None and not (isinstance(at, int) and 1 <= at <= len(document["steps"])):
            return f"its 'violation' names step {at!r}, which is not there"
    return None


def _ids(entries: list[Any], texts: tuple[str, ...]) -> set[int] | None:
    """The ids of a list of objects that also have these texts; None if anything is amiss."""
    found: set[int] = set()
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int) or entry["id"] in found:
            return None
        if not all(isinstance(entry.get(text), str) for text in texts):
            return None
        found.add(entry["id"])
    return found


def _step_problem(step: Any, n: int, last: int, tasks: set[int], locations: set[int]) -> str | None:
    if not isinstance(step, dict) or step.get("n") != n:
        return f"its number is not {n}"
    if step.get("task") not in tasks:
        return f"task {step.get('task')!r} is not in 'tasks'"
    if not isinstance(step.get("kind"), str):
        return "its 'kind' is missing"
    if "location" in step and step["location"] not in locations:
        return f"location {step['location']!r} is not in 'locations'"
    source = step.get("source")
    if source is not None and not (isinstance(source, dict) and isinstance(source.get("file"), str)):
        return "its 'source' names no file"
    read_from = step.get("read_from")
    if read_from is not None and not (
        isinstance(read_from, dict)
        and _is_step(read_from.get("step"), last)
        and _is_step(read_from.get("newest"), last)
    ):
        return "its 'read_from' names a step that is not there"
    for state in step.get("memory", ()):
        if not isinstance(state, dict) or state.get("location") not in locations:
            return "its 'memory' names a location that is not in 'locations'"
        history, visible = state.get("history"), state.get("visible")
        if not isinstance(history, list) or not isinstance(visible, dict):
            return "its 'memory' lacks a history or visible entries"
        if not all(
            isinstance(e, dict) and isinstance(e.get("value"), str) and _is_step(e.get("step"), last)
            for e in history
        ):
            return "its 'memory' has a history that is not [{step, value}]"
        if not all(isinstance(i, int) and 0 <= i < len(history) for seen in visible.values() for i in seen):
            return "its 'memory' has visible entries outside the history"
    return None


def _is_step(number: object, last: int) -> bool:
    return number is None or (isinstance(number, int) and 1 <= number <= last)


# The page keeps its trace in an element that starts with this; explore/html.py writes it.
PAGE_MARK = '<script type="application/json" id="trace">'


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """The trace in a JSON file, or inside a page that explore/html.py wrote. OSError, or TraceError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TraceError(f"{path} is not a trace: it is not text") from None
    begin = text.find(PAGE_MARK)
    if begin >= 0:
        text = text[begin + len(PAGE_MARK) :].partition("</script>")[0]
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path} is not a trace: it is not JSON ({error})") from None
    wrong = problem(document)
    if wrong is not None:
        raise TraceError(f"{path} is not a trace: {wrong}")
    return cast("Trace", document)


def write_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Write a trace as JSON, all of it or nothing."""
    write_text(path, trace_text(trace))


def trace_text(trace: Trace) -> str:
    """A trace as JSON."""
    return json.dumps(trace, indent=1, ensure_ascii=False) + "\n"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file by one with this text, in one rename; a device or pipe is simply written to."""
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
