"""Races around uprobes under the explorer: every interleaving, and orderings that nothing else here can
show.
"""

from typing import Any

import pytest

from kmodel.core import boot, clear_warnings, guards, smp_rmb, test_bit
from kmodel.explore import Verdict, explore
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.slab import kzalloc
from kmodel.sync import refcount_read
from kmodel.uprobes import breakpoint as breakpoints
from kmodel.uprobes import find_refcount, put_uprobe, tree
from kmodel.uprobes.arch import OPS_NONE
from kmodel.uprobes.uprobe import UPROBE_COPY_INSN, Uprobe, init_uprobe
from tests.uprobes.test_tree import PLACES, find, insert
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


@pytest.fixture(params=["sc", "lkmm"])
def memory(request: pytest.FixtureRequest) -> str:
    """Both ends: no reordering, and all that the kernel's model allows."""
    return str(request.param)


def explored(memory: str, guard: str, *scenario: Any) -> tuple[Any, Any]:
    """The results with the guard in place and without it."""
    with_guard = explore(*scenario, memory=memory)
    with guards.without(guard):
        without = explore(*scenario, memory=memory)
    clear_warnings()
    return with_guard, without


# -------------------------------------------------------------------- H03


def twenty_and_thirty() -> Uprobe:
    boot()
    insert(PLACES[0], 20)
    return insert(PLACES[0], 30)


def seeker(thirty: Uprobe) -> None:
    assert find(PLACES[0], 30) is thirty, "missed"


def rotator(thirty: Uprobe) -> None:
    insert(PLACES[0], 40)


def test_no_rotation_hides_a_uprobe(memory: str) -> None:
    """In no interleaving is a uprobe missed that is there; without the retry in one it is (H03)."""
    with_guard, without = explored(memory, "no-seqcount-retry", twenty_and_thirty, seeker, rotator)

    assert with_guard.verdict is Verdict.PASS, with_guard
    assert without.verdict is Verdict.FAIL, without
    assert "missed" in str(without.violation)


# -------------------------------------------------------------------- H01 and H08


def one_uprobe() -> Uprobe:
    boot()
    return insert(PLACES[0], 1)


def getter(uprobe: Uprobe) -> None:
    found = find_refcount.find_uprobe(PLACES[0], 1)
    if found is not None:
        assert refcount_read(found, "ref") > 0, "a reference on a dying uprobe"
        put_uprobe(found)


def putter(uprobe: Uprobe) -> None:
    put_uprobe(uprobe)


def toucher(uprobe: Uprobe) -> None:
    rcu_read_lock_trace()
    found = tree.find_uprobe_rcu(PLACES[0], 1)
    if found is not None:
        assert found.offset == 1
    rcu_read_unlock_trace()


def test_no_lookup_revives_a_dying_uprobe(memory: str) -> None:
    """In no interleaving does the S2 lookup take a reference on a dying uprobe; with a plain get in one it
    does (H01).
    """
    with_guard, without = explored(memory, "plain-get", one_uprobe, getter, putter)

    assert with_guard.verdict is Verdict.PASS, with_guard
    assert without.verdict is Verdict.FAIL, without


def test_no_reader_meets_a_freed_uprobe(memory: str) -> None:
    """In no interleaving does a tasks trace reader touch freed memory; without grace periods in one it does
    (H08).
    """
    with_guard, without = explored(memory, "free-without-grace-period", one_uprobe, toucher, putter)

    assert with_guard.verdict is Verdict.PASS, with_guard
    assert without.verdict is Verdict.FAIL, without
    assert "use-after-free" in str(without.violation)
