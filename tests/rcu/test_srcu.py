"""SRCU, both flavours: who is waited for, the two hazards of its counters, other tasks' unlocks, callbacks,
misuse.
"""

from collections.abc import Callable
from typing import Any

import pytest

from kmodel.core import (
    CoopEngine,
    LockingBug,
    Struct,
    boot,
    current,
    engine,
    guards,
    kernel_struct,
    kernel_warnings,
    kfree,
    kthread_run,
    rcu_assign_pointer,
    rcu_dereference,
    smp_cond_load_acquire,
    smp_store_release,
    variables,
)
from kmodel.rcu import (
    SrcuStruct,
    __srcu_read_lock,
    __srcu_read_unlock,
    call_srcu,
    cleanup_srcu_struct,
    init_srcu_struct,
    rcu_read_lock,
    rcu_read_unlock,
    srcu,
    srcu_barrier,
    srcu_down_read,
    srcu_gp,
    srcu_read_lock,
    srcu_read_lock_fast,
    srcu_read_lock_held,
    srcu_read_unlock,
    srcu_read_unlock_fast,
    srcu_readers_active,
    srcu_up_read,
    synchronize_srcu,
)
from kmodel.rcu.srcu_gp import check_invariants
from tests.rcu.scenarios import Setup, Threads, run_everywhere, run_seed, run_threads, use_after_free

type Flavour = tuple[Callable[[SrcuStruct], int], Callable[[SrcuStruct, int], None]]

FLAVOURS: dict[str, Flavour] = {
    "normal": (srcu_read_lock, srcu_read_unlock),
    "fast": (srcu_read_lock_fast, srcu_read_unlock_fast),
}
both_flavours = pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)


@kernel_struct
class Foo(Struct):
    """What readers use and updaters free."""

    value: int = 0


def a_domain_and_a_pointer(**more: Any) -> Setup:
    def setup() -> Any:
        v = variables(pointer=Foo(value=1), ssp=None, **more)
        v.ssp = SrcuStruct("test")
        return v

    return setup


def replace_and_free(v: Any) -> None:
    old = v.pointer
    rcu_assign_pointer(v, "pointer", Foo(value=2))
    synchronize_srcu(v.ssp)
    kfree(old)


def dwell(v: Any, turns: int) -> None:
    """Use what the pointer leads to for a while."""
    foo = rcu_dereference(v, "pointer")
    for _ in range(turns):
        assert foo.value in (1, 2)


def readers_and_updater(flavour: Flavour) -> tuple[Setup, Threads]:
    lock, unlock = flavour

    def reader(v: Any) -> None:
        for _ in range(2):
            idx = lock(v.ssp)
            dwell(v, 2)
            unlock(v.ssp, idx)

    def updater(v: Any) -> None:
        for _ in range(2):
            replace_and_free(v)

    return a_domain_and_a_pointer(), [reader, updater]


@both_flavours
def test_readers_never_see_what_was_freed(flavour: Flavour) -> None:
    """V1: what is freed after synchronize_srcu is met by no reader, and the counters balance in the end."""
    for final in run_everywhere(*readers_and_updater(flavour)):
        check_invariants(final.ssp)
        assert srcu_readers_active(final.ssp) == 0
        assert final.ssp.srcu_gp_seq == 2 << srcu_gp.RCU_SEQ_CTR_SHIFT


@both_flavours
def test_not_scanning_the_readers_index_is_caught(flavour: Flavour) -> None:
    """V1, the broken twin: without the second scan a reader meets freed memory."""
    lock, unlock = flavour

    def reader(v: Any) -> None:
        idx = lock(v.ssp)
        smp_store_release(v, "inside", 1)
        dwell(v, 200)
        unlock(v.ssp, idx)

    def updater(v: Any) -> None:
        smp_cond_load_acquire(v, "inside", bool)
        replace_and_free(v)

    setup = a_domain_and_a_pointer(inside=0)
    assert not use_after_free(0, setup, [reader, updater])
    with guards.without("srcu-second-scan"):
        assert any(use_after_free(seed, setup, [reader, updater]) for seed in range(10))


# ------------------------------------------------------------------------------------------------ H70


