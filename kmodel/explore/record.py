"""The record of one execution: what each step did, as a trace document (docs/trace-format.md).

Models:      nothing in Linux
Guards:      none; the engine calls it from the task that makes the step
Invariants:  Y1 step numbers count what is shown; events of the search are mapped to them
Read next:   explore/timeline.py, explore/tracefile.py

A search keeps no record: only the schedule that is to be shown runs again with one.
"""

import linecache
import os
import sys
from typing import Any, cast

from kmodel.explore.events import KIND_NAMES, Loc, Runner, Violation
from kmodel.explore.tracefile import FORMAT, Location, LocationState, Source, Step, Trace
from kmodel.explore.tracefile import Violation as TraceViolation

_ENGINE = (f"{os.sep}kmodel{os.sep}core{os.sep}", f"{os.sep}kmodel{os.sep}explore{os.sep}")
# Functions of these files are operations of the kernel in their own right: they name the step.
_OPERATIONS = (f"{os.sep}core{os.sep}access.py", f"{os.sep}sync{os.sep}refcount.py")
# Below these an operation is the engine's business: its step is where they are called.
_WRAPPERS = (f"{os.sep}kmodel{os.sep}rcu{os.sep}", f"{os.sep}sync{os.sep}spinlock.py")
_WRAPPED = ("lock", "unlock", "trylock", "rcu-lock", "rcu-unlock", "gp-start", "gp-end", "gp-call", "barrier")
_STACK = 6


