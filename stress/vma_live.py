"""The model beside the running kernel: the same random system calls, maps and errno compared after each.

    python -m stress.vma_live --seconds 3600 --seed 7
    python -m stress.vma_live --seconds 60 --ops mmap,touch,mprotect

A difference is cut down to a shortest sequence of calls and printed with both sides' maps. Ctrl-C stops it
and prints the tally. Linux on x86-64 only.
"""

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from kmodel.mm import flags
from stress.vma_live_sides import (
    ARENA,
    ARENA_PAGES,
    FILE_PAGES,
    PAGE,
    Call,
    Difference,
    Line,
    Model,
    RunningKernel,
    compare,
    step,
    why_not_here,
)

PRIVATE, SHARED, ANON = flags.MAP_PRIVATE, flags.MAP_SHARED, flags.MAP_ANONYMOUS
FIXED, NOREPLACE = flags.MAP_FIXED, flags.MAP_FIXED_NOREPLACE
MAYMOVE, TO, DONTUNMAP = flags.MREMAP_MAYMOVE, flags.MREMAP_FIXED, flags.MREMAP_DONTUNMAP
TASK_SIZE = flags.TASK_SIZE

ADVICE: Final = (0, 1, 2, 3, 4, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)
OPS: Final = ("mmap", "munmap", "mprotect", "mremap", "madvise", "touch", "peek", "brk", "name")
WRAPS: Final = ((1 << 64) - 1, (1 << 64) - PAGE)
HEAP: Final = ARENA + 40 * PAGE