def reader_that_counts_late(monkeypatch: pytest.MonkeyPatch) -> tuple[Setup, Threads]:
    """`late` fetches the index, then a whole grace period passes, then it counts itself and is inside at the
    next one.
    """
    v_of: list[Any] = []

    def inc(ctr: Any, field: str) -> None:
        if current().comm == "late" and field == "srcu_locks":
            smp_store_release(v_of[-1], "fetched", 1)
            smp_cond_load_acquire(v_of[-1], "go", bool)
        real_inc(ctr, field)

    real_inc = srcu._inc
    monkeypatch.setattr(srcu, "_inc", inc)

    def late(v: Any) -> None:
        v_of.append(v)
        idx = srcu_read_lock(v.ssp)
        smp_store_release(v, "inside", 1)
        dwell(v, 60)
        srcu_read_unlock(v.ssp, idx)

    def updater(v: Any) -> None:
        smp_cond_load_acquire(v, "fetched", bool)
        synchronize_srcu(v.ssp)
        smp_store_release(v, "go", 1)
        smp_cond_load_acquire(v, "inside", bool)
        replace_and_free(v)

    return a_domain_and_a_pointer(fetched=0, go=0, inside=0), [late, updater]


def test_a_reader_that_counts_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """H70: a reader on the index that has been idle since the last flip holds up the next grace period."""
    setup, threads = reader_that_counts_late(monkeypatch)
    assert not any(use_after_free(seed, setup, threads) for seed in range(10))


def test_not_scanning_the_idle_index_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """H70, the broken twin: without the first scan its object is freed under it."""
    setup, threads = reader_that_counts_late(monkeypatch)
    with guards.without("srcu-first-scan"):
        assert any(use_after_free(seed, setup, threads) for seed in range(10))


# ------------------------------------------------------------------------------------------------ H69


def reader_between_the_sums(monkeypatch: pytest.MonkeyPatch) -> tuple[Setup, Threads]:
    """While `inside` is in its section, `quick` locks and unlocks on the same index between the two sums of
    the scan.
    """
    v_of: list[Any] = []

    def inc(ctr: Any, field: str) -> None:
        if current().comm == "quick" and field == "srcu_locks":
            smp_store_release(v_of[-1], "fetched", 1)
            smp_cond_load_acquire(v_of[-1], "go", bool)
        real_inc(ctr, field)

    def barrier_a(ssp: SrcuStruct) -> None:
        v = v_of[-1]
        if srcu_gp.rcu_seq_state(ssp.srcu_gp_seq) == srcu_gp.SRCU_STATE_SCAN2 and not v.go:
            smp_store_release(v, "go", 1)
            smp_cond_load_acquire(v, "gone", bool)
        real_barrier_a(ssp)

    real_inc, real_barrier_a = srcu._inc, srcu_gp._barrier_a
    monkeypatch.setattr(srcu, "_inc", inc)
    monkeypatch.setattr(srcu_gp, "_barrier_a", barrier_a)

    def inside(v: Any) -> None:
        idx = srcu_read_lock(v.ssp)
        smp_store_release(v, "inside", 1)
        dwell(v, 150)
        srcu_read_unlock(v.ssp, idx)

    def quick(v: Any) -> None:
        v_of.append(v)
        idx = srcu_read_lock(v.ssp)
        srcu_read_unlock(v.ssp, idx)
        smp_store_release(v, "gone", 1)

    def updater(v: Any) -> None:
        smp_cond_load_acquire(v, "fetched", bool)
        smp_cond_load_acquire(v, "inside", bool)
        replace_and_free(v)

    return a_domain_and_a_pointer(fetched=0, go=0, gone=0, inside=0), [inside, quick, updater]


def test_a_reader_between_the_sums_hides_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """H69: a section that begins and ends between the sums makes the scan repeat itself, not succeed."""
    setup, threads = reader_between_the_sums(monkeypatch)
    finals = [run_seed(seed, setup, threads) for seed in range(10)]
    assert all(final.ssp.srcu_retries > 0 for final in finals)


def test_summing_locks_first_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """H69, the broken twin: locks summed first, the quick reader's unlock stands in for the one that is
    inside.
    """
    setup, threads = reader_between_the_sums(monkeypatch)
    with guards.without("srcu-unlocks-first"):
        assert any(use_after_free(seed, setup, threads) for seed in range(10))


# ----------------------------------------------------------------------------------------- sections and tasks


def test_another_task_may_end_a_section() -> None:
    """srcu_down_read in one task and srcu_up_read in another: the grace period ends only after the second."""

    def down(v: Any) -> None:
        idx = srcu_down_read(v.ssp)
        smp_store_release(v, "idx", idx)

    def up(v: Any) -> None:
        idx = smp_cond_load_acquire(v, "idx", is_index)
        dwell(v, 10)
        srcu_up_read(v.ssp, idx)

    def updater(v: Any) -> None:
        smp_cond_load_acquire(v, "idx", is_index)
        replace_and_free(v)

    for final in run_everywhere(a_domain_and_a_pointer(idx=None), [down, up, updater]):
        check_invariants(final.ssp)


