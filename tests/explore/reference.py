"""Litmus tests decided a second time: by visiting every state, with none of the explorer's code.

The rules are those of docs/explorer.md, written down as literally as possible: a view is one store per
location, a state is a value, and every rule gives all the states it may lead to. Slow, and meant to be.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Event = list[Any]
View = tuple[Any, ...]
"""Per location the store at or after which its holder must read; a store is (thread, its place)."""

START = (-1, -1)
"""The initial store of every location."""


class Task(NamedTuple):
    """What one thread knows; the letters are those of the rules."""

    pc: int
    registers: tuple[tuple[str, int], ...]
    r: View
    w: View
    f: View
    o: View
    k: View
    reading: bool = False


class GracePeriod(NamedTuple):
    """A synchronize_rcu() that has begun."""

    task: int
    start: View
    left: View
    waits_for: frozenset[int]


class State(NamedTuple):
    """All there is between two steps."""

    tasks: tuple[Task, ...]
    order: tuple[tuple[Any, ...], ...]  # per location: its stores, in coherence order
    stores: tuple[tuple[Any, tuple[int, View, bool]], ...]  # store: value, what it carries, glued to the last
    g: View
    gp: View
    rd: View
    periods: tuple[GracePeriod, ...] = ()


class Lkmm:
    """The states of one test under the kernel's memory model."""

    def __init__(self, test: dict[str, Any]) -> None:
        self.names = [*test["vars"], "the lock"]
        self.threads: list[list[Event]] = test["threads"]
        bottom: View = tuple(START for _ in self.names)
        task = Task(0, (), bottom, bottom, bottom, bottom, bottom)
        order = tuple((START,) for _ in self.names)
        self.bottom = bottom
        self.first = State(
            tuple(task for _ in self.threads), order, ((START, (0, bottom, False)),), bottom, bottom, bottom
        )

    def finals(self) -> set[tuple[tuple[str, int], ...]]:
        """Every final state, as run_litmus() gives its outcomes."""
        seen, pending, found = {self.first}, [self.first], set()
        while pending:
            state = pending.pop()
            if all(task.pc == len(self.threads[i]) for i, task in enumerate(state.tasks)):
                stores = dict(state.stores)
                final = {name: stores[state.order[i][-1]][0] for i, name in enumerate(self.names[:-1])}
                for i, task in enumerate(state.tasks):
                    final |= {f"{i}:{register}": value for register, value in task.registers}
                found.add(tuple(sorted(final.items())))
            for i in range(len(self.threads)):
                for after in self.steps(state, i):
                    if after not in seen:
                        seen.add(after)
                        pending.append(after)
        return found

    def steps(self, s: State, i: int) -> Iterator[State]:
        """What thread i may do next."""
        task = s.tasks[i]
        if task.pc == len(self.threads[i]):
            return
        match self.threads[i][task.pc]:
            case ["R", register, name, kind]:
                x = self.names.index(name)
                for m in s.order[x][s.order[x].index(task.r[x]) :]:
                    yield self._done(s, i, self._read(s, task, x, m, kind == "acquire", register))
            case ["W", name, value, kind]:
                yield from self._store(s, i, self.names.index(name), value, kind == "release")
            case ["X", register, name, value, kind]:
                yield from self._exchange(s, i, register, self.names.index(name), value, kind)
            case ["F", "rmb"]:
                yield self._done(s, i, task._replace(r=self.join(s, task.r, task.k)))
            case ["F", "wmb"]:
                w, f = self.join(s, task.w, task.o), self.join(s, task.f, task.o)
                yield self._done(s, i, task._replace(w=w, f=f))
            case ["F", "mb"]:
                s = self._mb(s, i)
                yield self._done(s, i, s.tasks[i])
            case ["L", "lock"]:
                yield from self._exchange(s, i, None, len(self.names) - 1, 1, "acquire")
            case ["L", "unlock"]:
                yield from self._store(s, i, len(self.names) - 1, 0, True)
            case ["RCU", what]:
                steps: Callable[[State, int], Iterator[State]] = getattr(self, f"_rcu_{what}")
                yield from steps(s, i)

    # -------------------------------------------------------------------------------------------- views

    def join(self, s: State, *views: View) -> View:
        """Per location, the latest in coherence order."""
        return tuple(max((v[x] for v in views), key=s.order[x].index) for x in range(len(self.names)))

    def _just(self, x: int, store: Any) -> View:
        return tuple(store if i == x else START for i in range(len(self.names)))

    def _mb(self, s: State, i: int) -> State:
        t = s.tasks[i]
        a = self.join(s, t.r, t.w, t.k, s.g)
        return self._put(s._replace(g=a), i, t._replace(r=a, w=a, f=a, k=a))

    @staticmethod
    def _put(s: State, i: int, task: Task) -> State:
        return s._replace(tasks=(*s.tasks[:i], task, *s.tasks[i + 1 :]))

    def _done(self, s: State, i: int, task: Task) -> State:
        return self._put(s, i, task._replace(pc=task.pc + 1))

    # ------------------------------------------------------------------------------------------ accesses

    def _read(self, s: State, t: Task, x: int, m: Any, acquire: bool, register: str | None) -> Task:
        value, carried, _glued = dict(s.stores)[m]
        seen = carried if acquire else self.bottom
        r, w = (self.join(s, view, self._just(x, m), seen) for view in (t.r, t.w))
        k = self.join(s, t.k, self._just(x, m), carried)
        registers = t.registers if register is None else (*t.registers, (register, value))
        return t._replace(r=r, w=w, k=k, registers=registers)

    def _store(self, s: State, i: int, x: int, value: int, release: bool) -> Iterator[State]:
        t, stores = s.tasks[i], dict(s.stores)
        behind = self.join(s, t.w, t.k)[x] if release else t.w[x]
        for place in range(s.order[x].index(behind) + 1, len(s.order[x]) + 1):
            if place < len(s.order[x]) and stores[s.order[x][place]][2]:
                continue  # a read-modify-write is glued there
            carries = self.join(s, t.f, t.k) if release else t.f
            yield self._landed(s, i, t, x, place, value, carries, glued=False)

    def _landed(
        self, s: State, i: int, t: Task, x: int, place: int, value: int, carries: View, *, glued: bool
    ) -> State:
        me = (i, t.pc)
        order = (*s.order[x][:place], me, *s.order[x][place:])
        s = s._replace(order=(*s.order[:x], order, *s.order[x + 1 :]))
        carries = self.join(s, carries, self._just(x, me))
        r, w = (self.join(s, view, self._just(x, me)) for view in (t.r, t.w))
        o, k = self.join(s, t.o, carries), self.join(s, t.k, carries)
        s = s._replace(stores=tuple(sorted([*s.stores, (me, (value, carries, glued))])))
        return self._done(s, i, t._replace(r=r, w=w, o=o, k=k))

    def _exchange(
        self, s: State, i: int, register: str | None, x: int, value: int, kind: str
    ) -> Iterator[State]:
        if kind == "full":
            s = self._mb(s, i)
        before, stores, order = s.tasks[i], dict(s.stores), s.order[x]
        for place, m in enumerate(order, 1):
            if place < len(order) and stores[order[place]][2]:
                continue
            if register is None and stores[m][0]:
                continue  # the lock is taken
            if place - 1 < order.index(before.r[x]):
                continue
            t = self._read(s, before, x, m, kind == "acquire", register)
            release = kind == "release"
            if place <= order.index((self.join(s, t.w, t.k) if release else t.w)[x]):
                continue
            carries = self.join(s, t.f, stores[m][1], t.k if release else self.bottom)
            if register is None:
                t = t._replace(f=self.join(s, t.f, stores[m][1]))
            after = self._landed(s, i, t, x, place, value, carries, glued=True)
            yield self._mb(after, i) if kind == "full" else after

    # ----------------------------------------------------------------------------------------------- RCU

    def _all(self, s: State, t: Task, view: View) -> Task:
        return t._replace(**{name: self.join(s, getattr(t, name), view) for name in "rwfk"})

    def _rcu_lock(self, s: State, i: int) -> Iterator[State]:
        reader = self._all(s, s.tasks[i], s.gp)._replace(reading=True)
        choices = [self._done(s, i, reader)]
        for n, period in enumerate(s.periods):
            waiting = period._replace(waits_for=period.waits_for | {i})
            for state in list(choices):
                choices.remove(state)
                choices.append(self._put(state, i, self._all(state, state.tasks[i], period.start)))
                periods = (*state.periods[:n], waiting, *state.periods[n + 1 :])
                choices.append(state._replace(periods=periods))
        yield from choices

    def _rcu_unlock(self, s: State, i: int) -> Iterator[State]:
        k = s.tasks[i].k
        periods = tuple(
            p._replace(left=self.join(s, p.left, k), waits_for=p.waits_for - {i}) if i in p.waits_for else p
            for p in s.periods
        )
        s = s._replace(rd=self.join(s, s.rd, k), periods=periods)
        yield self._done(s, i, s.tasks[i]._replace(reading=False))

    def _rcu_sync(self, s: State, i: int) -> Iterator[State]:
        running = [p for p in s.periods if p.task == i]
        if not running:
            s = self._mb(s, i)
            readers = frozenset(n for n, task in enumerate(s.tasks) if task.reading)
            begun = GracePeriod(i, s.tasks[i].k, self.bottom, readers)
            yield s._replace(periods=tuple(sorted((*s.periods, begun), key=lambda p: p.task)))
        elif not running[0].waits_for:
            t = self._all(s, s.tasks[i], self.join(s, running[0].left, s.rd))
            s = self._mb(self._put(s, i, t), i)
            s = s._replace(gp=self.join(s, s.gp, running[0].start))
            yield self._done(s._replace(periods=tuple(p for p in s.periods if p.task != i)), i, s.tasks[i])


