"""A trace as text: one column per task, one row per step, with values, where reads got them, and what broke.

Models:      nothing in Linux
Guards:      none
Invariants:  none
Leaves out:  memory panels and source stacks; explore/html.py shows those
Read next:   docs/trace-format.md

    step  writer                       reader
       1  WRITE_ONCE(data, 42)
       2  WRITE_ONCE(flag, 1)
       3                               READ_ONCE(flag) = 1  <- #2
       4                               READ_ONCE(data) = 0  <- initial, stale; newest is #1
          assertion failed: the flag was set but the data was not there
"""

import textwrap

from kmodel.explore.fold import folded
from kmodel.explore.tracefile import Step, Task, Trace
from kmodel.explore.words import Words, violation_name

_MIN_COLUMN, _MAX_COLUMN = 16, 60
_QUIET = ("start",)
_MANY = 3  # columns that a text has room for
_SPAWNED = 100  # tasks of the scenario have smaller numbers, those that they start greater ones


def _cell(words: Words, step: Step) -> str:
    """What a step did."""
    text = words.code(step)
    outcome = words.outcome(step)
    if outcome:
        text += f" {outcome.replace('→', '->')}"
    read_from = step.get("read_from")
    if read_from is not None:
        origin = "initial" if read_from["step"] is None else f"#{read_from['step']}"
        text += f"  <- {origin}"
        if read_from["stale"]:
            newest = read_from.get("newest")
            newer = "initial" if newest is None else _newest(words, newest)
            text += f", stale; newest is {newer}"
    if step["kind"] == "flush":
        text = f"[{words.code(step)}]"
    return text


def _newest(words: Words, n: int) -> str:
    step = words.trace["steps"][n - 1]
    value = step.get("new", step.get("value"))
    return f"#{n}" if value is None else f"#{n} = {value}"


def render(trace: Trace, *, width: int = 150, whole: bool = False) -> str:
    """The timeline of a trace; of a long one, without the steps that no other task can notice, unless
    `whole`.
    """
    words = Words(trace)
    left_out = {} if whole else folded(trace)
    lanes, column = _lanes(trace)
    rows: list[tuple[Step, list[str]]] = []
    cells: list[list[str]] = [[] for _ in lanes]
    for step in trace["steps"]:
        if step["kind"] in _QUIET:
            continue
        text = left_out[step["n"]] if step["n"] in left_out else _cell(words, step)
        if not text:
            continue
        if step.get("preemption"):
            text = f"> {text}"
        rows.append((step, [text]))
        cells[column[step["task"]]].append(text)
    room = max(_MIN_COLUMN, (width - 8) // len(lanes) - 2)
    widths = [
        min(max([len(lane["name"]), *map(len, column_cells)], default=0), room, _MAX_COLUMN)
        for lane, column_cells in zip(lanes, cells, strict=True)
    ]
    widths = [max(w, min(_MIN_COLUMN, room)) for w in widths]
    offsets = [8 + sum(w + 2 for w in widths[:i]) for i in range(len(lanes))]
    head = "  step  " + "  ".join(lane["name"][:w].ljust(w) for lane, w in zip(lanes, widths, strict=True))
    lines = [head.rstrip(), "  " + "-" * (len(head.rstrip()) - 2)]
    violation = trace.get("violation")
    related = {r["step"]: r["text"] for r in violation.get("related", [])} if violation is not None else {}
    now = {i: lane["id"] for i, lane in enumerate(lanes)}
    names = {task["id"]: task["name"] for task in trace["tasks"]}
    for step, (text,) in rows:
        i = column[step["task"]]
        if now[i] != step["task"]:
            now[i] = step["task"]
            lines.append(" " * offsets[i] + f"-- {names[step['task']]} --")
        wrapped = textwrap.wrap(text, widths[i], subsequent_indent="    ") or [""]
        lines.append(f"{step['n']:6}  " + " " * (offsets[i] - 8) + wrapped[0])
        lines += [" " * offsets[i] + more for more in wrapped[1:]]
        lines += [
            " " * offsets[i] + f"  ({note})" for note in step.get("notes", []) if step["kind"] != "fence"
        ]
        if step["n"] in related:
            lines.append(" " * offsets[i] + f"  ^ {related[step['n']]}")
        if violation is not None and violation.get("step") == step["n"]:
            lines += _broken(trace, offsets[i])
    if violation is not None and "step" not in violation:
        lines += _broken(trace, 8)
    return "\n".join(lines)


def _lanes(trace: Trace) -> tuple[list[Task], dict[int, int]]:
    """The tasks that head the columns, and the column of each task.

    Where there are many, a worker or callback shares the column of one that was over before it began.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for step in trace["steps"]:
        first.setdefault(step["task"], step["n"])
        last[step["task"]] = step["n"]
    tasks = [task for task in trace["tasks"] if task["id"] in first]
    if len(tasks) <= _MANY:
        lanes = tasks or trace["tasks"]
        return lanes, {task["id"]: i for i, task in enumerate(lanes)}
    heads: list[Task] = []
    ends: list[int | None] = []  # the last step in the column; None: not to be shared
    column: dict[int, int] = {}
    for task in sorted(tasks, key=lambda task: (task["id"] >= _SPAWNED, first[task["id"]])):
        spawned = task["id"] >= _SPAWNED
        free = [i for i, end in enumerate(ends) if spawned and end is not None and end < first[task["id"]]]
        i = free[0] if free else len(heads)
        if not free:
            heads.append(task)
            ends.append(None)
        column[task["id"]] = i
        ends[i] = last[task["id"]] if spawned else None
    return heads, column


def _broken(trace: Trace, indent: int) -> list[str]:
    violation = trace["violation"]
    message = f"*** {violation_name(violation['kind'])}: {violation['message']}"
    lines = textwrap.wrap(
        message, 100, initial_indent=" " * min(indent, 40), subsequent_indent=" " * (min(indent, 40) + 4)
    )
    names = {task["id"]: task["name"] for task in trace["tasks"]}
    for wait in violation.get("waits", []):
        holder = "" if wait["held_by"] is None else f", held by {names.get(wait['held_by'], wait['held_by'])}"
        holds = f"; holds {', '.join(wait['holds'])}" if wait["holds"] else ""
        lines.append(f"            {names[wait['task']]}: {wait['for']}{holder}{holds}")
    step = next((s for s in trace["steps"] if s["n"] == violation.get("step")), None)
    if step is not None and "source" in step:
        source = step["source"]
        lines.append(
            " " * min(indent, 40) + f"    at {source['file']}:{source['line']} in {source['function']}()"
        )
    return lines
