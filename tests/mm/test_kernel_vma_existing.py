"""The kernel's own cases of a mapping whose attributes change (tools/testing/vma), told again for the model.

Pictures as in test_kernel_vma_new.py.
"""

from errno import ENOMEM
from itertools import product

import pytest

from kmodel.mm import VM_STICKY, mprotect
from kmodel.mm.vma_merge import VmaMergeStruct, vma_expand, vma_merge_existing_range
from kmodel.slab import fail_nth
from tests.mm.pictures import CLOSES, FLAGS, PAGE, Space, at, new_anon_vma, place

# --------------------------------------------------------------------------------------------- merge_existing


def sticky(yes):
    return {"flags": FLAGS | (VM_STICKY if yes else 0)}


def in_all_combinations(test):
    """The test, once for each choice of which of the three mappings has sticky flags."""

    def every():
        for prev, middle, next_ in product((False, True), repeat=3):
            test(prev, middle, next_)

    every.__name__, every.__doc__ = test.__name__, test.__doc__
    return every


@in_all_combinations
def test_right_part(prev, middle, next_):
    """The end of V goes to N: the bound between them moves, both keep their close hooks."""
    anon = new_anon_vma()
    space = Space(
        "..VVVVNNN",
        V=sticky(middle) | {"anon": anon, "ops": CLOSES},
        N=sticky(next_) | {"ops": CLOSES},
    )
    with space.writing():
        assert vma_merge_existing_range(space.change("V", 3, 6)) is space["N"]
        assert space.picture() == "..VNNNNNN"
        assert place(space["V"]) == (2, 3, 2)
        assert place(space["N"]) == (3, 9, 3)
        assert space["N"].anon_vma is anon
        assert space.locked("VN")
        assert bool(space["N"].vm_flags & VM_STICKY) == (middle or next_)
    space.done()


@in_all_combinations
def test_right_whole(prev, middle, next_):
    """All of V goes to N."""
    anon = new_anon_vma()
    space = Space("..VVVVNNN", V=sticky(middle) | {"anon": anon}, N=sticky(next_) | {"ops": CLOSES})
    with space.writing():
        assert vma_merge_existing_range(space.change("V", 2, 6)) is space["N"]
        assert space.picture() == "..NNNNNNN"
        assert place(space["N"]) == (2, 9, 2)
        assert space["N"].anon_vma is anon
        assert space.locked("N")
        assert bool(space["N"].vm_flags & VM_STICKY) == (middle or next_)
    space.done()


@in_all_combinations
def test_left_part(prev, middle, next_):
    """The beginning of V goes to P."""
    anon = new_anon_vma()
    space = Space(
        "PPPVVVV", P=sticky(prev) | {"ops": CLOSES}, V=sticky(middle) | {"anon": anon, "ops": CLOSES}
    )
    with space.writing():
        assert vma_merge_existing_range(space.change("V", 3, 6)) is space["P"]
        assert space.picture() == "PPPPPPV"
        assert place(space["P"]) == (0, 6, 0)
        assert place(space["V"]) == (6, 7, 6)
        assert space["P"].anon_vma is anon
        assert space.locked("PV")
        assert bool(space["P"].vm_flags & VM_STICKY) == (prev or middle)
    space.done()


@in_all_combinations
def test_left_whole(prev, middle, next_):
    """All of V goes to P."""
    anon = new_anon_vma()
    space = Space("PPPVVVV", P=sticky(prev) | {"ops": CLOSES}, V=sticky(middle) | {"anon": anon})
    with space.writing():
        assert vma_merge_existing_range(space.change("V", 3, 7)) is space["P"]
        assert space.picture() == "PPPPPPP"
        assert place(space["P"]) == (0, 7, 0)
        assert space["P"].anon_vma is anon
        assert space.locked("P")
        assert bool(space["P"].vm_flags & VM_STICKY) == (prev or middle)
    space.done()


@in_all_combinations
def test_both(prev, middle, next_):
    """P takes V and N."""
    anon = new_anon_vma()
    space = Space(
        "PPPVVVVNN", P=sticky(prev) | {"ops": CLOSES}, V=sticky(middle) | {"anon": anon}, N=sticky(next_)
    )
    with space.writing():
        assert vma_merge_existing_range(space.change("V", 3, 7)) is space["P"]
        assert space.picture() == "PPPPPPPPP"
        assert place(space["P"]) == (0, 9, 0)
        assert space["P"].anon_vma is anon
        assert space.locked("P")
        assert bool(space["P"].vm_flags & VM_STICKY) == (prev or middle or next_)
    space.done()


@pytest.mark.parametrize(("start", "end"), [(4, 5), (5, 6), (6, 7), (4, 7), (4, 6)])
def test_the_inside_of_a_mapping_merges_with_nobody(start, end):
    """A range that touches no edge of V: nothing to decide."""
    space = Space("PPPVVVVVNN")
    with space.writing():
        vmg = space.change("V", start, end)
        assert vma_merge_existing_range(vmg) is None
        assert not vmg.out_of_memory
        assert space.picture() == "PPPVVVVVNN"
        assert not space.locked("V")
    space.done()


