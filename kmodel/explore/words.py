"""A step of a trace in words: what the task did, what that means for the others, and what it broke.

Models:      nothing in Linux
Guards:      none
Invariants:  none; a key that the trace lacks leaves its sentence out
Leaves out:  layout; explore/html.py and the text timeline have their own
Read next:   explore/html.py
"""

from kmodel.explore.tracefile import LocationState, ReadFrom, Step, Trace

VIOLATIONS = {
    "assertion": "an assertion failed",
    "data-race": "data race",
    "use-after-free": "use after free",
    "double-free": "double free",
    "refcount": "refcount misuse",
    "leak": "leak",
    "deadlock": "deadlock",
    "lost-wakeup": "lost wake-up",
    "locking": "lock rule broken",
    "warning": "kernel warning",
    "nondeterminism": "the model is not deterministic",
    "error": "error",
}

_LOADS = {"once": "READ_ONCE", "acquire": "smp_load_acquire"}
_STORES = {"once": "WRITE_ONCE", "release": "smp_store_release"}
_FENCES = {
    "mb": "A full barrier: everything before it is seen by others before anything after it.",
    "rmb": "A read barrier: the reads after it see at least what the reads before it saw.",
    "wmb": "A write barrier: whoever sees a store after it also sees the stores before it.",
}
_HOW = {
    "plain": " with a plain access",
    "once": ", ordering nothing,",
    "relaxed": ", ordering nothing,",
    "acquire": " with acquire (what follows stays after it)",
    "release": " with release (whoever acquires it sees what came before)",
    "full": ", fully ordered,",
}
# What ends the names of the functions of a domain; an SRCU domain is an argument.
_SUFFIX = {"rcu": "", "rcu_tasks_trace": "_trace"}
_SECTIONS = {"rcu-lock": "read_lock", "rcu-unlock": "read_unlock"}


def violation_name(kind: str) -> str:
    """A kind of violation in words."""
    return VIOLATIONS.get(kind, kind)


