"""mmap and munmap: errors, placement, splits, merges, references and the map limit."""

from errno import EACCES, EBADF, EEXIST, EINVAL, ENOMEM, EOPNOTSUPP, EOVERFLOW, EPERM

import pytest

from kmodel.core import CoopEngine, KernelBug, engine, guards, kernel_warnings
from kmodel.fs import file_ref_read, mapping_writably_mapped, open_file
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_GROWSDOWN,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    TASK_SIZE,
    MmStruct,
    brk,
    find_vma,
    for_each_vma,
    hooks,
    mm_alloc,
    mm_struct,
    mmap,
    mmap_lock_speculate_retry,
    mmap_lock_speculate_try_begin,
    mmap_read_lock,
    mmap_read_unlock,
    mmap_write_lock,
    mmap_write_unlock,
    mmput,
    mprotect,
    mremap,
    munmap,
    vma_lookup,
)
from kmodel.mm.maple_tree import check_invariants
from kmodel.mm.vma import VmOperations
from kmodel.rcu import rcu_barrier, rcu_read_lock, rcu_read_unlock
from tests.mm.helpers import ANON, BASE, PAGE, RW, Gate, over_seeds

FIXED = MAP_PRIVATE | MAP_FIXED
MB = 1 << 20


@pytest.fixture
def mm():
    made = mm_alloc()
    yield made
    mmput(made)
    assert kernel_warnings() == ()


@pytest.fixture
def file():
    return open_file("/bin/x", size=MB)


def layout(mm):
    """[(first page, end page, pgoff or None for anonymous)] relative to BASE."""
    mmap_read_lock(mm)
    found = [
        (
            (vma.vm_start - BASE) // PAGE,
            (vma.vm_end - BASE) // PAGE,
            vma.vm_pgoff if vma.vm_file is not None else None,
        )
        for vma in for_each_vma(mm)
    ]
    mmap_read_unlock(mm)
    check_invariants(mm.mm_mt)
    assert mm.map_count == len(found)
    return found


def errno_of(call, *args):
    try:
        call(*args)
    except OSError as error:
        return error.errno
    return 0


# ------------------------------------------------------------------------------------------------ errors


def test_mmap_refuses_what_the_kernel_refuses(mm, file):
    """The errno of every check in do_mmap, in its order."""
    read_only = open_file("/bin/ro", size=MB, writable=False)
    anon = MAP_PRIVATE | MAP_ANONYMOUS
    cases = [
        (EINVAL, 0, 0, RW, anon, None, 0),
        (ENOMEM, 0, 1 << 63, RW, anon, None, 0),
        (ENOMEM, 0, TASK_SIZE + PAGE, RW, anon, None, 0),
        (EINVAL, BASE + 1, PAGE, RW, anon | MAP_FIXED, None, 0),
        (EPERM, 0, PAGE, RW, anon | MAP_FIXED, None, 0),
        (ENOMEM, TASK_SIZE, PAGE, RW, anon | MAP_FIXED, None, 0),
        (EINVAL, 0, PAGE, RW, MAP_ANONYMOUS, None, 0),
        (EBADF, 0, PAGE, RW, MAP_PRIVATE, None, 0),
        (EINVAL, 0, PAGE, RW, 0, file, 0),
        (EOVERFLOW, 0, PAGE, RW, MAP_PRIVATE, file, 1 << 52),
        (EACCES, 0, PAGE, RW, MAP_SHARED, read_only, 0),
        (EOPNOTSUPP, 0, PAGE, PROT_READ, MAP_SHARED_VALIDATE | 1 << 21, file, 0),
        (EINVAL, 0, PAGE, RW, MAP_PRIVATE | MAP_GROWSDOWN, file, 0),
        (0, 0, PAGE, RW, MAP_PRIVATE, read_only, 0),
        (0, 0, PAGE, PROT_READ, MAP_SHARED, read_only, 0),
    ]
    assert [errno_of(mmap, mm, *case[1:]) for case in cases] == [case[0] for case in cases]


