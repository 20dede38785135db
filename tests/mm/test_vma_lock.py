"""The vm_refcnt VMA lock: its states, every race it guards against, and each guard's broken twin."""

from errno import EAGAIN, EINTR

import pytest

from kmodel.core import (
    CoopEngine,
    Deadlock,
    KernelBug,
    UseAfterFree,
    current,
    engine,
    guards,
    is_freed,
    kernel_warnings,
    kill,
    kthread_run,
)
from kmodel.mm import (
    VM_REFCNT_EXCLUDE_READERS_FLAG,
    VM_REFCNT_LIMIT,
    find_vma,
    lock_vma_under_rcu,
    mm_alloc,
    mmap,
    mmap_read_lock,
    mmap_read_unlock,
    mmap_write_lock,
    mmap_write_unlock,
    mmput,
    munmap,
    vm_area_alloc,
    vm_area_free,
    vma_assert_detached,
    vma_end_read,
    vma_lock_statistics,
    vma_lookup,
    vma_mark_attached,
    vma_mark_detached,
    vma_refcnt,
    vma_start_read,
    vma_start_read_locked,
    vma_start_write,
    vma_start_write_killable,
    vma_state_in_words,
)
from kmodel.mm.vma_iter import vma_iter_clear_gfp, vma_iter_init
from kmodel.rcu import rcu_read_lock, rcu_read_lock_held, rcu_read_unlock
from tests.mm.helpers import ANON, BASE, PAGE, RW, Gate, OneVma, over_seeds, quiet, stop_after, stop_before

FLAG = VM_REFCNT_EXCLUDE_READERS_FLAG


@pytest.fixture
def mm():
    return OneVma().mm


# ------------------------------------------------------------------------------------------------ states


def test_a_vma_goes_through_the_states_of_the_table():
    """0 detached, 1 attached, 2 with a reader; write-locked by number, unlocked by mmap_write_unlock."""
    mm = mm_alloc()
    vma = vm_area_alloc(mm)
    seen = [vma_state_in_words(vma)]
    mmap_write_lock(mm)
    vma_start_write(vma)
    vma_mark_attached(vma)
    seen.append(vma_state_in_words(vma))
    mmap_write_unlock(mm)
    seen.append(vma_state_in_words(vma))
    rcu_read_lock()
    assert vma_start_read(mm, vma) is vma
    rcu_read_unlock()
    seen.append(vma_state_in_words(vma))
    vma_end_read(vma)
    mmap_write_lock(mm)
    vma_start_write(vma)
    vma_mark_detached(vma)
    seen.append(vma_state_in_words(vma))
    mmap_write_unlock(mm)
    vm_area_free(vma)
    assert seen == [
        "detached",
        "attached, write-locked",
        "attached, unlocked",
        "attached, 1 readers",
        "detached",
    ]
    assert kernel_warnings() == ()


def test_marking_twice_warns_and_says_false(mm):
    """Attaching what is attached, or detaching without the write lock, changes nothing and warns."""
    vma = vma_lookup(mm, BASE)
    mmap_write_lock(mm)
    assert vma_mark_detached(vma) is False
    vma_start_write(vma)
    assert vma_mark_attached(vma) is False
    assert vma_mark_detached(vma) is True
    assert vma_mark_detached(vma) is False
    assert vma_mark_attached(vma) is True
    mmap_write_unlock(mm)
    assert len(kernel_warnings()) == 3


def test_failures_of_start_read_leave_rcu(mm):
    """H41: None and -EAGAIN both end the RCU section; success stays in it."""
    vma = vma_lookup(mm, BASE)
    other = vm_area_alloc(mm)
    rcu_read_lock()
    assert vma_start_read(mm, other) == -EAGAIN
    assert not rcu_read_lock_held()
    mmap_write_lock(mm)
    vma_start_write(vma)
    rcu_read_lock()
    assert vma_start_read(mm, vma) is None
    assert not rcu_read_lock_held()
    mmap_write_unlock(mm)
    rcu_read_lock()
    assert vma_start_read(mm, vma) is vma
    assert rcu_read_lock_held()
    rcu_read_unlock()
    vma_end_read(vma)


def test_readers_stop_at_the_limit(mm):
    """H37: one more reader than the limit falls back; the writer's bit stays clear."""
    vma = vma_lookup(mm, BASE)
    vma.vm_refcnt = VM_REFCNT_LIMIT
    assert lock_vma_under_rcu(mm, BASE) is None
    assert vma.vm_refcnt == VM_REFCNT_LIMIT
    mmap_read_lock(mm)
    assert vma_start_read_locked(vma) is False
    mmap_read_unlock(mm)
    with guards.without("no-vma-refcnt-limit"):
        lock_vma_under_rcu(mm, BASE)
    assert vma.vm_refcnt & FLAG