class Chooser:
    """Random calls for the state that the arena is in."""

    def __init__(self, seed: int, ops: Sequence[str]) -> None:
        self.random = random.Random(seed)
        weights = {"mmap": 30, "munmap": 9, "mprotect": 18, "mremap": 14, "madvise": 16, "touch": 20}
        self.ops = list(ops)
        self.weights = [weights.get(op, 3) for op in self.ops]
        plain = {"mmap": 30, "munmap": 5, "mprotect": 12, "mremap": 28, "madvise": 5, "touch": 25}
        self.plain_weights = [plain.get(op, 1) for op in self.ops]
        # A sequence uses few pages, or all: neighbours meet more often where there are few.
        self.pages = ARENA_PAGES
        self.few_kinds = False
        self.plain = False
        self.heap = False

    def begin(self) -> list[Call]:
        """A new sequence begins: its first calls."""
        self.pages = self.random.choice((8, 16, 32, ARENA_PAGES))
        self.few_kinds = self.random.random() < 0.6
        # Mappings that only their private pages keep apart.
        self.plain = self.few_kinds and self.random.random() < 0.6
        self.heap = "brk" in self.ops and self.random.random() < 0.25
        return [("heap", HEAP)] if self.heap else []

    def call(self, maps: Sequence[Line]) -> Call:
        """A call that has a chance to do something where these mappings are."""
        weights = self.plain_weights if self.plain else self.weights
        (op,) = self.random.choices(self.ops, weights)
        if op == "brk" and not self.heap:
            op = "mmap"
        make: Callable[[Sequence[Line]], Call] = getattr(self, f"_{op}")
        return make(maps)

    # where --------------------------------------------------------------------------------------------

    def _page(self, maps: Sequence[Line]) -> int:
        """A page, by preference an edge of a mapping or its neighbour."""
        if maps and self.random.random() < 0.6:
            line = self.random.choice(maps)
            return min(
                max(self.random.choice(line[:2]) + self.random.choice((-1, 0, 0, 0, 1)), 0), self.pages
            )
        return self.random.randrange(self.pages)

    def _range(self, maps: Sequence[Line]) -> tuple[int, int]:
        """Address and length, nearly always whole pages inside the arena."""
        a, b = self._page(maps), self._page(maps)
        luck = self.random.random()
        if maps and luck < 0.25:
            a, b = self.random.choice(maps)[:2]  # a whole mapping
        elif len(maps) > 1 and luck < 0.4:
            i = self.random.randrange(1, len(maps))
            a, b = maps[i - 1][1], maps[i][0]  # what is between two
        elif maps and luck < 0.5:
            start, end = self.random.choice(maps)[:2]  # a part of one
            cut = self.random.randrange(start, end)
            a, b = self.random.choice(((start, cut), (cut, end), (cut, cut + 1)))
        a, b = min(a, b, ARENA_PAGES), min(max(a, b), ARENA_PAGES)
        if a == b:
            b = min(a + self.random.randrange(1, 5), ARENA_PAGES)
        addr, length = ARENA + a * PAGE, (b - a) * PAGE
        odd = self.random.random()
        if odd < 0.02:
            addr += self.random.choice((1, 8, 2048, 4095))
            length = max(length - PAGE, 0)
        elif odd < 0.06:
            length = max(length - self.random.choice((1, 100, 4095)), 0)
        elif odd < 0.07:
            length = self.random.choice((0, 1 << 47, (1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 4096))
        return addr, length

    def _range_in_arena(self, maps: Sequence[Line]) -> tuple[int, int]:
        """A range for calls that pass over holes: they must not get at the rest of the process."""
        addr, length = self._range(maps)
        return addr, length if length <= ARENA_PAGES * PAGE else self.random.choice(WRAPS)

    def _prot(self) -> int:
        if self.plain:
            return 3 if self.random.random() < 0.9 else 1
        if self.few_kinds:
            return self.random.choice((1, 3, 3))
        return self.random.choice((0, 1, 1, 2, 3, 3, 3, 3, 4, 5, 5, 6, 7))

    # what ---------------------------------------------------------------------------------------------

    def _mmap(self, maps: Sequence[Line]) -> Call:
        pick = self.random
        addr, length = self._range(maps)
        file = pick.choice((None, None, None, "A", "A", "B"))
        if pick.random() < 0.08:
            file = pick.choice(("A2", "Ar", "Ar", "Aw"))
        kind = PRIVATE if pick.random() < 0.75 else SHARED
        if self.plain and pick.random() < 0.95:
            file, kind = (None if self.heap else pick.choice((None, None, "A"))), PRIVATE
        bits = kind | (ANON if file is None else 0)
        place = pick.random()
        if place < 0.8:
            bits |= FIXED
            if length > 1 << 40 and addr + length < 1 << 63:
                length = PAGE  # the process would go
        elif place < 0.9:
            bits |= NOREPLACE
        if length >= 1 << 40 and not bits & (FIXED | NOREPLACE):
            length |= 1 << 47  # refused, not put where the process is
        if pick.random() < (0.02 if self.plain else 0.1):
            bits |= flags.MAP_NORESERVE
        if pick.random() < 0.04:
            bits |= pick.choice(
                (
                    flags.MAP_STACK,
                    flags.MAP_GROWSDOWN,
                    flags.MAP_GROWSDOWN,
                    0x80_0000,
                    0x800,
                    0x1000,
                    0x8,
                    0x400_0000,
                )
            )
        if pick.random() < 0.03:
            bits = bits & ~0xF | pick.choice((0, 3, 4, 8, 8, 8, 9))
        if pick.random() < 0.01:
            bits ^= ANON  # no file where one is wanted, or the reverse
            file = file if file is not None else pick.choice((None, "B"))
        # Offsets that continue a neighbour, or close to them, so that file mappings merge.
        page = (addr - ARENA) // PAGE
        if pick.random() < (0.05 if self.plain else 0.3):
            page = pick.randrange(FILE_PAGES)
        elif pick.random() < 0.05:
            page = pick.choice((FILE_PAGES - 1, FILE_PAGES, 1 << 51, (1 << 51) - 1, (1 << 52) - 1))
        prot = self._prot()
        if pick.random() < 0.01:
            prot |= pick.choice((8, 16, 0x100_0000))
        return ("mmap", addr, length, prot, bits, file, max(page, 0))

    def _munmap(self, maps: Sequence[Line]) -> Call:
        return ("munmap", *self._range(maps))

    def _mprotect(self, maps: Sequence[Line]) -> Call:
        prot = self._prot()
        if self.random.random() < 0.03:
            prot |= self.random.choice((8, 16, 0x100_0000, 0x200_0000, 0x300_0000))
            # PROT_GROWSDOWN looks for the next mapping, however far.
            return ("mprotect", *self._range_in_arena(maps), prot)
        return ("mprotect", *self._range(maps), prot)

    def _mremap(self, maps: Sequence[Line]) -> Call:
        pick = self.random
        addr, length = self._range(maps)
        to = ARENA + self._page(maps) * PAGE
        if maps and pick.random() < 0.3:
            below = ARENA + pick.choice(maps)[0] * PAGE - length  # so that it ends where another begins
            to = below if ARENA <= below < ARENA + ARENA_PAGES * PAGE and below % PAGE == 0 else to
        room = (ARENA_PAGES - (to - ARENA) // PAGE) * PAGE
        kind = pick.random()
        new_length = length
        if pick.random() < 0.35:
            new_length = pick.randrange(0, 12) * PAGE - pick.choice((0, 0, 0, 5)) % PAGE
        if kind < 0.6:
            bits = MAYMOVE | TO
            if new_length < 1 << 40:
                new_length = min(new_length, room)
        elif kind < 0.75:
            bits = MAYMOVE
        elif kind < 0.9:
            bits = 0
        elif kind < 0.97:
            bits = MAYMOVE | DONTUNMAP | pick.choice((0, TO, TO))
            if pick.random() < 0.8:
                new_length = length
            new_length = min(new_length, room)
        else:
            bits = pick.choice((TO, DONTUNMAP, 8, DONTUNMAP | TO, MAYMOVE | 16))
            new_length = min(new_length, room)
        if pick.random() < 0.02:
            length = 0
        if pick.random() < 0.01:
            to += 8
        if new_length > 1 << 40 or length > 1 << 40:
            new_length |= 1 << 47
        return ("mremap", addr, length, new_length & ((1 << 64) - 1), bits, to)

    def _madvise(self, maps: Sequence[Line]) -> Call:
        advice = self.random.choice((10, 11) if self.few_kinds else ADVICE)
        if self.random.random() < 0.01:
            advice = self.random.choice((5, 7, 26, 99, -1))
        return ("madvise", *self._range_in_arena(maps), advice)

    def _touch(self, maps: Sequence[Line]) -> tuple[str, int]:
        if maps and self.random.random() < 0.9:
            start, end = self.random.choice(maps)[:2]
            page = self.random.randrange(start, end)
        else:
            page = self.random.randrange(self.pages)
        return ("touch", ARENA + page * PAGE + self.random.randrange(PAGE))

    def _peek(self, maps: Sequence[Line]) -> Call:
        addr: int = self._touch(maps)[1]
        return ("peek", addr & ~(PAGE - 1))

    def _brk(self, maps: Sequence[Line]) -> Call:
        return ("brk", HEAP + self.random.choice((-8, 0, 0, 1, 8, 100)) + self.random.randrange(0, 20) * PAGE)

    def _name(self, maps: Sequence[Line]) -> Call:
        name = self.random.choice((None, "a", "a", "b", "bad[", "x" * 79, "x" * 80))
        return ("name", *self._range_in_arena(maps), name)


# --------------------------------------------------------------------------------------------- shortening


def shorten(kernel: RunningKernel, model: Model, found: Difference, tries: int = 3000) -> Difference:
    """The difference again, after as few and as small calls as leaving out and cutting down can make it."""

    def fails(calls: Sequence[Call]) -> Difference | None:
        try:
            compare(kernel, model, calls)
        except Difference as difference:
            return difference
        return None

    best = fails(found.calls) or found
    smaller = True
    while smaller:
        smaller = False
        for attempt in smaller_than(best.calls):
            tries -= 1
            difference = fails(attempt)
            if difference is not None:
                best, smaller = difference, True
                break
            if not tries:
                return best
    return best


def smaller_than(calls: Sequence[Call]) -> Iterator[list[Call]]:
    """Sequences like this one without some calls, most of them first; then with one call made smaller."""
    count = len(calls)
    size = count // 2
    while size:
        for i in range(0, count, size):
            yield [*calls[:i], *calls[i + size :]]
        size //= 2
    if count <= 16:
        for i in range(count):
            for j in range(i + 1, count):
                yield [*calls[:i], *calls[i + 1 : j], *calls[j + 1 :]]
    for i, (name, *args) in enumerate(calls):
        for k, value in enumerate(args):
            if not isinstance(value, int) or value < PAGE:
                continue
            simpler = {value & ~(PAGE - 1)} - {value}
            if value < ARENA:
                simpler |= {PAGE, value // 2 & ~(PAGE - 1)} - {0, value}
            for other in sorted(simpler):
                if other < value:
                    yield [*calls[:i], (name, *args[:k], other, *args[k + 1 :]), *calls[i + 1 :]]


# ------------------------------------------------------------------------------------------------ running


class Tally:
    """What was done."""

    def __init__(self) -> None:
        self.steps = 0
        self.sequences = 0
        self.calls: Counter[str] = Counter()
        self.succeeded: Counter[str] = Counter()
        self.most_mappings = 0

    def __str__(self) -> str:
        parts = ", ".join(f"{op} {n} ({self.succeeded[op]} ok)" for op, n in sorted(self.calls.items()))
        done = f"{self.steps:,} steps in {self.sequences:,} sequences"
        return f"{done}: {parts}; at most {self.most_mappings} mappings"


def one_sequence(
    kernel: RunningKernel, model: Model, choose: Chooser, length: int, tally: Tally, smaps_every: int
) -> None:
    """One random sequence of calls from an empty arena on. Difference if the sides do not agree."""
    kernel.reset()
    model.reset()
    calls: list[Call] = []
    before: list[Line] = []
    pending = choose.begin()
    for i in range(length):
        calls.append(pending.pop() if pending else choose.call(before))
        smaps = bool(smaps_every) and i % smaps_every == smaps_every - 1
        after, errno = step(kernel, model, calls, before, smaps=smaps)
        tally.steps += 1
        tally.calls[calls[-1][0]] += 1
        tally.succeeded[calls[-1][0]] += not errno
        tally.most_mappings = max(tally.most_mappings, len(after))
        before = after
    model.check()
    tally.sequences += 1


def seeds(first: int) -> Iterator[int]:
    """One seed per sequence: a sequence can be run again without those before it."""
    state = random.Random(first)
    yield first
    while True:
        yield state.randrange(1 << 32)


def allowed(kernel: RunningKernel, ops: Sequence[str], *, heap: bool) -> list[str]:
    """Those of the operations that this kernel and this process can do."""
    able = list(ops)
    if "name" in able and not kernel.has_names:
        able.remove("name")  # CONFIG_ANON_VMA_NAME is off
    if "brk" in able and not (heap and kernel.move_heap(HEAP)):
        able.remove("brk")  # needs CAP_SYS_RESOURCE
    return able


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m stress.vma_live", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps")
    parser.add_argument("--length", type=int, default=120, help="calls per sequence (default 120)")
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated, of " + ",".join(OPS))
    parser.add_argument("--smaps-every", type=int, default=4, help="compare VM flags too, each Nth step")
    args = parser.parse_args(argv)
    reason = why_not_here()
    if reason:
        print(f"vma_live: {reason}", file=sys.stderr)
        return 2
    release = os.uname()
    overcommit = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    tally = Tally()
    started = shown = time.monotonic()
    with RunningKernel() as kernel:
        model = Model(kernel)
        ops = allowed(kernel, args.ops.split(","), heap=True)
        print(
            f"kernel {release.release} {release.machine}, overcommit_memory {overcommit}, seed {args.seed}, "
            f"operations: {' '.join(ops)}",
            flush=True,
        )
        try:
            for seed in seeds(args.seed):
                now = time.monotonic()
                if now - started > args.seconds or (args.steps and tally.steps >= args.steps):
                    break
                if now - shown > 10:
                    shown = now
                    print(f"{now - started:6.0f} s  {tally.steps:,} steps, no difference", flush=True)
                choose = Chooser(seed, ops)
                one_sequence(kernel, model, choose, args.length, tally, args.smaps_every)
        except Difference as found:
            print(f"{found.what} differ; sequence seed {seed}; shortening ...", flush=True)
            print(shorten(kernel, model, found))
            print(f"again: python -m stress.vma_live --seed {seed} --steps 1 --ops {','.join(ops)}")
            return 1
        except KeyboardInterrupt:
            print("stopped")
    seconds = time.monotonic() - started
    print(tally)
    print(f"no difference; {seconds:.0f} s, {tally.steps / max(seconds, 1e-9):,.0f} steps/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