class Words:
    """Says the steps of one trace in words."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.tasks = {task["id"]: task["name"] for task in trace["tasks"]}
        self.locations = {location["id"]: location for location in trace["locations"]}
        self.freed: dict[str, int] = {}  # object -> step that freed it; as of the step being explained

    def all(self) -> list[list[str]]:
        """The sentences of every step."""
        self.freed = {}
        return [self._sentences(step) for step in self.trace["steps"]]

    # -- one line of code per step

    def code(self, step: Step) -> str:
        """The step as the kernel would write it, without what came of it."""
        where = self._where(step)
        kind, order = step["kind"], step.get("order", "")
        if kind == "load":
            function = step.get("op") or _LOADS.get(order)
            return f"{function}({where})" if function else f"read {where}"
        if kind == "store":
            function = step.get("op") or _STORES.get(order)
            if "value" not in step:
                return f"{function or 'write'}({where})"
            return f"{function}({where}, {step['value']})" if function else f"{where} = {step['value']}"
        if kind == "fence":
            return f"{step.get('op') or 'smp_' + order}()"
        if kind == "flush":
            return f"{where} = {step.get('value', '?')} reaches memory"
        if kind in ("rcu-lock", "rcu-unlock", "gp-start", "gp-end") and not step.get("op"):
            return _grace(kind, step.get("domain", "rcu"))
        name = step.get("op") or kind.replace("-", " ")
        what = step.get("lock") or where or step.get("object") or step.get("domain") or ""
        if what in _SUFFIX and step.get("op"):
            what = ""
        if step.get("op"):
            return f"{name}({what})"
        if kind == "rmw" and order:
            name = "read-modify-write" if order == "full" else f"{order} read-modify-write"
        return f"{name} {what}".rstrip()

    def outcome(self, step: Step) -> str:
        """What came of it: the value, the change."""
        if step["kind"] == "rmw":
            if "new" in step:
                return f"{step.get('old', '?')} → {step['new']}"
            return f"= {step['old']}, nothing stored" if "old" in step else ""
        if step["kind"] == "load" or step["kind"] == "trylock":
            return f"= {step['value']}" if "value" in step else ""
        return ""

    def origin(self, step: Step) -> str:
        """Where a read got its value: "#3" (the step that stored it) or "initial"."""
        read_from = step.get("read_from")
        if read_from is None:
            return ""
        return "initial" if read_from["step"] is None else f"#{read_from['step']}"

    # -- sentences

    def _sentences(self, step: Step) -> list[str]:
        said = []
        if step.get("preemption"):
            before = self._before(step)
            said.append(f"The scheduler switches here: {before} could have gone on.")
        said += self._what(step)
        obj = self._object(step)
        if obj in self.freed and step["kind"] not in ("alloc", "free"):
            said.append(f"{obj} was freed at step {self.freed[obj]}.")
        if step["kind"] == "free" and obj:
            self.freed[obj] = step["n"]
        elif step["kind"] == "alloc":
            self.freed.pop(obj, None)
        said += step.get("notes", [])
        violation = self.trace.get("violation")
        if violation is not None:
            said += [r["text"] for r in violation.get("related", []) if r["step"] == step["n"]]
            if violation.get("step") == step["n"]:
                name, message = violation_name(violation["kind"]), violation["message"].rstrip(".")
                said.append(f"Here it breaks ({name}): {message}.")
        return said

    def _what(self, step: Step) -> list[str]:
        task, where, kind = self.tasks[step["task"]], self._where(step), step["kind"]
        how = _HOW.get(step.get("order", ""), "")
        if kind == "load":
            got = f" and gets {step['value']}" if "value" in step else ""
            return [_end(f"{task} reads {where}{how}{got}"), *self._read(step)]
        if kind == "store":
            what = f"stores {step['value']} to" if "value" in step else "writes"
            stored = f"{task} {what} {where}{how}"
            return [_end(stored), *self._stored(step)]
        if kind == "rmw":
            if "old" not in step:
                return [_end(f"{task} changes {where}{how}")]
            old = step["old"]
            if "new" not in step:
                return [f"{task} looks at {where}, finds {old} and leaves it alone.", *self._read(step)]
            done = f"{task} changes {where} from {old} to {step['new']} in one step{how}"
            return [_end(done), *self._read(step), *self._stored(step)]
        if kind == "fence":
            return [_FENCES.get(step.get("order", ""), f"{task} executes a barrier.")]
        simple = self._simple(step, task)
        return [simple] if simple else []

    def _simple(self, step: Step, task: str) -> str:
        kind, domain = step["kind"], step.get("domain", "RCU")
        what = step.get("lock") or self._where(step)
        obj = step.get("object", "an object")
        if kind == "trylock":
            return f"{task} tries {what}: " + (
                "it is free, and now held." if step.get("value") == "true" else "it is taken."
            )
        return {
            "lock": f"{task} takes {what}, and with it sees all that earlier holders did.",
            "unlock": f"{task} releases {what}: the next holder sees all that was done.",
            "alloc": f"{task} allocates {obj}.",
            "free": f"{task} frees {obj}: from here on nobody may use it.",
            "rcu-lock": f"{task} enters a read-side section ({domain}): "
            "a grace period that begins from now on waits for it.",
            "rcu-unlock": f"{task} leaves its read-side section ({domain}).",
            "gp-start": f"{task} begins to wait for a grace period ({domain}): "
            "every reader that is inside a section now must leave it first.",
            "gp-end": f"The grace period ({domain}) that {task} waited for is over: "
            "readers that were inside have left, later ones see what was done before it.",
            "gp-call": f"{task} queues a callback to run after a grace period ({domain}).",
            "wait": f"{task} waits{' on ' + what if what else ''}.",
            "sleep": f"{task} goes to sleep.",
            "wake": f"{task} wakes {obj if 'object' in step else 'a task'}.",
            "flush": f"The store of {task} to {what} leaves its buffer: now the others see it.",
            "relax": f"{task} goes round its waiting loop.",
            "join": f"{task} waits for {obj if 'object' in step else 'a task'} to end.",
            "barrier": f"{task} waits for the callbacks queued before ({domain}).",
            "start": f"{task} starts.",
            "spawn": f"{task} starts {obj if 'object' in step else 'a task'}.",
            "end": f"{task} has ended.",
            "note": "",
        }.get(kind, f"{task}: {kind}.")

    def _read(self, step: Step) -> list[str]:
        read_from = step.get("read_from")
        if read_from is None:
            return []
        value = step.get("old", step.get("value", "It"))
        if read_from["step"] is None:
            origin = f"{value} is the initial value."
        else:
            origin = (
                f"{value} was stored by {self._who(read_from['step'], step)} at step {read_from['step']}."
            )
        return [origin, *self._stale(read_from)]

    def _stale(self, read_from: ReadFrom) -> list[str]:
        if not read_from["stale"]:
            return []
        newest = read_from.get("newest")
        if newest is None:
            return ["Stale: a newer store exists, but nothing this task did obliges it to see that."]
        stored = self.trace["steps"][newest - 1]
        value = stored.get("new", stored.get("value", "another value"))
        return [
            f"Stale: step {newest} has stored {value}, but nothing this task did obliges it to see that yet."
        ]

    def _stored(self, step: Step) -> list[str]:
        """Who need not see the store, and whether it landed before others in coherence order."""
        state = next((s for s in step.get("memory", []) if s["location"] == step.get("location")), None)
        if state is None:
            return []
        at = next((i for i, entry in enumerate(state["history"]) if entry["step"] == step["n"]), None)
        if at is None:
            return []
        said = []
        if at + 1 < len(state["history"]):
            later = state["history"][at + 1]["step"]
            said.append(f"It lands before the store of step {later}: to everybody it was the earlier one.")
        behind = self._behind(state, at, step["task"])
        if behind:
            said.append(f"{_list(behind)} may still read an older value.")
        return said

    def _behind(self, state: LocationState, at: int, storer: int) -> list[str]:
        return [
            self.tasks[int(task)]
            for task, seen in state["visible"].items()
            if task.isdigit()
            and int(task) in self.tasks
            and int(task) != storer
            and any(i < at for i in seen)
        ]

    # -- names

    def _where(self, step: Step) -> str:
        return self.locations[step["location"]]["name"] if "location" in step else ""

    def _object(self, step: Step) -> str:
        if "object" in step:
            return step["object"]
        return self.locations[step["location"]].get("object", "") if "location" in step else ""

    def _who(self, n: int, reader: Step) -> str:
        task = self.trace["steps"][n - 1]["task"]
        return f"{self.tasks[task]} itself" if task == reader["task"] else self.tasks[task]

    def _before(self, step: Step) -> str:
        return self.tasks[self.trace["steps"][step["n"] - 2]["task"]] if step["n"] > 1 else "another task"


def _grace(kind: str, domain: str) -> str:
    """A reader section or grace period as a call: "rcu_read_lock()", "synchronize_srcu(uprobes) returns"."""
    if domain in _SUFFIX:
        section, wait, argument = f"rcu_{{}}{_SUFFIX[domain]}", f"synchronize_{domain}", ""
    else:
        section, wait, argument = "srcu_{}", "synchronize_srcu", domain
    if kind in _SECTIONS:
        return f"{section.format(_SECTIONS[kind])}({argument})"
    return f"{wait}({argument}) {'begins' if kind == 'gp-start' else 'returns'}"


def _end(sentence: str) -> str:
    return sentence.rstrip(",") + "."


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
