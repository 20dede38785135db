"""The seqcount: a pair that belongs together, a writer that changes it, a reader that must not see half.

Models:      the use of include/linux/seqlock.h that uprobes_seqcount and mm_lock_seq are instances of
Guards:      none; there is one writer
Invariants:  a reader that is not told to retry read both halves of one pair
Leaves out:  how a reader waits for an even count: see hazards/trees.py
Read next:   hazards/trees.py

Four lines make it work, and each has a scenario: the retry, the reader's smp_rmb() before it, and the
writer's
smp_wmb() behind the first and before the second increment. The barriers matter only where memory is weak:
under
`--memory sc`, and under `--memory tso`, the last three twins pass.
"""

from kmodel.core import READ_ONCE, WRITE_ONCE, Struct, boot, embedded, kernel_struct
from kmodel.hazards.catalogue import Scenario, register
from kmodel.sync import (
    Seqcount,
    raw_seqcount_try_begin,
    raw_write_seqcount_begin,
    raw_write_seqcount_end,
    read_seqcount_retry,
)


@kernel_struct
class Pair(Struct):
    """Two numbers that are equal, and the count that vouches for it."""

    seq: Seqcount = embedded(factory=Seqcount)
    left: int = 0
    right: int = 0


def setup() -> Pair:
    """A pair, equal."""
    boot()
    return Pair()


def writer(pair: Pair) -> None:
    """Change both halves."""
    raw_write_seqcount_begin(pair.seq)
    WRITE_ONCE(pair, "left", 1)
    WRITE_ONCE(pair, "right", 1)
    raw_write_seqcount_end(pair.seq)


def reader(pair: Pair) -> None:
    """Read both halves, once; believe them if the count stands still."""
    ok, seq = raw_seqcount_try_begin(pair.seq)
    if not ok:
        return
    left, right = READ_ONCE(pair, "left"), READ_ONCE(pair, "right")
    if not read_seqcount_retry(pair.seq, seq):
        assert left == right, f"the reader believed the halves {left} and {right} of two pairs"


def _scenario(name: str, guard: str, memory: str, summary: str, *hazards: str) -> None:
    register(
        Scenario(
            name=name,
            hazards=hazards,
            summary=summary,
            setup=setup,
            threads=(writer, reader),
            without=guard,
            breaks="assertion",
            memory=memory,
        )
    )


_scenario(
    "seqcount-retry",
    "no-read-seqcount-retry",
    "sc",
    "A reader that does not look at the count again takes half of a change.",
    "H03",
    "H10",
)
_scenario(
    "seqcount-rmb",
    "no-seqcount-rmb",
    "lkmm",
    "The reader looks at the count again before it has read what the count vouches for.",
    "H18",
)
_scenario(
    "seqcount-begin-wmb",
    "no-seqcount-begin-wmb",
    "lkmm",
    "The writer's change is seen before the odd count that announces it.",
    "H16",
    "H17",
)
_scenario(
    "seqcount-end-wmb",
    "no-seqcount-end-wmb",
    "lkmm",
    "The even count is seen before all of the change that it says is over.",
    "H10",
)