def buffered(test: dict[str, Any], *, tso: bool) -> set[tuple[tuple[str, int], ...]]:
    """Every final state where each thread has a first-in first-out store buffer, or, without `tso`, none. No
    RCU.
    """
    threads: list[list[Event]] = test["threads"]
    first: Any = (tuple((0, ()) for _ in threads), tuple((name, 0) for name in [*test["vars"], "lock"]), ())
    seen, pending, found = {first}, [first], set()
    while pending:
        tasks, memory, registers = pending.pop()
        if all(pc == len(threads[i]) and not buffer for i, (pc, buffer) in enumerate(tasks)):
            final = {name: value for name, value in memory if name != "lock"}
            found.add(tuple(sorted((final | dict(registers)).items())))
        for i, (pc, buffer) in enumerate(tasks):
            for task, stored, got in _buffered_steps(threads[i][pc:], pc, buffer, dict(memory), tso=tso):
                after = (
                    (*tasks[:i], task, *tasks[i + 1 :]),
                    tuple(sorted((dict(memory) | stored).items())),
                    tuple(sorted([*registers, *((f"{i}:{register}", value) for register, value in got)])),
                )
                if after not in seen:
                    seen.add(after)
                    pending.append(after)
    return found


def _buffered_steps(
    rest: list[Event], pc: int, buffer: Any, memory: dict[str, int], *, tso: bool
) -> Iterator[tuple[Any, dict[str, int], list[tuple[str, int]]]]:
    """What one thread, or its buffer, may do next: its state then, what memory gets, what registers get."""
    if buffer:
        yield (pc, buffer[1:]), dict([buffer[0]]), []
    if not rest:
        return
    match rest[0]:
        case ["R", register, name, _]:
            yield (pc + 1, buffer), {}, [(register, {**memory, **dict(buffer)}[name])]
        case ["W", name, value, _]:
            yield ((pc + 1, (*buffer, (name, value))), {}, []) if tso else ((pc + 1, ()), {name: value}, [])
        case ["L", "unlock"]:
            yield ((pc + 1, (*buffer, ("lock", 0))), {}, []) if tso else ((pc + 1, ()), {"lock": 0}, [])
        case ["F", "rmb" | "wmb"]:
            yield (pc + 1, buffer), {}, []
        case ["F", "mb"] if not buffer:
            yield (pc + 1, ()), {}, []
        case ["L", "lock"] if not buffer and not memory["lock"]:
            yield (pc + 1, ()), {"lock": 1}, []
        case ["X", register, name, value, _] if not buffer:
            yield (pc + 1, ()), {name: value}, [(register, memory[name])]