def test_munmap_refuses_what_the_kernel_refuses(mm):
    """-EINVAL for unaligned, empty and far ranges; an empty place is no error."""
    cases = [(EINVAL, BASE + 1, PAGE), (EINVAL, BASE, 0), (EINVAL, TASK_SIZE, PAGE), (0, BASE, PAGE)]
    assert [errno_of(munmap, mm, *case[1:]) for case in cases] == [case[0] for case in cases]


def test_noreplace_and_hints(mm):
    """FIXED_NOREPLACE refuses a taken place; a hint is taken if free, else the gap below mmap_base."""
    noreplace = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    assert mmap(mm, BASE, 4 * PAGE, RW, noreplace) == BASE
    assert errno_of(mmap, mm, BASE + PAGE, PAGE, RW, noreplace) == EEXIST
    anon = MAP_PRIVATE | MAP_ANONYMOUS
    assert mmap(mm, BASE + 8 * PAGE, PAGE, RW, anon) == BASE + 8 * PAGE
    top = mmap(mm, BASE, PAGE, PROT_READ, anon)
    assert top == mm.mmap_base - PAGE
    assert mmap(mm, 0, 3 * PAGE, PROT_READ | PROT_EXEC, anon) == top - 3 * PAGE


def test_top_down_fills_the_highest_gap_that_is_large_enough(mm):
    """Gaps are searched from mmap_base down."""
    anon = MAP_PRIVATE | MAP_ANONYMOUS
    kinds = [PROT_READ, RW, PROT_READ | PROT_EXEC]
    places = [mmap(mm, 0, 4 * PAGE, kinds[i % 3], anon) for i in range(30)]
    assert places == [mm.mmap_base - (i + 1) * 4 * PAGE for i in range(30)]
    munmap(mm, places[5], PAGE)
    munmap(mm, places[20], 4 * PAGE)
    assert mmap(mm, 0, 2 * PAGE, 0, anon) == places[20] + 2 * PAGE
    assert mmap(mm, 0, PAGE, 0, anon) == places[5]


# ------------------------------------------------------------------------------------------------ shape


def test_a_hole_splits_in_three(mm, file):
    """munmap in the middle: two halves with the right offsets, two file references, both in i_mmap."""
    mmap(mm, BASE, 8 * PAGE, PROT_READ, FIXED, file, 16)
    before = file_ref_read(file, "f_ref")
    munmap(mm, BASE + 3 * PAGE, 2 * PAGE)
    #   0       3     5       8
    #   |-------|     |-------|
    assert layout(mm) == [(0, 3, 16), (5, 8, 21)]
    assert file_ref_read(file, "f_ref") == before + 1
    assert len(file.f_mapping.i_mmap) == 2
    file.f_mapping.check_invariants()


def test_fixed_replaces_and_gives_back(mm, file):
    """MAP_FIXED over parts of three mappings: the ends stay, the middle's references go."""
    other = open_file("/bin/y", size=MB)
    mmap(mm, BASE, 4 * PAGE, PROT_READ, FIXED, file, 0)
    mmap(mm, BASE + 4 * PAGE, 2 * PAGE, RW, ANON)
    mmap(mm, BASE + 6 * PAGE, 4 * PAGE, PROT_READ, FIXED, file, 100)
    mmap(mm, BASE + 2 * PAGE, 6 * PAGE, PROT_READ | PROT_EXEC, FIXED, other, 7)
    assert layout(mm) == [(0, 2, 0), (2, 8, 7), (8, 10, 102)]
    munmap(mm, BASE, 16 * PAGE)
    assert layout(mm) == []
    assert [file_ref_read(f, "f_ref") for f in (file, other)] == [1, 1]
    assert len(file.f_mapping.i_mmap) == 0


