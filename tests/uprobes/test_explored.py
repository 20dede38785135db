"""Races of the hit path under the explorer: orderings that real threads and seeds cannot show."""

from typing import Any

import pytest

from kmodel.core import boot, guards, smp_rmb, test_bit
from kmodel.explore import Verdict, explore
from kmodel.slab import kzalloc
from kmodel.uprobes import breakpoint as breakpoints
from kmodel.uprobes.arch import OPS_NONE
from kmodel.uprobes.uprobe import UPROBE_COPY_INSN, Uprobe, init_uprobe
from tests.uprobes.world import new_file

pytestmark = pytest.mark.explore


def unprepared() -> Uprobe:
    """A uprobe whose instruction nobody has copied yet."""
    boot()
    uprobe = kzalloc(Uprobe)
    assert uprobe is not None
    init_uprobe(uprobe, new_file("/bin/nop", b"\x90" * 64).f_inode, 0, 0)
    return uprobe


def prepare(uprobe: Uprobe) -> None:
    assert breakpoints.prepare_uprobe(uprobe) == 0


def hit(uprobe: Uprobe) -> Any:
    """The reading half of handle_swbp, as it is there."""
    if not test_bit(UPROBE_COPY_INSN, uprobe, "flags"):
        return
    smp_rmb()
    assert uprobe.arch.ops != OPS_NONE, "the bit was seen before the instruction"


def test_who_sees_the_bit_sees_the_instruction() -> None:
    """smp_wmb in prepare_uprobe and smp_rmb in handle_swbp are enough on the kernel's memory model (H47)."""
    result = explore(unprepared, prepare, hit, memory="lkmm")

    assert result.verdict is Verdict.PASS, result


def test_without_the_write_barrier_the_bit_is_seen_before_the_instruction() -> None:
    """no-insn-wmb: the explorer finds a hit that runs on an unset arch (H47)."""
    with guards.without("no-insn-wmb"):
        result = explore(unprepared, prepare, hit, memory="lkmm")

    assert result.verdict is Verdict.FAIL, result
