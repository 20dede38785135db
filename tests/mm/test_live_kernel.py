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


FOUND_BEFORE = {
    "a moved, written mapping swallowed by an unwritten neighbour brings its anon_vma along": [
        ("mmap", 0, 31, 3, None),
        ("touch", 7),
        ("mmap", 28, 19, 3, None),
        ("mremap", 28, 5, 1, 6),
        ("mremap", 17, 11, 3, 39),
        ("mmap", 31, 9, 3, None),
        ("mremap", 6, 1, 5, 28),
        ("touch", 34),
        ("mmap", 40, 3, 3, None),
    ],
    "a write behind the file's end prepares the anon_vma before it fails": [
        ("mmap", 4, 4, 3, "B", 508),
        ("madvise", 5, 1, 10),
        ("touch", 4),
        ("touch", 6),
        ("madvise", 4, 4, 11),
    ],
    "brk does not shrink a heap that somebody unmapped": [
        ("heap", 40),
        ("brk", 45),
        ("munmap", 40, 5),
        ("brk", 42),
    ],
    "brk does not extend what lies below the heap": [
        ("heap", 40),
        ("mmap", 30, 10, 3, None),
        ("brk", 60),
    ],
    "mremap without a move looks at no bound if the size stays": [
        ("mmap", 4, 4, 3, None),
        ("mremap_here", 4, 9, 9),
    ],
}
"""Differences that there were once, in pages."""


def unabridged(name, *args):
    """A call of FOUND_BEFORE with addresses and flags."""
    at, *rest = (ARENA + args[0] * PAGE, *args[1:])
    match name:
        case "mmap":
            pages, prot, file, *ahead = rest
            kind = flags.MAP_FIXED | flags.MAP_PRIVATE | (0 if file else flags.MAP_ANONYMOUS)
            return (name, at, pages * PAGE, prot, kind, file, args[0] + sum(ahead))
        case "mremap":
            pages, new_pages, to = rest
            return (name, at, pages * PAGE, new_pages * PAGE, 3, ARENA + to * PAGE)
        case "mremap_here":
            pages, new_pages = rest
            return ("mremap", at, pages * PAGE, new_pages * PAGE, 0, 0)
        case "munmap":
            return (name, at, rest[0] * PAGE)
        case "madvise" | "mprotect":
            return (name, at, rest[0] * PAGE, rest[1])
    return (name, at)


@pytest.mark.parametrize("story", FOUND_BEFORE)
def test_differences_found_before(story):
    """Each of them, step by step on both sides."""
    sequence = [unabridged(*call) for call in FOUND_BEFORE[story]]
    with RunningKernel() as kernel:
        if sequence[0][0] == "heap" and not kernel.move_heap(sequence[0][1]):
            pytest.skip("prctl(PR_SET_MM_MAP) is not permitted here")
        model = Model(kernel)
        assert compare(kernel, model, sequence) == len(sequence)
        model.close()


def test_a_wrong_merge_is_found_and_cut_down(monkeypatch):
    """With a model that merges whatever private pages say, the difference is shown in the calls it takes."""
    monkeypatch.setattr(vma_merge, "is_mergeable_anon_vma", lambda _vmg, _tgt: True)
    calls = [("mmap", 0, 4, 3, None), ("touch", 1), ("mmap", 40, 9, 1, "A"), ("mmap", 8, 4, 3, None)]
    calls += [("madvise", 41, 2, 10), ("touch", 9), ("munmap", 44, 1), ("touch", 10), ("mmap", 4, 4, 3, None)]
    calls += [("mprotect", 0, 8, 1), ("munmap", 40, 1), ("mprotect", 0, 8, 3)]
    with RunningKernel() as kernel:
        model = Model(kernel)
        with pytest.raises(Difference) as caught:
            compare(kernel, model, [unabridged(*call) for call in calls])
        found = shorten(kernel, model, caught.value)
        model.close()
    assert found.what == "maps"
    assert [call[0] for call in found.calls] == [
        *("mmap", "touch", "mmap", "touch", "mmap", "mprotect", "mprotect")
    ]
    kernel_says, model_says = str(found).split("model:")
    assert "(8, " in kernel_says.split("kernel:")[1]
    assert "(8, " not in model_says


def test_random_calls_meet_mappings():
    """Most of what the long run's chooser makes up is possible where it is tried."""
    with RunningKernel() as kernel:
        model = Model(kernel)
        tally = Tally()
        for seed in range(4):
            one_sequence(kernel, model, Chooser(seed, ("mmap", "touch", "mprotect", "mremap")), 60, tally, 0)
        model.close()
    assert tally.steps == 240
    assert sum(tally.succeeded.values()) > 120
    assert tally.most_mappings > 3