def is_index(value: object) -> bool:
    return value is not None


def test_sections_of_both_indexes_end_in_any_order() -> None:
    """ABBA of the indexes: a section from before a flip and one from after it may end in either order."""
    for inner_first in (False, True):
        ssp = SrcuStruct("abba")
        a = srcu_read_lock(ssp)
        srcu_gp.srcu_flip(ssp)
        b = srcu_read_lock(ssp)
        assert {a, b} == {0, 1}
        for idx in (b, a) if inner_first else (a, b):
            assert srcu_read_lock_held(ssp)
            srcu_read_unlock(ssp, idx)
        assert not srcu_read_lock_held(ssp)
        synchronize_srcu(ssp)
        check_invariants(ssp)


def test_a_later_section_is_on_the_other_index() -> None:
    """While a grace period waits for a reader, a new section does not hold it up."""

    def old(v: Any) -> None:
        idx = __srcu_read_lock(v.ssp)
        smp_store_release(v, "inside", 1)
        smp_cond_load_acquire(v, "new", bool)
        __srcu_read_unlock(v.ssp, idx)

    def new(v: Any) -> None:
        smp_cond_load_acquire(v.ssp, "srcu_idx", bool)
        idx = srcu_read_lock(v.ssp)
        smp_store_release(v, "new", 1)
        smp_cond_load_acquire(v, "done", bool)  # for ever, if the grace period waits for us
        srcu_read_unlock(v.ssp, idx)

    def updater(v: Any) -> None:
        smp_cond_load_acquire(v, "inside", bool)
        synchronize_srcu(v.ssp)
        smp_store_release(v, "done", 1)

    for final in run_everywhere(a_domain_and_a_pointer(inside=0, new=0, done=0), [old, new, updater]):
        assert final.done == 1


def test_readers_may_sleep_and_domains_are_separate() -> None:
    """A reader of one domain waits for a grace period of another, and a reader of RCU for none."""
    one, other = SrcuStruct("one"), SrcuStruct("other")
    idx = srcu_read_lock(one)
    synchronize_srcu(other)
    srcu_read_unlock(one, idx)
    rcu_read_lock()
    with pytest.raises(LockingBug, match="sleeps inside an RCU"):
        synchronize_srcu(one)
    rcu_read_unlock()


def test_waiters_share_a_grace_period() -> None:
    """V3: who asks while another waiter's grace period has not begun does not run a second one."""

    def reader(v: Any) -> None:
        idx = srcu_read_lock(v.ssp)
        smp_store_release(v, "inside", 1)
        dwell(v, 40)
        srcu_read_unlock(v.ssp, idx)

    def updater(v: Any) -> None:
        smp_cond_load_acquire(v, "inside", bool)
        synchronize_srcu(v.ssp)

    setup = a_domain_and_a_pointer(inside=0)
    counts = {
        run_seed(seed, setup, [reader, *[updater] * 3]).ssp.srcu_gp_seq >> srcu_gp.RCU_SEQ_CTR_SHIFT
        for seed in range(15)
    }
    assert counts <= {1, 2, 3}
    assert min(counts) < 3


def test_counters_of_the_dead_are_kept_and_their_structs_are_not() -> None:
    """Tasks come and go without the domain's list growing for ever, and its sums stay balanced."""
    ssp = SrcuStruct("many")

    def reader(_none: Any) -> None:
        srcu_read_unlock(ssp, srcu_read_lock(ssp))

    for _ in range(srcu_gp._FOLD_ABOVE + 20):
        engine().join(kthread_run(reader, None, comm="reader", daemon=False))
    synchronize_srcu(ssp)
    assert len(ssp.srcu_data) < 20
    assert sum(srcu.srcu_readers_sum(ssp, idx, "srcu_locks") for idx in (0, 1)) == srcu_gp._FOLD_ABOVE + 20
    check_invariants(ssp)


# ------------------------------------------------------------------------------------------------ callbacks


