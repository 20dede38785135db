"""The kernel's own cases of copied mappings and of flags (tools/testing/vma), told again for the model.

Pictures as in test_kernel_vma_new.py.
"""

from itertools import combinations

from kmodel.mm import (
    VM_EXEC,
    VM_IO,
    VM_MAYBE_GUARD,
    VM_MAYEXEC,
    VM_MAYWRITE,
    VM_READ,
    VM_WRITE,
    vm_flags_clear,
    vm_flags_init,
    vm_flags_mod,
    vm_flags_reset,
    vm_flags_set,
    vma_is_attached,
)
from kmodel.mm.mremap import VmaRemapStruct, copy_vma
from tests.mm.pictures import PAGE, Space, at, place


def copy(space, letter, to, pages):
    """mremap's copy of a whole mapping."""
    vma = space[letter]
    length = pages * PAGE
    return copy_vma(VmaRemapStruct(space.mm, vma.vm_start, length, length, 3, at(to), vma))


def test_a_copy_that_meets_nobody():
    """copy_vma: backwards, to where nothing is."""
    space = Space("...VV", V={"pgoff": 19})
    with space.writing():
        made = copy(space, "V", 0, 2)
        assert made is not space["V"]
        space.name("C", made)
        assert space.picture() == "CC.VV"
        assert place(made) == (0, 2, at(0) // PAGE)
        assert vma_is_attached(made)
    space.done()


def test_a_copy_next_to_another_mapping():
    """copy_vma: what moves in front of N becomes part of it."""
    space = Space("VV....NN", N={"pgoff": at(6) // PAGE})
    with space.writing():
        assert copy(space, "V", 4, 2) is space["N"]
        assert space.picture() == "VV..NNNN"
        assert place(space["N"]) == (4, 8, at(4) // PAGE)
        assert vma_is_attached(space["N"])
        assert space.locked("N")
    space.done()


# ------------------------------------------------------------------------------------------------ flags

ALL = [1 << bit for bit in range(64)]


def test_flags_are_set_one_by_one():
    """vma_flags_unchanged: 64 flags, each leaves the others alone."""
    space = Space("V")
    with space.writing():
        vm_flags_init(space["V"], 0)
        so_far = 0
        for flag in ALL:
            vm_flags_set(space["V"], flag)
            so_far |= flag
            assert space["V"].vm_flags == so_far
        assert space.locked("V")
    space.done()


def test_flags_are_cleared():
    """vma_flags_cleared, vma_flags_word, vma_flags_empty: all at once, or all of a list; nothing is left."""
    space = Space("V")
    with space.writing():
        vm_flags_init(space["V"], (1 << 64) - 1)
        vm_flags_clear(space["V"], (1 << 64) - 1)
        assert space["V"].vm_flags == 0
        vm_flags_reset(space["V"], VM_READ | VM_WRITE | VM_EXEC)
        assert space["V"].vm_flags == VM_READ | VM_WRITE | VM_EXEC
        vm_flags_mod(space["V"], VM_IO, VM_READ | VM_WRITE | VM_EXEC)
        assert space["V"].vm_flags == VM_IO
    space.done()


def test_any_combination_is_cleared_without_the_rest():
    """vma_flags_clear: one, two or three flags, in any order."""
    own = (VM_READ, VM_WRITE, VM_EXEC, 1 << 40, 1 << 41)
    space = Space("V")
    with space.writing():
        for count in (1, 2, 3):
            for chosen in combinations(own, count):
                vm_flags_reset(space["V"], sum(own))
                vm_flags_clear(space["V"], sum(chosen))
                assert space["V"].vm_flags == sum(flag for flag in own if flag not in chosen)
    space.done()


def test_flags_are_tested_and_compared():
    """vma_flags_test, _test_any, _diff, _and: plain integers in the model, so plain operators."""
    flags = VM_READ | VM_WRITE | VM_EXEC
    more = flags | VM_MAYWRITE | VM_MAYEXEC
    assert flags & VM_READ
    assert flags & (VM_READ | VM_IO)
    assert flags & (VM_READ | VM_IO) != VM_READ | VM_IO
    assert not flags & VM_MAYWRITE
    assert flags ^ more == VM_MAYWRITE | VM_MAYEXEC
    assert flags ^ flags == 0
    assert flags & more == flags
    assert flags & (VM_IO | VM_MAYBE_GUARD) == 0