@pytest.mark.parametrize(
    ("prev", "next_", "expected"),
    [
        (True, False, [(0, 8, 0)]),  # AAAANNNN
        (False, True, [(4, 12, 4)]),  #     NNNNBBBB
        (True, True, [(0, 12, 0)]),  # AAAANNNNBBBB
    ],
)
def test_a_new_range_joins_its_neighbours(mm, file, prev, next_, expected):
    """Left, right and both: one mapping results, with one file reference."""
    if prev:
        mmap(mm, BASE, 4 * PAGE, PROT_READ, FIXED, file, 0)
    if next_:
        mmap(mm, BASE + 8 * PAGE, 4 * PAGE, PROT_READ, FIXED, file, 8)
    mmap(mm, BASE + 4 * PAGE, 4 * PAGE, PROT_READ, FIXED, file, 4)
    assert layout(mm) == expected
    assert file_ref_read(file, "f_ref") == 2


@pytest.mark.parametrize("what", ["pgoff", "flags", "file", "gap"])
def test_what_does_not_fit_stays_apart(mm, file, what):
    """Wrong offset, other access, another struct file of the same inode, a gap."""
    again = open_file("/bin/x", size=MB)
    mmap(mm, BASE, 4 * PAGE, PROT_READ, FIXED, file, 0)
    mmap(
        mm,
        BASE + (5 if what == "gap" else 4) * PAGE,
        4 * PAGE,
        RW if what == "flags" else PROT_READ,
        FIXED,
        again if what == "file" else file,
        {"pgoff": 5, "gap": 5}.get(what, 4),
    )
    assert len(layout(mm)) == 2


def test_a_mapping_with_a_close_hook_does_not_vanish(mm):
    """Both sides fit, but next may not be removed: only the left one grows."""
    mmap(mm, BASE, 4 * PAGE, RW, ANON)
    mmap(mm, BASE + 8 * PAGE, 4 * PAGE, RW, ANON)
    closed = []
    vma_lookup(mm, BASE + 8 * PAGE).vm_ops = VmOperations(close=closed.append)
    mmap(mm, BASE + 4 * PAGE, 4 * PAGE, RW, ANON)
    assert layout(mm) == [(0, 8, None), (8, 12, None)]
    munmap(mm, BASE + 8 * PAGE, 4 * PAGE)
    assert len(closed) == 1


def test_mprotect_splits_and_joins_again(mm):
    """The middle of a mapping changes and changes back: three mappings, then one."""
    mmap(mm, BASE, 9 * PAGE, RW, ANON)
    mprotect(mm, BASE + 3 * PAGE, 3 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC)
    assert layout(mm) == [(0, 3, None), (3, 6, None), (6, 9, None)]
    mprotect(mm, BASE + 3 * PAGE, 3 * PAGE, RW)
    assert layout(mm) == [(0, 9, None)]


def test_mprotect_errors(mm):
    """A hole is -ENOMEM, but what came before it has changed; a read-only file stays unwritable."""
    read_only = open_file("/bin/ro", size=MB, writable=False)
    mmap(mm, BASE, 2 * PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, read_only, 0)
    assert errno_of(mprotect, mm, BASE, PAGE, RW) == EACCES
    mmap(mm, BASE + 4 * PAGE, 2 * PAGE, RW, ANON)
    assert errno_of(mprotect, mm, BASE + 4 * PAGE, 8 * PAGE, PROT_READ) == ENOMEM
    assert not vma_lookup(mm, BASE + 5 * PAGE).vm_flags & PROT_WRITE
    assert errno_of(mprotect, mm, BASE + 1, PAGE, RW) == EINVAL


