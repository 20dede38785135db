"""mmap_lock and mm_lock_seq: parity, values, killable, downgrade, and speculation beside a writer."""

from errno import EINTR

import pytest

from kmodel.core import (
    CoopEngine,
    KernelBug,
    LockingBug,
    boot,
    engine,
    fatal_signal_pending,
    guards,
    kill,
    kthread_run,
    variables,
)
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap_lock import (
    mmap_assert_locked,
    mmap_assert_write_locked,
    mmap_lock_speculate_retry,
    mmap_lock_speculate_try_begin,
    mmap_read_lock,
    mmap_read_trylock,
    mmap_read_unlock,
    mmap_write_downgrade,
    mmap_write_lock,
    mmap_write_lock_killable,
    mmap_write_unlock,
    older_int_mm_lock_seq,
)
from tests.mm.helpers import over_seeds


def seq(mm):
    return mm.mm_lock_seq.sequence


def test_the_count_is_odd_exactly_while_write_locked():
    """I1 and I2 through lock, unlock, downgrade and read locks."""
    mm = MmStruct()
    seen = [seq(mm)]
    for step in (
        mmap_write_lock,
        mmap_write_unlock,
        mmap_read_lock,
        mmap_read_unlock,
        mmap_write_lock,
        mmap_write_downgrade,
        mmap_read_unlock,
    ):
        step(mm)
        seen.append(seq(mm))
    assert seen == [0, 1, 2, 2, 2, 3, 4, 4]


def test_speculation_gives_up_at_once_beside_a_writer():
    """try_begin fails while the count is odd; retry tells any change."""
    mm = MmStruct()
    began, sample = mmap_lock_speculate_try_begin(mm)
    assert (began, mmap_lock_speculate_retry(mm, sample)) == (True, False)
    mmap_write_lock(mm)
    assert mmap_lock_speculate_try_begin(mm)[0] is False
    assert mmap_lock_speculate_retry(mm, sample)
    mmap_write_unlock(mm)
    assert mmap_lock_speculate_retry(mm, sample)


def test_a_downgraded_holder_admits_readers_only():
    """After a downgrade others may read, and the holder no longer counts as writer."""
    mm = MmStruct()
    mmap_write_lock(mm)
    mmap_assert_write_locked(mm)
    mmap_write_downgrade(mm)
    mmap_assert_locked(mm)
    with pytest.raises(LockingBug):
        mmap_assert_write_locked(mm)
    got = []
    engine().join(
        kthread_run(lambda: got.append(mmap_read_trylock(mm) and mmap_read_unlock(mm)), daemon=False)
    )
    assert got == [None]
    mmap_read_unlock(mm)


def test_killed_waiters_leave_the_count_alone():
    """-EINTR from mmap_write_lock_killable: no lock, no bump."""

    def setup():
        boot()
        return variables(mm=MmStruct(), victim=None, result=None)

    def holder(state):
        mm = state.mm
        mmap_write_lock(mm)
        before = seq(mm)
        while state.victim is None:
            engine().schedule(0.001)
        kill(state.victim)
        while state.result is None:
            engine().schedule(0.001)
        assert seq(mm) == before
        mmap_write_unlock(mm)

    def victim(state):
        from kmodel.core import current

        while seq(state.mm) == 0:
            engine().schedule(0.001)
        state.victim = current()
        state.result = mmap_write_lock_killable(state.mm)
        assert state.result == -EINTR
        assert fatal_signal_pending()

    for s in range(10):
        CoopEngine(s).run(setup, [holder, victim])


class TwoWords:
    """What a writer keeps equal under mmap_lock."""

    def __init__(self):
        boot()
        self.mm = MmStruct()
        self.data = variables(a=0, b=0)
        self.accepted = 0


def remapper(state):
    for value in (1, 2, 3):
        mmap_write_lock(state.mm)
        state.data.a = value
        state.data.b = value
        mmap_write_unlock(state.mm)


def speculator(state):
    for _ in range(6):
        began, sample = mmap_lock_speculate_try_begin(state.mm)
        if not began:
            continue
        a, b = state.data.a, state.data.b
        if not mmap_lock_speculate_retry(state.mm, sample):
            state.accepted += 1
            if a != b:
                raise KernelBug(f"accepted {a} and {b}")


def test_accepted_speculations_are_never_mixed():
    """I3 and I4 on many interleavings; and some of them are accepted."""
    accepted = 0
    for s in range(40):
        accepted += CoopEngine(s).run(TwoWords, [remapper, speculator]).accepted
    assert accepted > 20


def test_without_the_retry_mixed_reads_are_accepted():
    """The broken twin of I3: no recheck at the end."""
    with guards.without("no-read-seqcount-retry"), pytest.raises(KernelBug, match="accepted"):
        over_seeds(100, TwoWords, [remapper, speculator])


def test_the_older_int_accepts_mixed_reads():
    """H16: a count raised at unlock only cannot tell that a writer is at work."""
    with older_int_mm_lock_seq(), pytest.raises(KernelBug, match="accepted"):
        over_seeds(100, TwoWords, [remapper, speculator])
