"""The running kernel and the model get the same calls, chosen by hypothesis: same errno, same maps."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kmodel.mm import flags, vma_merge
from stress.vma_live import Chooser, Tally, one_sequence, shorten
from stress.vma_live_sides import (
    ARENA,
    PAGE,
    Difference,
    Model,
    RunningKernel,
    compare,
    why_not_here,
)

pytestmark = pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here()))

PAGES = 12
ANON = flags.MAP_PRIVATE | flags.MAP_ANONYMOUS

addresses = st.integers(0, PAGES - 1).map(lambda page: ARENA + page * PAGE)
lengths = st.integers(1, PAGES).map(lambda pages: pages * PAGE)
odd_addresses = st.one_of(addresses, addresses.map(lambda address: address + 8))
odd_lengths = st.one_of(lengths, lengths.map(lambda length: length - 100), st.sampled_from((0, 1, 1 << 47)))
prots = st.sampled_from((3, 1, 0, 5, 7))


@st.composite
def mappings(draw):
    """mmap: nearly always to a fixed place, with offsets that line up or do not."""
    address, length = draw(addresses), draw(lengths)
    place = draw(st.sampled_from((flags.MAP_FIXED, flags.MAP_FIXED, flags.MAP_FIXED_NOREPLACE, 0)))
    file = draw(st.sampled_from((None, "A", "B", "A2", "Ar", "Aw")))
    kind = draw(st.sampled_from((flags.MAP_PRIVATE, flags.MAP_PRIVATE, flags.MAP_SHARED)))
    more = draw(st.sampled_from((0, 0, 0, flags.MAP_NORESERVE, flags.MAP_STACK)))
    pgoff = (address - ARENA) // PAGE + draw(st.sampled_from((0, 0, 0, 1, 500)))
    anonymous = 0 if file else flags.MAP_ANONYMOUS
    return ("mmap", address, length, draw(prots), kind | place | anonymous | more, file, pgoff)


calls = st.one_of(
    mappings(),
    st.tuples(st.just("touch"), addresses),
    st.tuples(st.just("mprotect"), addresses, lengths, prots),
    st.tuples(st.just("munmap"), odd_addresses, odd_lengths),
    st.tuples(st.just("mprotect"), odd_addresses, odd_lengths, prots),
    st.tuples(
        st.just("mremap"),
        addresses,
        lengths,
        lengths,
        st.sampled_from((3, 3, 3, 0, 1, 5, 7)),
        st.integers(0, 3 * PAGES).map(lambda page: ARENA + page * PAGE),
    ),
    st.tuples(
        st.just("madvise"), addresses, lengths, st.sampled_from((0, 1, 4, 8, 10, 11, 14, 15, 16, 17, 18, 99))
    ),
)


def test_the_model_does_what_this_kernel_does():
    """Sequences of calls, cut down by hypothesis to the shortest that differs, if one does."""
    with RunningKernel() as kernel:
        model = Model(kernel)

        @settings(
            max_examples=100,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(calls, min_size=1, max_size=16))
        def same(sequence):
            try:
                compare(kernel, model, sequence)
            except Difference as difference:
                pytest.fail(f"Linux {os.uname().release}: {difference}", pytrace=False)

        try:
            same()
        finally:
            model.close()


def test_a_wrong_merge_is_found_and_cut_down(monkeypatch):
    """With a model that merges whatever private pages say, the difference is shown in a few calls."""
    monkeypatch.setattr(vma_merge, "is_mergeable_anon_vma", lambda _vmg, _tgt: True)
    with RunningKernel() as kernel:
        model = Model(kernel)
        found = None
        for seed in range(200):
            choose = Chooser(seed, ("mmap", "touch", "mprotect", "mremap"))
            try:
                one_sequence(kernel, model, choose, 120, Tally(), 0)
            except Difference as difference:
                found = shorten(kernel, model, difference)
                break
        model.close()
    assert found is not None
    assert found.what == "maps"
    assert len(found.calls) <= 15
    assert "kernel:" in str(found)
    assert "model:" in str(found)
