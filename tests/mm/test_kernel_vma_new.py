"""The kernel's own cases of a new range next to mappings (tools/testing/vma), told again for the model.

A picture has one letter per page: the VMA that maps it. The picture before a step stands in the assertion or
the constructor before it, the picture after it in the assertion behind.
"""

from itertools import product

from kmodel.mm import (
    VM_DONTEXPAND,
    VM_IO,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_SPECIAL,
    VM_STICKY,
)
from kmodel.mm.mmap import mmap_region
from kmodel.mm.vma_iter import vma_iter_init
from kmodel.mm.vma_merge import (
    VmaMergeStruct,
    vma_expand,
    vma_merge_existing_range,
    vma_merge_extend,
    vma_merge_new_range,
    vma_modify,
    vma_shrink,
)
from tests.mm.pictures import CLOSES, FLAGS, PAGE, Space, at, give_anon_vma, new_anon_vma, place


def test_a_new_range_fills_the_gap_between_two():
    """simple_merge: left, new and right become one."""
    space = Space("L.R")
    with space.writing():
        merged = vma_merge_new_range(space.new(1, 2))
        assert merged is space["L"]
        assert space.picture() == "LLL"
        assert place(merged) == (0, 3, 0)
        assert merged.vm_flags == FLAGS
    space.done()


def test_changing_the_middle_splits_twice():
    """simple_modify: the VMA itself becomes the middle, what is around it is new."""
    space = Space("VVV")
    with space.writing():
        vma = vma_modify(space.change("V", 1, 2), vma_iter_init(space.mm, at(1)))
        assert vma is space["V"]
        assert space.picture() == "?V?"
        assert [place(vma) for vma in space.vmas()] == [(0, 1, 0), (1, 2, 1), (2, 3, 2)]
    space.done()


def test_a_vma_expands():
    """simple_expand: into nothing, upwards."""
    space = Space("V..")
    with space.writing():
        vmg = VmaMergeStruct(space.mm, None, None, at(0), at(3), 0, FLAGS, target=space["V"])
        assert vma_expand(vmg) == 0
        assert space.picture() == "VVV"
        assert place(space["V"]) == (0, 3, 0)
    space.done()


def test_a_vma_shrinks():
    """simple_shrink: what a stack in the making does."""
    space = Space("VVV")
    with space.writing():
        assert vma_shrink(space.mm, space["V"], at(0), at(1), 0) == 0
        assert space.picture(3) == "V.."
        assert place(space["V"]) == (0, 1, 0)
        assert space.locked("V")
    space.done()


def test_new_ranges_one_after_the_other():
    """merge_new: both sides, left, right, until one VMA is left; sticky flags of any part stay (G2)."""
    for new, a, b, c in product((False, True), repeat=4):
        new_ranges_one_after_the_other(new, a, b, c)


def new_ranges_one_after_the_other(new, a, b, c):
    own = {"new": new, "A": a, "B": b, "C": c}
    base = FLAGS | (VM_STICKY if new else 0)

    def flags(letter):
        return {"flags": base | (VM_STICKY if own[letter] else 0)}

    space = Space("AA.B.......C", A=flags("A"), B=flags("B"), C=flags("C"))
    anon = new_anon_vma()

    def step(before, start, end, target, after, *parts):
        assert space.picture(12) == before
        with space.writing():
            merged = vma_merge_new_range(space.new(start, end, flags=base))
            assert merged is space[target]
            assert space.picture(12) == after
            assert space.locked(target)
            assert merged.anon_vma is anon
            assert place(merged)[2] == place(merged)[0]
        if any(own[part] for part in parts):
            assert merged.vm_flags & VM_STICKY == VM_STICKY

    with space.writing():
        assert vma_merge_new_range(space.new(7, 9, flags=base)) is None  # nothing next to it
    space.put("D", 7, 9, flags=base)
    assert space.picture() == "AA.B...DD..C"

    # Only a VMA that has to go is asked for a close hook: A's does not matter, nor D's in the middle step.
    space["A"].vm_ops = CLOSES
    give_anon_vma(space["B"], anon)
    step("AA.B...DD..C", 2, 3, "A", "AAAA...DD..C", "new", "A", "B")
    step("AAAA...DD..C", 4, 5, "A", "AAAAA..DD..C", "new", "A")
    give_anon_vma(space["D"], anon)
    space["D"].vm_ops = CLOSES
    step("AAAAA..DD..C", 6, 7, "D", "AAAAA.DDD..C", "new")
    space["D"].vm_ops = None
    step("AAAAA.DDD..C", 5, 6, "A", "AAAAAAAAA..C", "new", "A")
    give_anon_vma(space["C"], anon)
    step("AAAAAAAAA..C", 10, 11, "C", "AAAAAAAAA.CC", "new", "C")
    step("AAAAAAAAA.CC", 9, 10, "A", "AAAAAAAAAAAA", "new", "A", "C")
    assert space.mm.map_count == 1
    space.done()


