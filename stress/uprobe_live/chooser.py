"""Random steps, runs of them on both sides, and the cutting down of a run that differs."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import attrs

from stress.uprobe_live.kernel import RunningKernel
from stress.uprobe_live.model import Model
from stress.uprobe_live.program import FILE_PAGES, FUNCTIONS, MOST_PROCESSES, SLOTS
from stress.uprobe_live.sides import COUNTERS, Difference, State, Step, compare

WEIGHTS: Final = {
    "map": 20,
    "unmap": 3,
    "protect": 4,
    "call": 30,
    "threads": 4,
    "fork": 5,
    "leave": 3,
    "write": 3,
    "probe": 16,
    "perf": 7,
    "drop": 12,
}
MOST_EVENTS: Final = 6


class Run:
    """What exists: which steps are possible."""

    def __init__(self) -> None:
        self.processes = {0}
        self.events: dict[str, Step] = {}

    def possible(self, step: Step) -> bool:
        """Whether the processes and events that the step names are there (or not yet)."""
        name, *args = step
        match name:
            case "probe":
                return args[0] not in self.events
            case "perf":
                return args[0] not in self.events and args[6] in self.processes
            case "drop":
                return args[0] in self.events
            case "fork":
                return args[0] in self.processes and args[1] not in self.processes
            case "leave":
                return args[0] in self.processes and args[0] != 0
        return args[0] in self.processes

    def done(self, step: Step, answer: int) -> None:
        """The step was taken."""
        name, *args = step
        match name:
            case "probe" | "perf" if not answer:
                self.events[args[0]] = step
            case "drop":
                del self.events[args[0]]
            case "fork":
                self.processes.add(args[1])
            case "leave":
                self.processes.discard(args[0])


class Chooser:
    """Random steps that have a chance to do something."""

    def __init__(self, seed: int, kinds: Sequence[str], leave_out: str = "") -> None:
        self.random = random.Random(seed)
        self.kinds = kinds
        self.places = [letter for letter in FUNCTIONS if letter not in leave_out]
        # Few places: consumers share them, calls hit them.
        self.places = self.random.sample(self.places, self.random.choice((1, 2, 4, len(self.places))))
        self._names = 0
        # tracefs wants one counter for all events of a place, also those that are switched off.
        self._counters: dict[tuple[str, str, int], int | None] = {}

    def step(self, run: Run) -> Step:
        """A step that is possible now."""
        while True:
            (name,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            made = getattr(self, f"_{name}")(run)
            if made is not None and run.possible((name, *made)):
                return (name, *made)

    def _process(self, run: Run) -> int:
        return self.random.choice(sorted(run.processes))

    def _slots(self) -> tuple[int, int]:
        slot = self.random.randrange(SLOTS)
        return slot, self.random.choice([1, 1, 1, *range(1, SLOTS - slot + 1)])

    def _map(self, run: Run) -> tuple[object, ...]:
        slot, pages = self._slots()
        prot, pgoff = self.random.choice(
            ((5, 0), (5, 0), (5, 0), (5, 2), (3, 1), (3, 1), (7, 0), (5, 1), (1, 0))
        )
        if self.random.random() < 0.1:
            pgoff = self.random.randrange(FILE_PAGES + 1)
        return self._process(run), slot, pages, prot, self.random.choice("AAB"), pgoff

    def _unmap(self, run: Run) -> tuple[object, ...]:
        return self._process(run), *self._slots()

    def _protect(self, run: Run) -> tuple[object, ...]:
        return self._process(run), *self._slots(), self.random.choice((5, 5, 3, 7, 1))

    def _calls(self) -> str:
        length = self.random.choice((1, 3, 8, 30, 100))
        letters = [*self.places, *self.places, "l", self.random.choice(FUNCTIONS)]
        home = self.random.randrange(SLOTS)
        calls = []
        for _ in range(length):
            luck = self.random.random()
            if luck < 0.45:
                calls.append(".")
            elif luck < 0.5:
                calls.append("!")
            else:
                letter = self.random.choice(letters)
                slot = home if self.random.random() < 0.85 else self.random.randrange(SLOTS)
                calls.append((letter.upper() if self.random.random() < 0.2 else letter) + str(slot))
        return "".join(calls)

    def _call(self, run: Run) -> tuple[object, ...]:
        return self._process(run), self._calls()

    def _threads(self, run: Run) -> tuple[object, ...]:
        return self._process(run), self.random.randrange(1, 4), self._calls()

    def _fork(self, run: Run) -> tuple[object, ...] | None:
        free = set(range(MOST_PROCESSES)) - run.processes
        return (self._process(run), min(free)) if free else None

    def _leave(self, run: Run) -> tuple[object, ...]:
        return (self._process(run),)

    def _write(self, run: Run) -> tuple[object, ...]:
        # Never a small value: a counter that would become negative makes the kernel leak a uprobe.
        value = 100 + self.random.randrange(100)
        return self._process(run), self.random.randrange(SLOTS), self.random.randrange(COUNTERS), value

    def _where(self) -> tuple[str, str, int, int | None]:
        # Not page 1, which holds int3 of the file's own. Where a process still has MMF_HAS_UPROBES of an
        # earlier run, an unregister takes one for its own and writes a zero there, in Linux; the model's
        # processes are fresh.
        place = self.random.choice("AAB"), self.random.choice(self.places), self.random.choice((0, 0, 0, 2))
        counter = self.random.choice((None, None, *range(COUNTERS)))
        return *place, self._counters.setdefault(place, counter)

    def _event(self, run: Run) -> tuple[str, str] | None:
        if len(run.events) >= MOST_EVENTS:
            return None
        self._names += 1
        return f"e{self._names}", self.random.choice(self.kinds)

    def _probe(self, run: Run) -> tuple[object, ...] | None:
        event = self._event(run)
        return (*event, *self._where()) if event else None

    def _perf(self, run: Run) -> tuple[object, ...] | None:
        event = self._event(run)
        if event is None:
            return None
        *place, counter = self._where()
        if self.random.random() < 0.1:
            counter = self.random.randrange(COUNTERS)
        return (*event, *place, counter, self._process(run))

    def _drop(self, run: Run) -> tuple[object, ...] | None:
        return (self.random.choice(sorted(run.events)),) if run.events else None


# ------------------------------------------------------------------------------------------------- running


@attrs.define
class Tally:
    """What was done."""

    steps: Counter[str] = attrs.field(factory=Counter)
    refused: Counter[str] = attrs.field(factory=Counter)
    hits: int = 0
    counted: int = 0
    sequences: int = 0

    def add(self, step: Step, state: State) -> None:
        """One step was compared."""
        self.steps[step[0]] += 1
        self.refused[step[0]] += bool(state.answer)
        self.hits += len(state.hits)

    def __str__(self) -> str:
        steps = sorted(self.steps.items())
        parts = ", ".join(f"{name} {n} ({self.refused[name]} refused)" for name, n in steps)
        total = f"{self.steps.total():,} steps in {self.sequences:,} sequences"
        return f"{total}, {self.hits:,} hits traced: {parts}"


def replay(kernel: RunningKernel, contents: bytes, steps: Sequence[Step], tally: Tally | None = None) -> None:
    """Do the steps on both sides, from nothing; those that are impossible are left out. Difference at the
    first that differs.
    """
    _run(kernel, contents, iter(steps), Run(), tally or Tally())


def one_sequence(kernel: RunningKernel, contents: bytes, choose: Chooser, length: int, tally: Tally) -> None:
    """One random sequence."""
    run = Run()
    _run(kernel, contents, (choose.step(run) for _ in range(length)), run, tally)
    tally.sequences += 1


def _run(kernel: RunningKernel, contents: bytes, steps: Iterator[Step], run: Run, tally: Tally) -> None:
    kernel.reset()
    model = Model(contents)
    done: list[Step] = []
    try:
        for step in steps:
            if not run.possible(step):
                continue
            done.append(step)
            real = kernel.do(step)
            compare(done, real, model.do(step))
            run.done(step, real.answer)
            tally.add(step, real)
    finally:
        model.close()


def shorten(kernel: RunningKernel, contents: bytes, found: Difference, tries: int = 400) -> Difference:
    """The difference again, after as few steps and calls as leaving out can make it."""
    best = found
    smaller = True
    while smaller and tries > 0:
        smaller = False
        for attempt in smaller_than(best.steps):
            tries -= 1
            try:
                replay(kernel, contents, attempt)
            except Difference as difference:
                best, smaller = difference, True
                break
            if tries <= 0:
                break
    return best


def smaller_than(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """The steps without some of them, most first; then with one program of calls made shorter."""
    count = len(steps)
    size = count // 2
    while size:
        for i in range(0, count, size):
            yield [*steps[:i], *steps[i + size :]]
        size //= 2
    for i, step in enumerate(steps):
        if step[0] not in ("call", "threads"):
            continue
        calls = split_calls(str(step[-1]))
        size = len(calls) // 2
        while size:
            for at in range(0, len(calls), size):
                shorter = "".join([*calls[:at], *calls[at + size :]])
                yield [*steps[:i], (step[0], *list(step)[1:-1], shorter), *steps[i + 1 :]]
            size //= 2


def split_calls(calls: str) -> list[str]:
    """The tokens of a program of calls."""
    tokens: list[str] = []
    for char in calls:
        if char.isdigit():
            tokens[-1] += char
        else:
            tokens.append(char)
    return tokens
