"""Uprobes of the model beside the running kernel's: the same random steps, everything compared after each.

    python -m stress.uprobe_live --seconds 3600 --seed 7

A difference is cut down to a shortest sequence of steps and printed with both sides. Needs root, tracefs and
gcc, on x86-64; probes one small program of its own and nothing else.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence

from stress.uprobe_live.chooser import Chooser, Tally, one_sequence, shorten
from stress.uprobe_live.kernel import RunningKernel, Workshop
from stress.uprobe_live.sides import Difference
from stress.uprobe_live.tracefs import why_not_here

KINDS = ("p",)


def seeds(first: int) -> Iterator[int]:
    """One seed per sequence: a sequence can be run again without those before it."""
    state = random.Random(first)
    yield first
    while True:
        yield state.randrange(1 << 32)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m stress.uprobe_live", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--sequences", type=int, default=0, help="stop after so many sequences")
    parser.add_argument("--length", type=int, default=60, help="steps per sequence (default 60)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of probes: p (entry), r (return)")
    args = parser.parse_args(argv)
    reason = why_not_here()
    if reason:
        print(f"uprobe_live: {reason}", file=sys.stderr)
        return 2
    tally = Tally()
    kinds = args.kinds.split(",")
    started = shown = time.monotonic()
    with Workshop() as workshop, RunningKernel(workshop) as kernel:
        rewritten = kernel.rewritten()
        print(
            f"kernel {os.uname().release} {os.uname().machine}, seed {args.seed}, probes {' '.join(kinds)}; "
            f"not probed: {rewritten or '(none)'}, long nops that this kernel replaces by a call or refuses",
            flush=True,
        )
        try:
            for seed in seeds(args.seed):
                now = time.monotonic()
                if now - started > args.seconds or (args.sequences and tally.sequences >= args.sequences):
                    break
                if now - shown > 10:
                    shown = now
                    print(f"{now - started:6.0f} s  {tally.steps.total():,} steps, no difference", flush=True)
                one_sequence(kernel, workshop.contents, Chooser(seed, kinds, rewritten), args.length, tally)
        except Difference as found:
            print(f"{found.what} differ; sequence seed {seed}; shortening ...", flush=True)
            print(shorten(kernel, workshop.contents, found))
            print(f"again: python -m stress.uprobe_live --seed {seed} --sequences 1 --kinds {args.kinds}")
            return 1
        except KeyboardInterrupt:
            print("stopped")
    seconds = time.monotonic() - started
    print(tally)
    print(f"no difference; {seconds:.0f} s, {tally.steps.total() / max(seconds, 1e-9):,.0f} steps/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
