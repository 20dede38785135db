"""madvise and anonymous names: flags, errors, splits, merges, seals."""

from errno import EBADF, EINVAL, ENOMEM, EPERM

import pytest

from kmodel.core import kernel_warnings
from kmodel.fs import open_file
from kmodel.mm import (
    MADV_DODUMP,
    MADV_DOFORK,
    MADV_DONTDUMP,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_KEEPONFORK,
    MADV_MERGEABLE,
    MADV_NOHUGEPAGE,
    MADV_NORMAL,
    MADV_RANDOM,
    MADV_SEQUENTIAL,
    MADV_UNMERGEABLE,
    MADV_WIPEONFORK,
    MAP_ANONYMOUS,
    MAP_DROPPABLE,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    VM_DONTCOPY,
    VM_DONTDUMP,
    VM_HUGEPAGE,
    VM_MERGEABLE,
    VM_NOHUGEPAGE,
    VM_RAND_READ,
    VM_SEALED,
    VM_SEQ_READ,
    VM_WIPEONFORK,
    madvise,
    mm_alloc,
    mmap,
    mmap_write_lock,
    mmap_write_unlock,
    mmput,
    mprotect,
    prctl_set_vma_anon_name,
    user_load,
    user_store,
    vm_flags_set,
    vma_lookup,
)
from kmodel.proc import proc_maps
from kmodel.slab import fail_nth
from tests.mm.helpers import ANON, BASE, PAGE, RW

SHARED = MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED


@pytest.fixture
def mm():
    made = mm_alloc()
    mmap(made, BASE, 8 * PAGE, RW, ANON)
    yield made
    mmput(made)
    assert kernel_warnings() == ()


def flags(mm, page=0):
    return vma_lookup(mm, BASE + page * PAGE).vm_flags


def errno_of(call, *args):
    try:
        call(*args)
    except OSError as error:
        return error.errno
    return 0


@pytest.mark.parametrize(
    ("advice", "flag", "undo"),
    [
        (MADV_DONTFORK, VM_DONTCOPY, MADV_DOFORK),
        (MADV_DONTDUMP, VM_DONTDUMP, MADV_DODUMP),
        (MADV_WIPEONFORK, VM_WIPEONFORK, MADV_KEEPONFORK),
        (MADV_MERGEABLE, VM_MERGEABLE, MADV_UNMERGEABLE),
        (MADV_SEQUENTIAL, VM_SEQ_READ, MADV_NORMAL),
        (MADV_RANDOM, VM_RAND_READ, MADV_NORMAL),
        (MADV_HUGEPAGE, VM_HUGEPAGE, None),
        (MADV_NOHUGEPAGE, VM_NOHUGEPAGE, None),
    ],
)
def test_advice_splits_and_its_undoing_merges(mm, advice, flag, undo):
    """VVVVVVVV: the middle gets the flag, V'VVVV'VV becomes three mappings; without it they are one again."""
    madvise(mm, BASE + 2 * PAGE, 3 * PAGE, advice)
    assert mm.map_count == 3
    assert [bool(flags(mm, page) & flag) for page in range(8)] == [2 <= page < 5 for page in range(8)]
    if undo is not None:
        madvise(mm, BASE, 8 * PAGE, undo)
        assert mm.map_count == 1
        assert not flags(mm) & flag


def test_one_wish_replaces_the_other(mm):
    """Random and sequential reading, and the two about huge pages, exclude each other."""
    for first, second, has, has_not in (
        (MADV_RANDOM, MADV_SEQUENTIAL, VM_SEQ_READ, VM_RAND_READ),
        (MADV_HUGEPAGE, MADV_NOHUGEPAGE, VM_NOHUGEPAGE, VM_HUGEPAGE),
    ):
        madvise(mm, BASE, 8 * PAGE, first)
        madvise(mm, BASE, 8 * PAGE, second)
        assert flags(mm) & (has | has_not) == has


def test_holes_are_passed_over_and_reported(mm):
    """-ENOMEM, after what is mapped on both sides was advised."""
    mmap(mm, BASE + 10 * PAGE, 2 * PAGE, RW, ANON)
    assert errno_of(madvise, mm, BASE + 6 * PAGE, 6 * PAGE, MADV_DONTFORK) == ENOMEM
    assert flags(mm, 7) & VM_DONTCOPY
    assert flags(mm, 11) & VM_DONTCOPY
    assert not flags(mm, 5) & VM_DONTCOPY


