"""Which interleavings to look at: source-DPOR with sleep sets, by depth-first search over re-executions.

Models:      nothing in Linux
Guards:      the engine's baton
Invariants:  D1 executions that differ only in the order of independent events are looked at once (a few are
             begun twice and cut off as `blocked`), D2 every other one is looked at
Leaves out:  wake-up trees (optimal DPOR): measured, few executions are blocked
Read next:   explore/strategies.py for searches that do not exhaust, explore/memory_lkmm.py for labels

The happens-before clock of an event is the set of events that must come before it in every equivalent
execution, itself included. Two adjacent events of different tasks race if the later one could have come
first with another result; then some task that leads there is tried in the earlier one's place.

Where memory is weak an access has several possible results in one state, its labels. A task is tried with
each of them. The sleep set holds, per task, what need not be tried again below a node: for each sleeping
label whether it stores.
"""

from typing import Any

from kmodel.core.report import KernelBug
from kmodel.explore.events import Runner


class Node:
    """One step of the schedule that is being extended."""

    __slots__ = (
        "asleep",
        "done",
        "enabled",
        "isw",
        "key",
        "kind",
        "label",
        "labels",
        "preemptions",
        "previous",
        "sleep",
        "task",
        "todo",
        "weight",
    )

    def __init__(self, task: int, enabled: int, sleep: dict[int, Any], previous: int) -> None:
        self.task = task
        self.label: Any = None
        self.labels: list[Any] = []  # still to be tried for `task`
        self.todo = 1 << task
        self.done = 0
        self.asleep = 0  # tasks of which every label sleeps
        self.enabled = enabled
        self.sleep = sleep
        self.previous = previous
        self.preemptions = 0
        self.weight = 0  # above the frontier of a split search: about how many jobs lie below
        self.kind: int | None = None
        self.key: Any = None
        self.isw: Any = False


class Deadlock(KernelBug):
    """No task that must still end can go on."""


