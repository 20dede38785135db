"""What both sides of the comparison can do, and what is compared after every step.

A step is a tuple, its name first. Files are A and B, slots are pages of the arena, processes are numbers:

    ("map", process, slot, pages, prot, file, pgoff)   MAP_PRIVATE | MAP_FIXED
    ("unmap", process, slot, pages)
    ("protect", process, slot, pages, prot)
    ("call", process, calls)                           calls: see target.c
    ("threads", process, n, calls)
    ("fork", process, child)
    ("leave", process)                                 a child exits
    ("write", process, slot, counter, value)           the program stores into its counter
    ("probe", name, kind, file, place, page, counter)  kind: p, r (tracefs), or of one process:
    ("perf", name, kind, file, place, page, counter, process)
    ("drop", name)
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import attrs

from stress.uprobe_live.program import ARENA, FUNCTIONS, PAGE, SLOTS, offset_of

type Step = tuple[str, *tuple[Any, ...]]

COUNTERS: Final = 4
COUNTERS_AT: Final = PAGE + 0x800
"""File offset of the counters. The bytes of that page that are at functions' places are int3."""
SEEN: Final = 0x810
"""So many bytes of every slot are compared: functions and counters."""


@attrs.frozen
class Hit:
    """A handler ran: for which process, whose event, at which function; the entry or the return."""

    process: int
    event: str
    place: int


@attrs.frozen
class State:
    """What both sides must agree on after a step."""

    answer: int
    """errno, or the signal that ended the calls."""
    hits: tuple[Hit, ...]
    """In order; sorted where threads ran."""
    counts: dict[str, int]
    """Of the consumers that only count (perf), since they were made."""
    memory: dict[tuple[int, int], bytes | None]
    """(process, slot): the bytes there."""


class Side(Protocol):
    """One of the two."""

    def do(self, step: Step) -> State:
        """One step, and what can be seen after it."""

    def close(self) -> None:
        """The end: nothing of it is left."""


def counter_at(counter: int | None) -> int:
    """The file offset of a counter; 0 for no counter."""
    return 0 if counter is None else COUNTERS_AT + 2 * counter


def place_of(place: str | int, page: int) -> int:
    """A function's letter, or an offset in the page, as offset in the file."""
    return offset_of(place, page) if isinstance(place, str) else page * PAGE + place


def contents(text: bytes) -> bytes:
    """A file of code: code, a page of counters (int3 where functions would be), the code again.

    The counters do not begin at 0: one that would become negative, because its page was mapped anew, makes
    the kernel leak a uprobe.
    """
    middle = (b"\xcc" * 0x400).ljust(COUNTERS_AT - PAGE, b"\0") + (100).to_bytes(2, "little") * COUNTERS
    return text + middle.ljust(PAGE, b"\0") + text


@attrs.frozen
class Difference(Exception):
    """After the last of these steps the two sides differ."""

    steps: Sequence[Step]
    what: str
    kernel: Any
    model: Any

    def __str__(self) -> str:
        lines = [f"after {len(self.steps)} steps the {self.what} differ:"]
        lines += [f"    {step}" for step in self.steps]
        for side, value in (("kernel", self.kernel), ("model", self.model)):
            lines.append(f"{side}:")
            lines += [f"    {line}" for line in (value if isinstance(value, list) else [value])]
        return "\n".join(lines)


def differing_bytes(one: dict[Any, bytes | None], two: dict[Any, bytes | None]) -> list[str]:
    """Where `one` differs from `two`, and what it has there."""
    found = []
    for process, slot in sorted(one.keys() | two.keys()):
        here, there = one.get((process, slot)), two.get((process, slot))
        if here == there:
            continue
        if here is None or there is None:
            found.append(
                f"process {process} slot {slot}: {'nothing' if here is None else 'something'} mapped"
            )
            continue
        at = [n for n in range(min(len(here), len(there))) if here[n] != there[n]]
        for n in at[:8]:
            function = FUNCTIONS[n // 64] if n // 64 < len(FUNCTIONS) else "?"
            found.append(f"process {process} slot {slot}+{n:#x} (function {function}): {here[n]:#04x}")
    return found


def compare(steps: Sequence[Step], kernel: State, model: State) -> None:
    """Difference unless the states are equal."""
    if kernel.answer != model.answer:
        raise Difference(list(steps), "answers", kernel.answer, model.answer)
    if kernel.hits != model.hits:
        raise Difference(list(steps), "hits", list(kernel.hits), list(model.hits))
    if kernel.counts != model.counts:
        raise Difference(list(steps), "counts", kernel.counts, model.counts)
    if kernel.memory != model.memory:
        raise Difference(
            list(steps),
            "bytes in memory",
            differing_bytes(kernel.memory, model.memory),
            differing_bytes(model.memory, kernel.memory),
        )


def slots() -> list[tuple[int, int]]:
    """(slot, address) of the arena."""
    return [(slot, ARENA + slot * PAGE) for slot in range(SLOTS)]
