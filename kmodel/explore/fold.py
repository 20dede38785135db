"""Which steps of a long execution a text may leave out: those that no other task can notice.

Models:      nothing in Linux
Guards:      none
Invariants:  none of what is left out has a part in the violation, except by what it computes
Leaves out:  nothing from the trace: the page and the JSON have every step
Read next:   explore/timeline.py

A task that maps a file makes two hundred accesses, of which a speculating reader meets five. Shown are the
accesses to what one task stores and another one touches, waits, read-side sections, grace periods and frees.
"""

from itertools import groupby

from kmodel.explore.tracefile import Step, Trace

FOLD_ABOVE = 40
"""Executions of more steps than this are folded."""

_MEMORY = ("load", "store", "rmw")
_QUIET = (*_MEMORY, "start", "fence", "alloc", "relax")
_NESTING = (".rcu_read_lock_nesting", ".trc_reader_nesting")
_NAMES = 3


def folded(trace: Trace, *, above: int = FOLD_ABOVE) -> dict[int, str]:
    """For each step that is left out its number, and at the first of a row of them what stands in their
    place.
    """
    steps = trace["steps"]
    kept = _kept(trace)
    found = dict.fromkeys(_nesting(trace) - kept, "")
    if len(steps) <= above:
        return found
    for (_task, dropped), group in groupby(steps, key=lambda s: (s["task"], s["n"] not in kept)):
        row = [step for step in group if step["n"] not in found]
        if not dropped or len(row) < 2:
            continue
        found |= dict.fromkeys((step["n"] for step in row), "")
        found[row[0]["n"]] = _instead(row)
    return found


def _nesting(trace: Trace) -> set[int]:
    """The steps in which a reader counts its own sections; that they begin and end is shown as such."""
    counts = {entry["id"] for entry in trace["locations"] if entry["name"].endswith(_NESTING)}
    return {step["n"] for step in trace["steps"] if step.get("location") in counts}


def _kept(trace: Trace) -> set[int]:
    touched: dict[int, set[int]] = {}
    stored: dict[int, set[int]] = {}
    for step in trace["steps"]:
        where = step.get("location")
        if where is None:
            continue
        touched.setdefault(where, set()).add(step["task"])
        if step["kind"] == "store" or "new" in step or step["kind"] not in _MEMORY:
            stored.setdefault(where, set()).add(step["task"])
    violation = trace.get("violation")
    named = (
        {violation.get("step"), *(r["step"] for r in violation.get("related", []))} if violation else set()
    )
    kept = set()
    fences = []
    for step in trace["steps"]:
        where = step.get("location")
        if step["kind"] not in _QUIET or step["n"] in named or step.get("notes") or step.get("preemption"):
            kept.add(step["n"])
        elif step["kind"] == "fence":
            fences.append(step["n"])
        elif where is not None and _noticed(step, touched[where], stored.get(where, set())):
            kept.add(step["n"])
    # A barrier stands beside what it orders.
    if trace["memory"] != "sc":
        kept |= {n for n in fences if n - 1 in kept or n + 1 in kept}
    return kept


def _noticed(step: Step, touched: set[int], stored: set[int]) -> bool:
    """Whether another task stores where this step reads, or reads or stores where it stores."""
    others = stored if step["kind"] == "load" else touched
    return bool(stored) and bool(others - {step["task"]})


def _instead(row: list[Step]) -> str:
    names = list(dict.fromkeys(step["source"]["function"] for step in row if "source" in step))
    if len(names) > _NAMES:
        names = [*names[: _NAMES - 1], "...", names[-1]]
    which = f": {', '.join(names)}" if names else ""
    return f"... {len(row)} steps of its own{which}"


__all__ = ["FOLD_ABOVE", "folded"]