class Search:
    """Source-DPOR. `reduce=False` tries every interleaving; `preemptions` bounds how many are tried."""

    name = "dpor"
    exhausts = True

    def __init__(self, *, reduce: bool = True, preemptions: int | None = None) -> None:
        self.reduce = reduce
        if not reduce and type(self) is Search:
            self.name = "brute"
        self.bound = preemptions
        self.sleeping = reduce and preemptions is None
        self.cut = 0
        self.e: Any = None

    def attach(self, engine: Any) -> None:
        """Work for this engine."""
        self.e = engine
        engine.search = self

    def begin(self) -> None:
        """An execution begins."""

    # -- below the replayed prefix

    def extend(self, me: Runner | None) -> Runner | None:
        """A new step: which task makes it. None: the execution is over, engine.over says how."""
        e = self.e
        enabled = e.enabled() if e.waiting else e.live
        if not enabled:
            self.ended()
            return None
        d = e.depth
        stack = e.stack
        sleep: dict[int, Any] = {}
        candidates = enabled
        asleep = 0
        if d and self.sleeping:
            parent = stack[d - 1]
            if parent.sleep:
                sleep = e.still_asleep(parent)
                for t in sleep:
                    if candidates >> t & 1 and self.awake(e.runners[t], sleep) is None:
                        asleep |= 1 << t
                candidates &= ~asleep
                if not candidates:
                    e.over = "blocked"
                    return None
        if me is not None and me.flusher is not None and candidates & me.flusher.bit:
            chosen: Runner = me.flusher  # the most ordinary thing is that a store arrives at once
        elif me is not None and candidates & me.bit:
            chosen = me
        else:
            chosen = e.runners[(candidates & -candidates).bit_length() - 1]
        node = Node(chosen.idx, enabled, sleep, e.last_runner)
        node.asleep = asleep
        if e.labelled:
            labels = self.awake(chosen, sleep)
            assert labels is not None
            node.label = chosen.label = labels[0]
            if len(labels) > 1:
                node.labels = labels[1:]
        if not self.reduce:
            node.todo = enabled
        if self.bound is not None:
            node.preemptions = (stack[d - 1].preemptions if d else 0) + self.preempts(node, chosen.idx)
        stack.append(node)
        return chosen

    def awake(self, runner: Runner, sleep: dict[int, Any]) -> list[Any] | None:
        """The labels with which this task is still to be tried; None if it sleeps."""
        entry = sleep[runner.idx] if runner.idx in sleep else None
        if not self.e.labelled:
            return None if entry is not None else [None]
        labels = self.e.labels(runner)
        if entry:
            labels = [label for label in labels if label not in entry]
        return labels or None

    def arrive(self, node: Node, runner: Runner) -> bool:
        """At a node of the prefix a task is tried for the first time: find its labels. False: none left."""
        labels = self.awake(runner, node.sleep) if self.sleeping else self.e.labels(runner)
        if not labels:
            return False
        node.label = labels[0]
        node.labels = labels[1:]
        return True

    def ended(self) -> None:
        """Nothing can go on: done, or a deadlock."""
        e = self.e
        if self.reduce:
            for runner in e.waiting:
                e.blocked_races(runner)
        if any(not r.finished and not r.daemon for r in e.runners):
            e.fail(e.oracles.deadlock())
        else:
            e.over = "done"

    # -- races

    def race(self, earlier: int, clock: int, me: Runner) -> None:
        """The access that `me` makes, after the events `clock`, could come before event `earlier`: have that
        tried.

        What leads there is every event since that does not depend on `earlier`, then the access. Any task
        that has the first
        of them (one with nothing of them before it) will do, so nothing is added if one is to be tried
        already.
        """
        if not self.reduce:
            return
        e = self.e
        node = e.stack[earlier]
        todo = node.todo
        clk, evt = e.clk, e.evt
        inside = first = 0
        for k in range(earlier + 1, e.depth):
            its = clk[k]
            if its >> earlier & 1:
                continue
            if not its & inside:
                bit = 1 << evt[k]
                if todo & bit:
                    return
                first |= bit
            inside |= 1 << k
        if not clock & inside:
            first |= me.bit
        if first & (todo | node.asleep):
            return
        possible = first & node.enabled
        if not possible:
            node.todo |= node.enabled
        elif possible & me.bit:
            node.todo |= me.bit
        else:
            node.todo |= possible & -possible
        if self.bound is not None:
            self._conservative(earlier, me)

    def _conservative(self, earlier: int, me: Runner) -> None:
        """Where preemptions are counted, also try to switch where the interrupted task got the CPU."""
        stack = self.e.stack
        i = earlier
        while i > 0 and stack[i - 1].task == stack[earlier].task:
            i -= 1
        if stack[i].enabled & me.bit:
            stack[i].todo |= me.bit

    # -- after an execution

    @staticmethod
    def preempts(node: Node, task: int) -> int:
        """Whether running `task` here takes the CPU from a task that could go on."""
        previous = node.previous
        return int(previous >= 0 and previous != task and bool(node.enabled >> previous & 1))

    def advance(self, reason: str | None) -> bool:
        """Choose the next schedule; False when there is none."""
        e = self.e
        if e.violation is not None:
            return False
        stack = e.stack
        while stack:
            node = stack[-1]
            if node.label is not None and self.sleeping:
                # A new dict: nodes further up share the old one.
                before = node.sleep[node.task] if node.task in node.sleep else {}
                node.sleep[node.task] = {**before, node.label: node.isw}
            if node.labels:
                node.label = node.labels.pop(0)
                e.plen = len(stack)
                return True
            task = node.task
            node.done |= 1 << task
            if self.sleeping and not e.labelled:
                node.sleep[task] = node.isw
            rest = node.todo & ~node.done
            while rest:
                bit = rest & -rest
                task = bit.bit_length() - 1
                if node.asleep & bit:
                    node.done |= bit
                elif self.bound is not None and self._too_many(node, task, len(stack) - 1):
                    self.cut += 1
                    node.done |= bit
                else:
                    break
                rest &= ~bit
            if rest:
                node.task = task
                node.label = None
                node.labels = []
                node.kind = node.key = None
                e.plen = len(stack)
                return True
            stack.pop()
        return False

    def _too_many(self, node: Node, task: int, depth: int) -> bool:
        before = self.e.stack[depth - 1].preemptions if depth else 0
        count = before + self.preempts(node, task)
        assert self.bound is not None
        if count > self.bound:
            return True
        node.preemptions = count
        return False