SPECIAL = (VM_IO, VM_DONTEXPAND, VM_PFNMAP, VM_MIXEDMAP)


def test_the_special_flags_are_these():
    """No flag joined them unnoticed."""
    assert VM_SPECIAL == VM_IO | VM_DONTEXPAND | VM_PFNMAP | VM_MIXEDMAP


def test_special_mappings_do_not_merge():
    """vma_merge_special_flags: neither a new range nor a changed one, though all is equal."""
    for special in SPECIAL:
        special_mappings_do_not_merge(special)


def special_mappings_do_not_merge(special):
    space = Space("AAA", A={"flags": FLAGS | special})
    with space.writing():
        assert vma_merge_new_range(space.new(3, 4, flags=FLAGS | special)) is None
    space.put("B", 3, 4)
    assert space.picture() == "AAAB"
    with space.writing():
        vmg = space.change("B", 3, 4, flags=FLAGS | special)
        assert vma_merge_existing_range(vmg) is None
        assert not vmg.out_of_memory
    assert space.picture() == "AAAB"
    space.done()


def test_next_with_a_close_hook_stays_beside_a_new_range():
    """vma_merge_with_close: prev takes the new range, and next is left alone."""
    space = Space("PPP..NNNN", N={"ops": CLOSES})
    with space.writing():
        assert vma_merge_new_range(space.new(3, 5)) is space["P"]
        assert space.picture() == "PPPPPNNNN"
        assert place(space["P"]) == (0, 5, 0)
    space.done()


def test_both_neighbours_with_close_hooks_leave_the_left_merge():
    """vma_merge_new_with_close: nobody is removed, so prev may still grow."""
    space = Space("PP...NN", P={"ops": CLOSES}, N={"ops": CLOSES})
    with space.writing():
        merged = vma_merge_new_range(space.new(2, 5))
        assert merged is space["P"]
        assert space.picture() == "PPPPPNN"
        assert merged.vm_ops is CLOSES
        assert space.locked("P")
        assert space.mm.map_count == 2
    space.done()


def test_neighbours_with_different_private_pages_do_not_meet_over_a_new_range():
    """anon_vma_non_mergeable, new range: it would go with either, but they not with each other."""
    one, two = new_anon_vma(), new_anon_vma()
    space = Space("PPP....NNN", P={"anon": one}, N={"anon": two})
    with space.writing():
        assert vma_merge_new_range(space.new(3, 7)) is space["P"]
        assert space.picture() == "PPPPPPPNNN"
        assert space.locked("P")
        assert not space.locked("N")
    space.done()


def test_an_extension_meets_the_next_mapping():
    """merge_extend: mremap grows a VMA over the gap, up to the one behind it, which goes."""
    space = Space("V..N")
    with space.writing():
        assert vma_merge_extend(space["V"], 2 * PAGE) is space["V"]
        assert space.picture() == "VVVV"
        assert place(space["V"]) == (0, 4, 0)
        assert space.locked("V")
        assert space.mm.map_count == 1
    space.done()


def test_expand_only_looks_at_prev_alone():
    """expand_only_mode: brk's merge, with something far below and nothing else asked."""
    space = Space("OO.PP....")
    with space.writing():
        vmg = space.new(5, 9)
        vmg.just_expand = True
        assert vma_merge_new_range(vmg) is space["P"]
        assert space.picture() == "OO.PPPPPP"
        assert place(space["P"]) == (3, 9, 3)
        assert space.locked("P")
    space.done()


def test_expand_only_does_not_take_in_next():
    """A neighbour above that fits is left alone too: the heap does not swallow mappings."""
    space = Space("PP..NN")
    with space.writing():
        vmg = space.new(2, 4)
        vmg.just_expand = True
        assert vma_merge_new_range(vmg) is space["P"]
        assert space.picture() == "PPPPNN"
    space.done()


def test_mmap_region_merges_to_either_side():
    """mmap_region_basic: four mappings, the third above the first, the fourth below the second."""
    space = Space()

    def region(address):
        with space.writing():
            assert mmap_region(space.mm, None, address, 0x3000, FLAGS, address // PAGE) == address
        return [(vma.vm_start, vma.vm_end, vma.vm_pgoff) for vma in space.vmas()]

    assert region(0x300000) == [(0x300000, 0x303000, 0x300)]
    assert region(0x250000) == [(0x250000, 0x253000, 0x250), (0x300000, 0x303000, 0x300)]
    assert region(0x303000) == [(0x250000, 0x253000, 0x250), (0x300000, 0x306000, 0x300)]
    assert region(0x24D000) == [(0x24D000, 0x253000, 0x24D), (0x300000, 0x306000, 0x300)]
    assert space.mm.map_count == 2
    space.done()