def test_mmap_lock_is_traded_for_a_vma_lock(mm):
    """vma_start_read_locked under mmap_lock, then mmap_lock can go."""
    mmap_read_lock(mm)
    vma = find_vma(mm, BASE)
    assert vma_start_read_locked(vma)
    mmap_read_unlock(mm)
    assert vma.vm_refcnt == 2
    vma_end_read(vma)


def test_lookups_are_counted(mm):
    """Every None counts as an abort."""
    vma = lock_vma_under_rcu(mm, BASE + PAGE)
    vma_end_read(vma)
    assert lock_vma_under_rcu(mm, BASE + 4 * PAGE) is None
    assert vma_lock_statistics()["vma_lock_abort"] == 1


# ----------------------------------------------------------------------------------------- read against write


def writer(state):
    for value in (1, 2):
        mmap_write_lock(state.mm)
        vma = find_vma(state.mm, BASE)
        vma_start_write(vma)
        state.data.a = value
        state.data.b = value
        mmap_write_unlock(state.mm)


def reader(state):
    for _ in range(3):
        vma = lock_vma_under_rcu(state.mm, BASE + PAGE)
        if vma is None:
            continue
        a = state.data.a
        b = state.data.b
        vma_end_read(vma)
        state.got.append(a)
        if a != b:
            raise KernelBug(f"a reader inside saw {a} and {b}")


def test_a_reader_excludes_the_writer_and_the_reverse():
    """V1 and V2: what the write lock protects does not change under a reader; some readers get in."""
    states = over_seeds(40, OneVma, [writer, reader], quiet)
    assert sum(len(state.got) for state in states) > 20


def test_without_the_writers_wait_a_reader_sees_half():
    """H27, the broken twin: the writer changes things under a reader."""
    with guards.without("no-vma-writer-wait"), pytest.raises(KernelBug, match="inside saw"):
        over_seeds(150, OneVma, [writer, reader])


def late_reader(monkeypatch):
    """The reader finds the VMA unlocked; before it counts itself in, a writer locks it and begins."""
    gates = []
    stop_before(monkeypatch, vma_refcnt, "_inc_refcnt", gates)

    def setup():
        state = OneVma()
        gates[:] = [Gate("reader")]
        return state

    def slow_writer(state):
        gates[0].wait_until_reached()
        mmap_write_lock(state.mm)
        vma_start_write(find_vma(state.mm, BASE))
        state.data.a = 1
        gates[0].open()
        for _ in range(30):
            engine().schedule(0.001)
        state.data.b = 1
        mmap_write_unlock(state.mm)

    for seed in range(4):
        CoopEngine(seed).run(setup, [slow_writer, reader], quiet)


def test_a_reader_that_counts_in_late_backs_out(monkeypatch):
    """V2: it finds the VMA write-locked when it looks again."""
    late_reader(monkeypatch)


def test_without_the_second_look_a_late_reader_stays(monkeypatch):
    """V2, the broken twin."""
    with guards.without("no-vma-seq-recheck"), pytest.raises(KernelBug, match="inside saw"):
        late_reader(monkeypatch)


def test_readers_come_and_go_but_the_writer_gets_in():
    """H28: its bit keeps new readers out; the writer of this scenario ends on every seed."""

    def stubborn_reader(state):
        for _ in range(8):
            reader(state)

    over_seeds(10, OneVma, [writer, stubborn_reader], quiet)


# ------------------------------------------------------------------------------------------------ detach


def unmapper(state):
    munmap(state.mm, BASE, 4 * PAGE)


def holder(state):
    vma = lock_vma_under_rcu(state.mm, BASE + PAGE)
    if vma is None:
        return
    state.got.append(vma)
    for _ in range(3):
        if is_freed(vma) or vma.vm_refcnt < 2 or vma.vm_start != BASE:
            raise KernelBug("the VMA went away under its reader")
    vma_end_read(vma)


def test_a_locked_vma_is_not_detached_under_its_reader():
    """V1: munmap waits for the readers, then frees."""
    states = over_seeds(40, OneVma, [unmapper, holder], quiet)
    assert any(state.got for state in states)


def stop_reader_with_its_count(monkeypatch):
    """The reader stops between taking its count and looking whether the VMA is write-locked."""
    gates = []
    stop_after(monkeypatch, vma_refcnt, "_inc_refcnt", gates)
    return gates