def test_mremap_moves_grows_and_shrinks(mm, file):
    """In place where there is room, else elsewhere if allowed; offsets stay with their bytes."""
    mmap(mm, BASE, 4 * PAGE, PROT_READ, FIXED, file, 10)
    assert mremap(mm, BASE, 4 * PAGE, 6 * PAGE, 0) == BASE
    assert mremap(mm, BASE, 6 * PAGE, 2 * PAGE, 0) == BASE
    mmap(mm, BASE + 2 * PAGE, PAGE, RW, ANON)
    assert errno_of(mremap, mm, BASE, 2 * PAGE, 4 * PAGE, 0) == ENOMEM
    assert mremap(mm, BASE + PAGE, PAGE, 3 * PAGE, 3, BASE + 32 * PAGE) == BASE + 32 * PAGE
    assert layout(mm) == [(0, 1, 10), (2, 3, None), (32, 35, 11)]


def test_brk_grows_shrinks_and_refuses(mm):
    """The heap is one mapping; a brk that is not possible returns the old one."""
    mm.start_brk = mm.brk = BASE
    assert brk(mm, BASE + 3 * PAGE + 7) == BASE + 3 * PAGE + 7
    assert brk(mm, BASE + 6 * PAGE) == BASE + 6 * PAGE
    assert layout(mm) == [(0, 6, None)]
    assert brk(mm, BASE + 2 * PAGE) == BASE + 2 * PAGE
    assert layout(mm) == [(0, 2, None)]
    mmap(mm, BASE + 8 * PAGE, PAGE, PROT_READ, ANON)
    assert brk(mm, BASE + 8 * PAGE) == BASE + 2 * PAGE
    assert brk(mm, BASE - PAGE) == BASE + 2 * PAGE


# -------------------------------------------------------------------------------------- limits, counts, hooks


def test_the_map_limit_is_the_kernels(mm, monkeypatch):
    """A hole that would pass the limit is -ENOMEM and changes nothing; cutting off an end is allowed."""
    monkeypatch.setattr(mm_struct, "sysctl_max_map_count", 3)
    for i in range(4):  # one more than the limit: mmap checks "greater"
        mmap(mm, BASE + 16 * i * PAGE, 8 * PAGE, RW, ANON)
    assert errno_of(mmap, mm, BASE + 100 * PAGE, PAGE, RW, ANON) == ENOMEM
    assert errno_of(munmap, mm, BASE + 2 * PAGE, 2 * PAGE) == ENOMEM
    assert errno_of(mprotect, mm, BASE + 2 * PAGE, 2 * PAGE, PROT_READ) == ENOMEM
    assert layout(mm)[0] == (0, 8, None)
    munmap(mm, BASE + 6 * PAGE, 12 * PAGE)
    assert layout(mm)[:2] == [(0, 6, None), (18, 24, None)]


def test_shared_writable_mappings_are_counted(mm, file):
    """i_mmap_writable follows mmap, split and munmap."""
    mmap(mm, BASE, 8 * PAGE, RW, MAP_SHARED | MAP_FIXED, file, 0)
    munmap(mm, BASE + 2 * PAGE, PAGE)
    assert mapping_writably_mapped(file.f_mapping)
    munmap(mm, BASE, 8 * PAGE)
    assert not mapping_writably_mapped(file.f_mapping)


def test_every_object_comes_back():
    """After the last user: no VMA, node, file or mm is left in its cache."""
    from kmodel.fs import filp_close
    from kmodel.mm import maple_node, vma

    made = mm_alloc()
    file = open_file("/bin/z", size=MB)
    for i in range(60):
        mmap(made, BASE + 3 * i * PAGE, 2 * PAGE, PROT_READ, FIXED, file, i)
    mmap(made, 0, 8 * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS)
    filp_close(file)
    mmput(made)
    rcu_barrier()
    caches = (vma.vm_area_cachep, mm_struct.mm_cachep, maple_node.maple_leaf_cache)
    assert [cache.statistics().live for cache in caches] == [0, 0, 0]


def test_an_mm_built_by_hand_works_too():
    """MmStruct() is as good as mm_alloc()."""
    made = MmStruct()
    mmap(made, BASE, PAGE, RW, ANON)
    assert layout(made) == [(0, 1, None)]
    mmput(made)