def test_what_is_refused(mm):
    """Unknown advice, addresses inside a page, lengths that wrap; nothing to do is no error."""
    assert errno_of(madvise, mm, BASE, PAGE, 99) == EINVAL
    assert errno_of(madvise, mm, BASE + 1, PAGE, MADV_DONTFORK) == EINVAL
    assert errno_of(madvise, mm, BASE, (1 << 64) - 1, MADV_DONTFORK) == EINVAL
    assert madvise(mm, BASE, 0, MADV_DONTFORK) == 0
    mmap(mm, BASE, PAGE, RW, SHARED)
    assert errno_of(madvise, mm, BASE, PAGE, MADV_WIPEONFORK) == EINVAL
    mmap(mm, BASE, PAGE, RW, MAP_DROPPABLE | MAP_ANONYMOUS | MAP_FIXED)
    assert errno_of(madvise, mm, BASE, PAGE, MADV_KEEPONFORK) == EINVAL
    assert errno_of(madvise, mm, BASE, PAGE, MADV_DODUMP) == EINVAL
    assert madvise(mm, BASE, PAGE, MADV_MERGEABLE) == 0
    assert not flags(mm) & VM_MERGEABLE


def test_dontneed_drops_pages(mm):
    """The next load finds zeroes."""
    user_store(mm, BASE, b"x")
    madvise(mm, BASE, PAGE, MADV_DONTNEED)
    assert user_load(mm, BASE) == b"\0"


def test_a_seal(mm):
    """Pages may be dropped by whoever could write zeroes there anyway; flags may not change access."""
    mmap_write_lock(mm)
    vm_flags_set(vma_lookup(mm, BASE), VM_SEALED)
    mmap_write_unlock(mm)
    assert madvise(mm, BASE, PAGE, MADV_DONTNEED) == 0
    assert errno_of(mprotect, mm, BASE, PAGE, PROT_READ) == EPERM
    mmap(mm, BASE + 8 * PAGE, PAGE, PROT_READ, ANON)
    mmap_write_lock(mm)
    vm_flags_set(vma_lookup(mm, BASE + 8 * PAGE), VM_SEALED)
    mmap_write_unlock(mm)
    assert errno_of(madvise, mm, BASE + 8 * PAGE, PAGE, MADV_DONTNEED) == EPERM


def test_no_memory_is_eagain(mm):
    """What would be -ENOMEM is -EAGAIN: -ENOMEM means a hole."""
    from errno import EAGAIN

    with fail_nth(1, cache="vm_area_struct"):
        assert errno_of(madvise, mm, BASE + PAGE, PAGE, MADV_DONTFORK) == EAGAIN
    assert mm.map_count == 1


# ------------------------------------------------------------------------------------------------ names


def test_names_split_and_merge(mm):
    """/proc shows [anon:NAME]; equal names are one mapping, different ones are not."""
    prctl_set_vma_anon_name(mm, BASE, 2 * PAGE, "heap of a kind")
    prctl_set_vma_anon_name(mm, BASE + 2 * PAGE, 2 * PAGE, "other")
    names = [line[73:] for line in proc_maps(mm).splitlines()]
    assert names == ["[anon:heap of a kind]", "[anon:other]", ""]
    prctl_set_vma_anon_name(mm, BASE + 2 * PAGE, 2 * PAGE, "heap of a kind")
    assert mm.map_count == 2
    prctl_set_vma_anon_name(mm, BASE, 8 * PAGE, None)
    assert mm.map_count == 1


def test_which_names_and_mappings_are_refused(mm):
    """Letters that would break /proc's text, too many of them, files; shared anonymous memory is fine."""
    for name in ("a[b", "a]", "\\", "`", "$", "tab\t", "\x7f", "x" * 80):
        assert errno_of(prctl_set_vma_anon_name, mm, BASE, PAGE, name) == EINVAL
    prctl_set_vma_anon_name(mm, BASE, PAGE, "x" * 79)
    mmap(mm, BASE, PAGE, RW, MAP_PRIVATE | MAP_FIXED, open_file("/bin/x", size=PAGE))
    assert errno_of(prctl_set_vma_anon_name, mm, BASE, PAGE, "a") == EBADF
    mmap(mm, BASE, PAGE, RW, SHARED)
    prctl_set_vma_anon_name(mm, BASE, PAGE, "a")
    assert "[anon_shmem:a]" in proc_maps(mm)
    assert errno_of(prctl_set_vma_anon_name, mm, BASE + 8 * PAGE, PAGE, "a") == ENOMEM