def meet_a_temporary_reader(monkeypatch, reader_task):
    """A reader takes its count just after the writer let go of its bit; the writer then detaches."""
    gates = []
    stop_before(monkeypatch, vma_refcnt, "_inc_refcnt", gates)
    inside = stop_reader_with_its_count(monkeypatch)

    def setup():
        state = OneVma()
        gates[:] = [Gate()]
        inside[:] = [Gate()]
        return state

    def detacher(state):
        gates[0].wait_until_reached()
        mmap_write_lock(state.mm)
        vma = find_vma(state.mm, BASE)
        vma_start_write(vma)
        gates[0].open()
        inside[0].wait_until_reached()
        kthread_run(let_the_reader_go, vma, daemon=False)
        assert vma_iter_clear_gfp(vma_iter_init(state.mm), BASE, BASE + 4 * PAGE) == 0
        vma_mark_detached(vma)
        if not vma_assert_detached(vma):
            raise KernelBug("a VMA is about to be freed with a count on it")
        vm_area_free(vma)
        mmap_write_unlock(state.mm)

    def let_the_reader_go(vma):
        while vma.vm_refcnt < FLAG:
            engine().schedule(0.001)
        for _ in range(60):  # until the detacher sleeps
            engine().schedule(0.001)
        inside[0].open()

    return CoopEngine(1).run(setup, [detacher, reader_task], quiet)


def temporary_reader(state):
    assert lock_vma_under_rcu(state.mm, BASE) is None


def test_a_detach_waits_for_temporary_readers(monkeypatch):
    """H26: the reader that backs out leaves before the VMA is free."""
    meet_a_temporary_reader(monkeypatch, temporary_reader)


def test_without_the_wait_a_vma_is_freed_with_a_count_on_it(monkeypatch):
    """H26, the broken twin."""
    with guards.without("no-vma-detach-wait"), pytest.raises(KernelBug, match="count on it"):
        meet_a_temporary_reader(monkeypatch, temporary_reader)


def test_without_the_wake_rule_a_detacher_sleeps_for_ever(monkeypatch):
    """H30: wake-ups only when the count is F+1 miss the detacher, who waits for F."""
    with guards.without("no-vma-detach-wake"), pytest.raises(Deadlock, match="sleeps"):
        meet_a_temporary_reader(monkeypatch, temporary_reader)


def test_a_detached_vma_is_looked_up_again(monkeypatch):
    """H25: the count of 0 refuses, the walk starts over and finds the VMA that is there now."""
    gates = []
    stop_before(monkeypatch, vma_refcnt, "_inc_refcnt", gates)

    def setup():
        state = OneVma()
        gates[:] = [Gate()]
        return state

    def remapper(state):
        gates[0].wait_until_reached()
        old = vma_lookup(state.mm, BASE)
        munmap(state.mm, BASE, 4 * PAGE)
        vm_area_alloc(state.mm)  # so that the memory of the old one is not used at once
        mmap(state.mm, BASE, 2 * PAGE, RW, ANON)
        assert vma_lookup(state.mm, BASE) is not old
        gates[0].open()

    def faulter(state):
        vma = lock_vma_under_rcu(state.mm, BASE)
        assert vma is vma_lookup(state.mm, BASE)
        assert vma.vm_end == BASE + 2 * PAGE
        vma_end_read(vma)

    for seed in range(5):
        CoopEngine(seed).run(setup, [remapper, faulter], quiet)
    assert vma_lock_statistics()["vma_lock_miss"] == 1  # in the last run


# ------------------------------------------------------------------------------------------------ reuse


def reuse_between_walk_and_count(monkeypatch, replace, check):
    """The reader has found a VMA; before it counts itself in, the memory becomes another VMA."""
    gates = []
    stop_before(monkeypatch, vma_refcnt, "_inc_refcnt", gates)

    def setup():
        state = OneVma()
        state.other = mm_alloc()
        gates[:] = [Gate()]
        return state

    def reuser(state):
        gates[0].wait_until_reached()
        old = vma_lookup(state.mm, BASE)
        munmap(state.mm, BASE, 4 * PAGE)
        replace(state)
        state.reused = old
        gates[0].open()

    def faulter(state):
        vma = lock_vma_under_rcu(state.mm, BASE)
        check(state, vma)
        if vma is not None:
            vma_end_read(vma)

    return CoopEngine(0).run(setup, [reuser, faulter], quiet)


def map_in_the_other_mm(state):
    mmap(state.other, BASE, 4 * PAGE, RW, ANON)


def map_elsewhere(state):
    mmap(state.mm, BASE + 16 * PAGE, 4 * PAGE, RW, ANON)


def is_ours(state, vma):
    if vma is not None and vma.vm_mm is not state.mm:
        raise KernelBug("a fault is served from another address space")


def covers(_state, vma):
    if vma is not None and not vma.vm_start <= BASE < vma.vm_end:
        raise KernelBug("the VMA does not cover the address")


def test_a_vma_reused_by_another_mm_is_refused(monkeypatch):
    """H32: vm_mm is compared once the count is held."""
    state = reuse_between_walk_and_count(monkeypatch, map_in_the_other_mm, is_ours)
    assert vma_lookup(state.other, BASE) is state.reused