class Recorder:
    """Collects the steps of one execution."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.locations: dict[tuple[int, str], int] = {}
        self.entries: list[Location] = []
        self.histories: dict[tuple[int, str], list[tuple[int | None, str]]] = {}
        self.of_event: dict[int, int] = {}  # event of the search -> step
        self.locs: dict[tuple[int, str], Loc] = {}
        self.told: dict[
            tuple[int, str], LocationState
        ] = {}  # what the steps so far have said of each location
        self.waiting: dict[int, list[Step]] = {}  # tso: what stands in a task's store buffer
        self.e: Any = None

    def begin(self, engine: Any) -> None:
        """The execution starts."""
        self.__init__()  # type: ignore[misc]
        self.e = engine

    def end(self, engine: Any) -> None:
        """It is over: name the tasks while they are known."""
        self.tasks = [
            {"id": r.pid, "name": r.task.comm} for r in engine.runners if r.owner is None and r.started
        ]
        if not self.tasks:
            self.tasks = [{"id": 0, "name": "setup"}]
        self.schedule = [[node.task, node.label] for node in engine.stack]

    # -- where in the source

    def _source(self, kind: str = "") -> tuple[str, list[Source]]:
        frame: Any = sys._getframe(2)
        operation = ""
        found: list[Source] = []
        while frame is not None and len(found) < _STACK:
            code = frame.f_code
            name = code.co_filename
            if code.co_name == "_execute" and name.endswith("execution.py"):
                break
            if name.endswith(_OPERATIONS):
                if code.co_name not in ("rmw", "_cmpxchg", "_store") or not operation:
                    operation = code.co_name
            elif kind in _WRAPPED and not found and any(part in name for part in _WRAPPERS):
                if name.endswith("spinlock.py"):
                    operation = code.co_name
            elif not any(part in name for part in _ENGINE):
                line = frame.f_lineno
                source: Source = {"file": _short(name), "line": line, "function": code.co_name}
                text = linecache.getline(name, line).strip()
                if text:
                    source["text"] = text
                found.append(source)
            frame = frame.f_back
        return operation if operation not in ("rmw", "_cmpxchg", "_store") else "", found

    def here(self, me: Runner) -> str:
        """The line that makes the access now, or made it when its store entered a buffer."""
        if me.owner is not None:
            source = self.waiting[me.owner.idx][0].get("source")
            found = [] if source is None else [source]
        else:
            _op, found = self._source()
        return f"{found[0]['file']}:{found[0]['line']}" if found else "?"

    def site(self, event: int) -> str:
        """The line that made an earlier one."""
        n = self.of_event.get(event)
        source = self.steps[n - 1].get("source") if n is not None else None
        return f"{source['file']}:{source['line']}" if source is not None else "?"

    # -- steps

    def _step(self, me: Runner, kind: str, event: int | None, **more: Any) -> Step:
        n = len(self.steps) + 1
        step = cast("Step", {"n": n, "task": me.pid, "kind": kind})
        for key, value in more.items():
            if value is not None and value != "":
                cast("Any", step)[key] = value
        if me.owner is None:
            operation, found = self._source(kind)
            if operation and kind in ("load", "store", "rmw", "wait", "lock", "unlock", "trylock"):
                step["op"] = operation
            if found:
                step["source"] = found[0]
                if len(found) > 1:
                    step["stack"] = found[1:]
        elif self.waiting[me.owner.idx]:
            source = self.waiting[me.owner.idx].pop(0).get("source")
            if source is not None:
                step["source"] = source
        if event is not None:
            self.of_event[event] = n
            node = self.e.stack[event]
            if self.e.search.preempts(node, node.task):
                step["preemption"] = True
        self.steps.append(step)
        return step

    def _location(self, loc: Loc) -> int:
        known = self.locations.get(loc.key)
        if known is None:
            known = self.locations[loc.key] = len(self.locations) + 1
            self.locs[loc.key] = loc
            names = self.e.names
            entry: Location = {
                "id": known,
                "name": names.field(loc.obj, loc.field),
                "initial": names.value(self.e.initial_value(loc)),
            }
            owner = names.of(loc.obj)
            if owner:
                entry["object"] = owner
            self.entries.append(entry)
            self.histories[loc.key] = [(None, entry["initial"])]
        return known

    def _state(self, loc: Loc) -> LocationState:
        e = self.e
        history = self.histories[loc.key]
        visible = e.visible(loc)
        if e.labelled:
            history = [
                (None if s.event < 0 else self.of_event.get(s.event), e.names.value(s.value))
                for s in loc.hist
            ]
        if visible is None:
            visible = {str(r.pid): [len(history) - 1] for r in e.runners if r.owner is None}
        return {
            "location": self.locations[loc.key],
            "history": [{"step": step, "value": value} for step, value in history],
            "visible": visible,
        }

    def _memory(self, touched: Loc | None = None) -> list[LocationState]:
        """The location that a step touched, and every other of which some task may now see less."""
        changed = []
        for key, loc in self.locs.items() if self.e.labelled else ():
            state = self._state(loc)
            if loc is not touched and state != self.told.get(key):
                self.told[key] = state
                changed.append(state)
        if touched is None:
            return changed
        self.told[touched.key] = self._state(touched)
        return [self.told[touched.key], *changed]

    def _read_from(self, me: Runner, loc: Loc) -> Any:
        e = self.e
        if not e.labelled:
            return {"step": self.histories[loc.key][-1][0], "stale": False}
        newest = loc.hist[-1].event
        event = me.label
        if event < 0:
            step = None
        else:
            step = self.of_event.get(event)
        # The step itself may have stored since: stale means that somebody else's store is newer.
        behind = [s for s in loc.hist if s.event == self.e.depth - 1]
        last = loc.hist[-2].event if behind and loc.hist[-1] is behind[0] else newest
        if event == last or (behind and loc.hist[-1] is not behind[0] and False):
            return {"step": step, "stale": False}
        return {"step": step, "stale": True, "newest": None if last < 0 else self.of_event.get(last)}

    def _others(self, step: Step) -> None:
        changed = self._memory()
        if changed:
            step["memory"] = changed

    def load(
        self, me: Runner, loc: Loc, kind: int, order: str, value: Any, *, forwarded: bool = False
    ) -> None:
        """A load."""
        where = self._location(loc)
        event = None if forwarded else self.e.depth - 1
        name = "rmw" if KIND_NAMES[kind] == "rmw" else KIND_NAMES[kind]
        shown = self.e.names.value(value)
        field = "old" if name == "rmw" else "value"
        step = self._step(me, name, event, order=order, location=where, **{field: shown})
        if forwarded:
            step["notes"] = ["From its own store buffer."]
            return
        step["read_from"] = self._read_from(me, loc)
        step["memory"] = self._memory(loc)

    def store(self, me: Runner, loc: Loc, kind: int, order: str, value: Any) -> None:
        """A store reaches memory."""
        where = self._location(loc)
        shown = self.e.names.value(value)
        step = self._step(me, KIND_NAMES[kind], self.e.depth - 1, order=order, location=where, value=shown)
        self.histories[loc.key].append((step["n"], shown))
        step["memory"] = self._memory(loc)

    def buffered(self, me: Runner, loc: Loc, order: str, value: Any) -> None:
        """tso: a store enters its task's buffer."""
        where = self._location(loc)
        step = self._step(me, "store", None, order=order, location=where, value=self.e.names.value(value))
        step["notes"] = ["It waits in the store buffer: others do not see it yet."]
        self.waiting.setdefault(me.idx, []).append(step)

    def rmw(self, me: Runner, loc: Loc, order: str, old: Any, new: Any) -> None:
        """A read-modify-write that stored."""
        where = self._location(loc)
        shown = self.e.names.value(new)
        step = self._step(
            me, "rmw", self.e.depth - 1, order=order, location=where, old=self.e.names.value(old), new=shown
        )
        step["read_from"] = self._read_from(me, loc)
        self.histories[loc.key].append((step["n"], shown))
        step["memory"] = self._memory(loc)

    def lock(self, me: Runner, loc: Loc, kind: str) -> None:
        """A spinning lock is taken or released."""
        where = self._location(loc)
        step = self._step(me, kind, self.e.depth - 1, location=where, lock=self.e.names.of(loc.obj))
        self.histories[loc.key].append((step["n"], "1" if kind == "lock" else "0"))
        step["memory"] = self._memory(loc)

    def note(self, me: Runner, kind: str, text: str, order: str = "") -> None:
        """A step that is no event of its own, or says nothing about memory."""
        event = self.e.depth - 1
        mine = kind == "fence" and event >= 0 and self.e.evt[event] == me.idx and event not in self.of_event
        step = self._step(me, kind, event if mine else None, order=order)
        self._others(step)
        if text:
            step["notes"] = [text[0].upper() + text[1:] + "."]

    def life(self, me: Runner, obj: Any, kind: str) -> None:
        """An object is freed or allocated."""
        event = self.e.depth - 1 if kind == "free" else None
        self._others(self._step(me, kind, event, object=self.e.names.of(obj)))

    def rcu(self, me: Runner, kind: str, domain: str) -> None:
        """A reader section or a grace period."""
        self._others(self._step(me, kind, None if kind == "gp-call" else self.e.depth - 1, domain=domain))

    def waits(self, me: Runner, kind: str, text: str) -> None:
        """A task has slept, waited for another, or spun."""
        step = self._step(me, kind, self.e.depth - 1)
        self._others(step)
        if text:
            step["notes"] = [text]

    def offending(self, me: Runner, loc: Loc, how: str, order: str) -> None:
        """The access that breaks something."""
        kind = "load" if how in ("load", "read") else "rmw" if how == "changed" else "store"
        self._step(me, kind, self.e.depth, order=order, location=self._location(loc))

    # -- the document

    def trace(
        self, scenario: str, verdict: str, search: dict[str, Any], violation: Violation | None
    ) -> Trace:
        """The whole execution."""
        document = cast(
            "Trace",
            {
                "format": FORMAT,
                "scenario": scenario,
                "memory": self.e.memory,
                "verdict": verdict,
                "search": search,
                "tasks": self.tasks,
                "locations": self.entries,
                "steps": self.steps,
                "schedule": self.schedule,
            },
        )
        if violation is not None:
            document["violation"] = self._violation(violation)
        return document

    def _violation(self, violation: Violation) -> TraceViolation:
        found: TraceViolation = {"kind": violation.kind, "message": violation.message}
        runners = self.e.runners
        if violation.task is not None:
            found["task"] = runners[violation.task].pid
            step = None if violation.event is None else self._nearest(violation.event)
            if step is not None:
                found["step"] = step
        related = [
            {"step": self.of_event[r.event], "text": r.text[0].upper() + r.text[1:] + "."}
            for r in violation.related
            if r.event in self.of_event
        ]
        if related:
            found["related"] = cast("Any", related)
        if violation.waits:
            found["waits"] = [
                {
                    "task": runners[w.task].pid,
                    "for": w.what,
                    "held_by": None if w.held_by is None else runners[w.held_by].pid,
                    "holds": list(w.holds),
                }
                for w in violation.waits
            ]
        return found

    def _nearest(self, event: int) -> int | None:
        while event >= 0:
            if event in self.of_event:
                return self.of_event[event]
            event -= 1
        return len(self.steps) or None


def _short(name: str) -> str:
    """A file's name without what depends on the machine."""
    cwd = os.getcwd() + os.sep
    if name.startswith(cwd):
        return name[len(cwd) :]
    for part in (f"{os.sep}kmodel{os.sep}", f"{os.sep}tests{os.sep}"):
        _head, sep, tail = name.rpartition(part)
        if sep:
            return sep.strip(os.sep) + "/" + tail
    return os.path.basename(name)
