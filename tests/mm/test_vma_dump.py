"""dump_vma() in words, every row of vm_refcnt's table; helpers that say what they found, and warn once."""

import logging

import pytest

from kmodel.core import KernelBug, kernel_warnings, raw_set
from kmodel.mm import (
    VM_REFCNT_EXCLUDE_READERS_FLAG,
    mmap_write_lock,
    mmap_write_unlock,
    vm_area_alloc,
    vma_assert_attached,
    vma_assert_detached,
    vma_assert_write_locked,
    vma_lookup,
    vma_mark_attached,
    vma_mark_detached,
    vma_start_write,
)
from kmodel.mm.debug import dump_vma
from kmodel.mm.vma_lock import check_invariants
from tests.mm.helpers import BASE, OneVma

FLAG = VM_REFCNT_EXCLUDE_READERS_FLAG


@pytest.fixture
def state():
    return OneVma()


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "detached"),
        (1, "attached, unlocked"),
        (2, "attached, 1 readers"),
        (FLAG - 1, f"attached, {FLAG - 2} readers"),
        (FLAG, "detaching, no reader left"),
        (FLAG + 1, "being write-locked, no reader left (or detaching, one temporary reader left)"),
        (FLAG + 3, "a writer waits for 2 readers (or a detacher for 3)"),
    ],
)
def test_each_row_of_the_table_has_its_words(state, count, words):
    """vm_refcnt in words, and a value that the lock knows."""
    vma = vma_lookup(state.mm, BASE)
    raw_set(vma, "vm_refcnt", count)
    check_invariants(vma)
    assert dump_vma(vma).endswith(f": {words}")
    raw_set(vma, "vm_refcnt", 1)


def test_a_dump_names_range_flags_and_numbers(state, caplog):
    """What one needs to see, logged, and the VMA as it was."""
    vma = vma_lookup(state.mm, BASE)
    mmap_write_lock(state.mm)
    vma_start_write(vma)
    with caplog.at_level(logging.ERROR, logger="kmodel"):
        text = dump_vma(vma)
    mmap_write_unlock(state.mm)
    first, second, third = text.splitlines()
    assert f"{BASE:x}-{BASE + 0x4000:x} rw-p of" in first
    assert second.strip().startswith(f"pgoff {BASE >> 12:#x} flags 0x")
    assert third.strip() == "vm_refcnt 0x1 vm_lock_seq 3 mm_lock_seq 3: attached, write-locked"
    assert text in caplog.text


def test_a_value_that_no_row_has_is_a_bug(state):
    """V3: below 0 or with two writers' bits."""
    vma = vma_lookup(state.mm, BASE)
    for wrong in (-1, 2 * FLAG):
        raw_set(vma, "vm_refcnt", wrong)
        with pytest.raises(KernelBug, match="V3"):
            check_invariants(vma)
    raw_set(vma, "vm_refcnt", 1)


def test_the_assertions_say_what_they_found(state):
    """Each helper returns whether it held, so a test can ask; only what does not hold warns."""
    vma = vma_lookup(state.mm, BASE)
    new = vm_area_alloc(state.mm)
    mmap_write_lock(state.mm)
    vma_start_write(vma)
    assert (vma_assert_attached(vma), vma_assert_detached(new), vma_assert_write_locked(vma)) == (True,) * 3
    assert kernel_warnings() == ()
    assert (vma_assert_attached(new), vma_assert_detached(vma), vma_assert_write_locked(new)) == (False,) * 3
    mmap_write_unlock(state.mm)
    assert len(kernel_warnings()) == 3


def test_a_misuse_that_is_repeated_warns_once(state):
    """Attaching or detaching again and again changes nothing; one warning each, with a count."""
    vma = vma_lookup(state.mm, BASE)
    mmap_write_lock(state.mm)
    vma_start_write(vma)
    assert [vma_mark_attached(vma) for _ in range(3)] == [False] * 3
    assert vma.vm_refcnt == 1
    assert [vma_mark_detached(vma) for _ in range(4)] == [True, False, False, False]
    assert vma.vm_refcnt == 0
    assert vma_mark_attached(vma)
    mmap_write_unlock(state.mm)
    assert [(w.message, w.count) for w in kernel_warnings()] == [
        ("a VMA is not detached", 3),
        ("a VMA is not attached", 3),
    ]