@in_all_combinations
def test_sticky_flags_outlive_mprotect(prev, middle, next_):
    """The same through the system call: what it sets does not forget what a merge brought along."""
    space = Space("PPPVVVVNN", P=sticky(prev), V={"flags": sticky(middle)["flags"] & ~2}, N=sticky(next_))
    mprotect(space.mm, at(3), 4 * PAGE, 3)
    # V got VM_ACCOUNT with its first writable page, which P and N lack here.
    assert space.picture() == "PPPVVVVNN"
    mprotect(space.mm, at(0), 9 * PAGE, 1)
    mprotect(space.mm, at(0), 9 * PAGE, 3)
    assert space.picture() == "PPPPPPPPP"
    assert bool(space["P"].vm_flags & VM_STICKY) == (prev or middle or next_)
    space.done()


# ------------------------------------------------------------------------------------------------ close hooks


@pytest.mark.parametrize(
    ("before", "start", "end"), [("PPPVV....", 3, 5), ("...VVNNNN", 3, 5), ("PPPVVNNNN", 3, 5)]
)
def test_a_vma_with_a_close_hook_is_not_removed(before, start, end):
    """vma_merge_with_close: V would have to go, to the left, to the right or to both: no merge."""
    space = Space(before, V={"ops": CLOSES})
    with space.writing():
        vmg = space.change("V", start, end)
        assert vma_merge_existing_range(vmg) is None
        assert not vmg.out_of_memory
        assert space.picture(9) == before
    space.done()


def test_next_with_a_close_hook_stays():
    """vma_merge_with_close: the merge of three becomes a merge of two."""
    space = Space("PPPVVNNNN", N={"ops": CLOSES})
    with space.writing():
        assert vma_merge_existing_range(space.change("V", 3, 5)) is space["P"]
        assert space.picture() == "PPPPPNNNN"
        assert place(space["P"]) == (0, 5, 0)
    space.done()


# ------------------------------------------------------------------------------------------------ anon_vma


def test_neighbours_with_different_private_pages_do_not_meet():
    """anon_vma_non_mergeable: V goes with either side, so it goes left."""
    one, two = new_anon_vma(), new_anon_vma()
    space = Space("PPPVVVVNN", P={"anon": one}, N={"anon": two})
    with space.writing():
        assert vma_merge_existing_range(space.change("V", 3, 7)) is space["P"]
        assert space.picture() == "PPPPPPPNN"
        assert space.locked("P")
        assert not space.locked("N")
    space.done()


def test_a_vma_that_expands_over_next_gets_its_anon_vma():
    """dup_anon_vma, expansion: the swallowed VMA's pages need a name in the one that stays."""
    anon = new_anon_vma()
    space = Space("PPPNN", N={"anon": anon})
    with space.writing():
        vmg = VmaMergeStruct(space.mm, None, space["N"], at(0), at(5), 0, FLAGS, target=space["P"])
        assert vma_expand(vmg) == 0
        assert space.picture() == "PPPPP"
        assert space["P"].anon_vma is anon
        assert space["P"].anon_vma_chain == (anon,)
        assert anon.num_active_vmas == 1
    space.done()
    assert anon.num_active_vmas == 0


@pytest.mark.parametrize(
    ("before", "owner", "start", "end", "target", "after"),
    [
        ("PPPVVNNN", "N", 3, 5, "P", "PPPPPPPP"),
        ("PPPVVNNN", "V", 3, 5, "P", "PPPPPPPP"),
        ("PPPVVVVV", "V", 3, 5, "P", "PPPPPVVV"),
        ("VVVVVNNN", "V", 3, 5, "N", "VVVNNNNN"),
    ],
)
def test_the_vma_that_grows_gets_the_anon_vma(before, owner, start, end, target, after):
    """dup_anon_vma, change: whoever had it, the VMA that takes the pages in has it afterwards."""
    anon = new_anon_vma()
    space = Space(before, **{owner: {"anon": anon}})
    with space.writing():
        assert vma_merge_existing_range(space.change("V", start, end)) is space[target]
        assert space.picture() == after
        assert space[target].anon_vma is anon
        assert space[target].anon_vma_chain == (anon,)
        assert anon.num_active_vmas == len({target, owner} & set(after))
    space.done()
    assert anon.num_active_vmas == 0


# ------------------------------------------------------------------------------------------------ no memory


def test_without_memory_for_the_tree_a_change_undoes_its_anon_vma():
    """vmi_prealloc_fail: P had V's anon_vma for a moment; nothing is left of it."""
    anon = new_anon_vma()
    space = Space("PPPVV", V={"anon": anon})
    with space.writing(), fail_nth(1, cache="maple_leaf"):
        vmg = space.change("V", 3, 5)
        assert vma_merge_existing_range(vmg) is None
        assert vmg.out_of_memory
    assert space.picture() == "PPPVV"
    assert space["P"].anon_vma is None
    assert space["P"].anon_vma_chain == ()
    assert anon.num_active_vmas == 1
    space.done()


def test_without_memory_for_the_tree_an_expansion_undoes_its_anon_vma():
    """vmi_prealloc_fail, expansion."""
    anon = new_anon_vma()
    space = Space("PPPVV", V={"anon": anon})
    with space.writing(), fail_nth(1, cache="maple_leaf"):
        vmg = VmaMergeStruct(space.mm, None, space["V"], at(0), at(5), 0, FLAGS, target=space["P"])
        assert vma_expand(vmg) == -ENOMEM
    assert space.picture() == "PPPVV"
    assert space["P"].anon_vma is None
    assert anon.num_active_vmas == 1
    space.done()