def test_without_the_mm_check_another_mm_is_served(monkeypatch):
    """H32, the broken twin."""
    with guards.without("no-vma-mm-check"), pytest.raises(KernelBug, match="another address space"):
        reuse_between_walk_and_count(monkeypatch, map_in_the_other_mm, is_ours)


def test_a_vma_reused_elsewhere_in_the_mm_is_refused(monkeypatch):
    """H34: the bounds are compared once the count is held."""
    reuse_between_walk_and_count(monkeypatch, map_elsewhere, covers)


def test_without_the_address_check_a_wrong_range_is_served(monkeypatch):
    """H34, the broken twin."""
    with guards.without("no-vma-address-check"), pytest.raises(KernelBug, match="cover the address"):
        reuse_between_walk_and_count(monkeypatch, map_elsewhere, covers)


def foreign_mm_dies(monkeypatch):
    """The reader holds a count on a VMA of another mm by mistake. That mm's last user sees the count given up
    and goes on to free the mm, while the reader is on its way to wake it.
    """
    gates = {}
    for hook, name, key in (
        (stop_before, "_inc_refcnt", "found"),
        (stop_after, "_inc_refcnt", "counted"),
        (stop_before, "rcuwait_wait_event", "waits"),
        (stop_before, "rcuwait_wake_up", "wakes"),
    ):
        gates[key] = []
        hook(monkeypatch, vma_refcnt, name, gates[key])

    def setup():
        state = OneVma()
        state.other = mm_alloc()
        for key, who in (
            ("found", "faulter"),
            ("counted", "faulter"),
            ("waits", "ender"),
            ("wakes", "faulter"),
        ):
            gates[key][:] = [Gate(who)]
        return state

    def director(state):
        gates["found"][0].wait_until_reached()
        munmap(state.mm, BASE, 4 * PAGE)
        mmap(state.other, BASE, 4 * PAGE, RW, ANON)
        gates["found"][0].open()
        gates["waits"][0].wait_until_reached()
        gates["counted"][0].open()
        gates["wakes"][0].wait_until_reached()
        gates["waits"][0].open()

    def ender(state):
        gates["counted"][0].wait_until_reached()
        mmput(state.other)
        gates["wakes"][0].open()

    def faulter(state):
        assert lock_vma_under_rcu(state.mm, BASE) is None

    for seed in range(4):
        CoopEngine(seed).run(setup, [director, ender, faulter], quiet)


def test_a_foreign_mm_is_pinned_for_its_wake_up(monkeypatch):
    """H33: mmgrab before the put, mmdrop after the wake-up."""
    foreign_mm_dies(monkeypatch)


def test_without_the_pin_a_freed_mm_is_woken(monkeypatch):
    """H33, the broken twin (live in 6.15 and 6.16)."""
    with guards.without("no-vma-mm-grab"), pytest.raises((UseAfterFree, KernelBug)):
        foreign_mm_dies(monkeypatch)


# ------------------------------------------------------------------------------------------------ killable


def killed_while_waiting(state):
    """A reader holds the VMA; the writer that waits for it is killed."""
    vma = lock_vma_under_rcu(state.mm, BASE)
    state.victim = None

    def victim():
        state.victim = current()
        mmap_write_lock(state.mm)
        state.got.append(vma_start_write_killable(find_vma(state.mm, BASE)))
        mmap_write_unlock(state.mm)

    task = kthread_run(victim, daemon=False)
    while vma.vm_refcnt < FLAG:
        engine().schedule(0.001)
    kill(state.victim)
    engine().join(task)
    vma_end_read(vma)
    again = lock_vma_under_rcu(state.mm, BASE)
    if again is None:
        raise KernelBug("readers fail for ever")
    vma_end_read(again)


def test_a_killed_writer_takes_its_bit_back():
    """H39: -EINTR, not locked, and readers get in again."""
    for state in over_seeds(10, OneVma, [killed_while_waiting], quiet):
        assert state.got == [-EINTR]


def test_without_the_clean_up_readers_fail_for_ever():
    """H39, the broken twin."""
    with guards.without("no-vma-killed-cleanup"), pytest.raises(KernelBug, match="fail for ever"):
        over_seeds(1, OneVma, [killed_while_waiting])


def test_on_real_threads_a_reader_never_meets_a_writer():
    """The same scenario for the time of a few hundred writes on OS threads."""
    state = OneVma()
    writers = [kthread_run(writer, state, daemon=False) for _ in range(2)]
    readers = [kthread_run(reader, state, daemon=False) for _ in range(4)]
    for task in writers + readers:
        assert engine().join(task, timeout=30)
    assert kernel_warnings() == ()