@both_flavours
def test_callbacks_run_in_order_after_the_readers(flavour: Flavour) -> None:
    """call_srcu runs callbacks in order, none before the reader that was inside has left; srcu_barrier waits
    for all.
    """
    lock, unlock = flavour

    def reader(v: Any) -> None:
        idx = lock(v.ssp)
        smp_store_release(v, "inside", 1)
        dwell(v, 5)
        v.left = 1
        unlock(v.ssp, idx)

    def updater(v: Any) -> None:
        smp_cond_load_acquire(v, "inside", bool)
        ran: list[tuple[int, int]] = []
        for n in range(3):
            call_srcu(v.ssp, n, lambda n: ran.append((n, v.left)))
        srcu_barrier(v.ssp)
        v.ran = tuple(ran)

    for final in run_everywhere(a_domain_and_a_pointer(inside=0, left=0, ran=()), [reader, updater]):
        assert final.ran == ((0, 1), (1, 1), (2, 1))
        cleanup_srcu_struct(final.ssp)
        assert kernel_warnings() == ()


# ------------------------------------------------------------------------------------------------ misuse


def test_waiting_for_oneself_is_reported() -> None:
    """synchronize_srcu inside a section of the same domain is a LockingBug, with the domain's name."""
    ssp = SrcuStruct("mine")
    idx = srcu_read_lock(ssp)
    with pytest.raises(LockingBug, match=r"synchronize_srcu\(mine\) inside"):
        synchronize_srcu(ssp)
    srcu_read_unlock(ssp, idx)
    synchronize_srcu(ssp)


def test_flavours_must_not_be_mixed() -> None:
    """U2: within one task, between tasks, and in a domain declared fast."""
    ssp = SrcuStruct("mixed")
    srcu_read_unlock(ssp, srcu_read_lock(ssp))
    with pytest.raises(LockingBug, match="mixes"):
        srcu_read_lock_fast(ssp)
    with pytest.raises(LockingBug, match="mixes"):
        run_threads(lambda: ssp, [srcu_read_lock_fast])
    with pytest.raises(LockingBug, match="mixes"):
        srcu_read_lock(SrcuStruct("fast", fast=True))


def test_an_unlock_too_many_is_reported() -> None:
    """srcu_read_unlock outside any section of one's own is a LockingBug, for both flavours."""
    ssp, fast = SrcuStruct("normal"), SrcuStruct("fast", fast=True)
    idx = srcu_down_read(ssp)
    with pytest.raises(LockingBug, match="no section of its own"):
        srcu_read_unlock(ssp, idx)
    srcu_up_read(ssp, idx)
    with pytest.raises(LockingBug, match="no section of its own"):
        srcu_read_unlock_fast(fast, 0)


def test_cleanup_of_a_busy_domain_warns() -> None:
    """cleanup_srcu_struct leaks a domain that has readers, and says so."""
    ssp = SrcuStruct("busy")
    idx = srcu_read_lock(ssp)
    cleanup_srcu_struct(ssp)
    assert [w.message for w in kernel_warnings()] == ["cleanup_srcu_struct(busy) with active readers"]
    srcu_read_unlock(ssp, idx)
    assert init_srcu_struct(ssp) == 0
    check_invariants(ssp)


# ---------------------------------------------------------------------------------------------- specification


class OpenSpec:
    """An RcuSpec that records calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def read_lock(self, domain: Any) -> int:
        self.calls.append(f"lock {domain.name}")
        return 7

    def read_unlock(self, domain: Any, idx: int) -> None:
        self.calls.append(f"unlock {domain.name} {idx}")

    def synchronize(self, domain: Any) -> None:
        self.calls.append(f"synchronize {domain.name}")

    def call(self, domain: Any, func: Callable[[], None]) -> None:
        self.calls.append(f"call {domain.name}")

    def barrier(self, domain: Any) -> None:
        self.calls.append(f"barrier {domain.name}")


def test_a_specification_replaces_the_implementation_unless_told_otherwise() -> None:
    """The engine's RcuSpec is used for a domain, with the domain as its key, but not with
    use_implementation.
    """
    spec = OpenSpec()
    run = CoopEngine(0)
    run.rcu = spec

    def setup() -> Any:
        boot()
        return SrcuStruct("spec"), SrcuStruct("impl", use_implementation=True)

    def thread(domains: Any) -> None:
        for ssp in domains:
            idx = srcu_read_lock(ssp)
            with pytest.raises(LockingBug):
                synchronize_srcu(ssp)
            srcu_read_unlock(ssp, idx)
            synchronize_srcu(ssp)
            call_srcu(ssp, None, print)

    def final(domains: Any) -> None:
        assert srcu.srcu_readers_sum(domains[0], 0, "srcu_locks") == 0
        assert srcu.srcu_readers_sum(domains[1], 0, "srcu_locks") == 1

    run.run(setup, [thread], final)
    assert spec.calls == ["lock spec", "unlock spec 7", "synchronize spec", "call spec"]