def test_hooks_are_told_what_appears_and_goes(mm, file, monkeypatch):
    """uprobe_mmap for each new piece, uprobe_munmap before it goes; pages are zapped once."""
    calls = []
    monkeypatch.setattr(hooks, "uprobe_mmap", lambda vma: calls.append(("mmap", vma.vm_pgoff)))
    monkeypatch.setattr(hooks, "uprobe_munmap", lambda vma, s, e: calls.append(("munmap", vma.vm_pgoff)))
    monkeypatch.setattr(hooks, "zap_pages", lambda mm, start, end: calls.append(("zap", end - start)))
    mmap(mm, BASE, 4 * PAGE, PROT_READ, FIXED, file, 8)
    munmap(mm, BASE, PAGE)
    #   split at page 1: the whole is announced as going, then both halves as new; then the first goes
    assert calls == [
        ("mmap", 8),
        ("munmap", 8),
        ("mmap", 8),
        ("mmap", 9),
        ("munmap", 8),
        ("zap", PAGE),
    ]


# ------------------------------------------------------------------------------------------------ speculation


class TwoFiles:
    """An executable mapping that is replaced by another file's, and what was where at each even count."""

    def __init__(self):
        from kmodel.core import boot

        boot()
        self.mm = mm_alloc()
        self.files = [open_file(f"/bin/{name}", size=MB) for name in "ab"]
        self.journal = {}
        self.accepted = 0
        self.map(0)

    def map(self, which):
        mmap(self.mm, BASE, 4 * PAGE, PROT_READ, FIXED, self.files[which], 16 * (which + 1))
        self.journal[self.mm.mm_lock_seq.sequence] = (self.files[which].f_inode, 16 * (which + 1) * PAGE)


def speculate(state, gate=None):
    """find_active_uprobe_speculative, up to the tree: was what it accepted mapped at its sample?"""
    rcu_read_lock()
    try:
        began, seq = mmap_lock_speculate_try_begin(state.mm)
        vma = vma_lookup(state.mm, BASE) if began else None
        file = vma.vm_file if vma is not None else None
        if file is None:
            return
        if gate is not None:
            gate.stop()
        found = (file.f_inode, vma.vm_pgoff * PAGE + BASE - vma.vm_start)
        if mmap_lock_speculate_retry(state.mm, seq):
            return
        state.accepted += 1
        if state.journal.get(seq, found) != found:
            raise KernelBug(f"at {seq} it was {state.journal[seq]}, not {found}")
    finally:
        rcu_read_unlock()


def replacer(state):
    for which in (1, 0):
        for _ in range(40):
            engine().schedule(0.001)
        state.map(which)


def speculator(state):
    for _ in range(12):
        speculate(state)


def test_accepted_speculation_equals_the_journal():
    """H10: what an accepted speculation saw is what was mapped at its sample."""
    states = over_seeds(12, TwoFiles, [replacer, speculator])
    assert sum(state.accepted for state in states) > 12


def caught_speculator():
    """The mapping is replaced after the speculator has its VMA and its file."""
    gate = Gate()

    def late_replacer(state):
        gate.wait_until_reached()
        state.map(1)
        gate.open()

    def late_speculator(state):
        speculate(state, gate)

    return CoopEngine(0).run(TwoFiles, [late_replacer, late_speculator])


def test_a_speculation_across_a_change_is_refused():
    """H10: mm_lock_seq moved, so the result is thrown away."""
    assert caught_speculator().accepted == 0


def test_without_the_retry_speculation_accepts_a_mixture():
    """H10, the broken twin: one file, and the offset of a VMA that is free by now."""
    with guards.without("no-read-seqcount-retry"), pytest.raises(KernelBug, match="at "):
        caught_speculator()


def test_mmap_under_a_lock_holder_waits(mm):
    """The system calls take mmap_lock themselves: a holder is never surprised."""
    mmap(mm, BASE, PAGE, RW, ANON)
    mmap_write_lock(mm)
    assert find_vma(mm, BASE).vm_start == BASE
    mmap_write_unlock(mm)
