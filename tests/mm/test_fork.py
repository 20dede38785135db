"""fork: what the child has, what it shares with the parent, what it owes nobody after an error."""

import errno

import pytest

from kmodel.core import (
    current,
    engine,
    kernel_warnings,
    kthread_run,
    smp_cond_load_acquire,
    variables,
    xchg,
)
from kmodel.core import test_bit as bit_is_set
from kmodel.fs import fput, open_file, prune_icache
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    MMF_HAS_UPROBES,
    PROT_READ,
    VM_DONTCOPY,
    VM_LOCKED,
    VM_WIPEONFORK,
    brk,
    find_vma,
    fork,
    get_mm_rss,
    mm_alloc,
    mmap,
    mmap_read_lock,
    mmap_read_unlock,
    mmap_write_lock,
    mmap_write_unlock,
    mmput,
    mprotect,
    munmap,
    user_load,
    user_store,
    vm_flags_set,
    vma_lookup,
)
from kmodel.mm import maple_tree as maple
from kmodel.mm.dup_mmap import dup_mm
from kmodel.mm.page_table import check_invariants, ptep_get
from kmodel.proc import proc_maps
from kmodel.rcu import rcu_barrier
from kmodel.slab import fail_nth, leaks
from tests.mm.helpers import ANON, BASE, PAGE, RW

OURS = ("page", "anon_vma", "vm_area_struct", "mm_struct", "maple_leaf", "filp")


def left():
    rcu_barrier()
    prune_icache()
    rcu_barrier()
    return [leak for leak in leaks() if leak.cache in OURS]


@pytest.fixture
def mm():
    mm = mm_alloc()
    yield mm
    check_invariants(mm)
    mmput(mm)
    assert (left(), kernel_warnings()) == ([], ())


def set_flags(mm, address, flags):
    mmap_write_lock(mm)
    vm_flags_set(vma_lookup(mm, address), flags)
    mmap_write_unlock(mm)


def anonymous(mm, pages=4, contents=b"parent"):
    mmap(mm, BASE, pages * PAGE, RW, ANON)
    for page in range(pages):
        user_store(mm, BASE + page * PAGE, contents)


# ------------------------------------------------------------------------------------------------ mappings


def test_the_child_maps_what_the_parent_maps(mm):
    """Same text in /proc/PID/maps, same counts, a tree of its own."""
    file = open_file("/A", size=16 * PAGE)
    mmap(mm, BASE, 4 * PAGE, RW, ANON)
    mmap(mm, BASE + 8 * PAGE, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, 2)
    mmap(mm, BASE + 16 * PAGE, 4 * PAGE, RW, MAP_SHARED | MAP_FIXED, file)
    mm.start_brk = mm.brk = 0x60_0000
    brk(mm, 0x60_3000)
    child = fork(mm)
    assert proc_maps(child) == proc_maps(mm)
    assert (child.map_count, child.total_vm, child.brk) == (mm.map_count, mm.total_vm, mm.brk)
    assert vma_lookup(child, BASE) is not vma_lookup(mm, BASE)
    assert vma_lookup(child, BASE).vm_mm is child
    mapping = file.f_mapping
    assert (len(mapping.i_mmap), mapping.i_mmap_writable) == (4, 2)
    maple.check_invariants(child.mm_mt)
    mmput(child)
    assert (len(mapping.i_mmap), mapping.i_mmap_writable) == (2, 1)
    fput(file)


def test_the_child_goes_on_alone(mm):
    """What one of the two maps, unmaps or protects does not concern the other."""
    anonymous(mm)
    child = fork(mm)
    before = proc_maps(mm)
    munmap(child, BASE, PAGE)
    mprotect(child, BASE + 2 * PAGE, PAGE, PROT_READ)
    assert proc_maps(mm) == before
    assert user_load(mm, BASE, 6) == b"parent"
    check_invariants(child)
    mmput(child)


def test_mappings_that_are_not_copied(mm):
    """VM_DONTCOPY leaves a gap; VM_LOCKED is not inherited."""
    anonymous(mm)
    mmap(mm, BASE + 8 * PAGE, 2 * PAGE, RW, ANON)
    set_flags(mm, BASE, VM_DONTCOPY)
    set_flags(mm, BASE + 8 * PAGE, VM_LOCKED)
    child = fork(mm)
    assert (child.map_count, child.total_vm, get_mm_rss(child)) == (1, 2, 0)
    assert vma_lookup(child, BASE) is None
    assert not vma_lookup(child, BASE + 8 * PAGE).vm_flags & VM_LOCKED
    mmput(child)


def test_wiped_on_fork(mm):
    """VM_WIPEONFORK: the mapping is copied, its pages and its anon_vma are not."""
    anonymous(mm)
    set_flags(mm, BASE, VM_WIPEONFORK)
    child = fork(mm)
    assert (vma_lookup(child, BASE).anon_vma, get_mm_rss(child)) == (None, 0)
    assert user_load(child, BASE, 6) == bytes(6)
    mmput(child)


# ------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("writer", ["parent", "child"])
def test_a_private_page_is_copied_by_who_writes_first(mm, writer):
    """Both see the old contents until one of them writes; the other keeps them."""
    anonymous(mm, 1)
    child = fork(mm)
    assert ptep_get(mm, BASE).page is ptep_get(child, BASE).page
    one, other = (mm, child) if writer == "parent" else (child, mm)
    user_store(one, BASE, b"new")
    assert (user_load(one, BASE, 6), user_load(other, BASE, 6)) == (b"newent", b"parent")
    check_invariants(mm)
    check_invariants(child)
    mmput(child)


def test_the_last_owner_of_a_page_writes_it_in_place(mm):
    """After the child has gone nothing is copied (wp_can_reuse_anon_folio)."""
    anonymous(mm, 1)
    page = ptep_get(mm, BASE).page
    mmput(fork(mm))
    user_store(mm, BASE, b"again")
    assert ptep_get(mm, BASE).page is page


def test_shared_memory_stays_shared(mm):
    """MAP_SHARED: what the child stores the parent loads."""
    mmap(mm, BASE, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED)
    child = fork(mm)
    user_store(child, BASE, b"both")
    assert user_load(mm, BASE, 4) == b"both"
    mmput(child)


def test_generations_share_and_part(mm):
    """A page goes down three generations; each keeps what it wrote, whoever ends first."""
    anonymous(mm, 2)
    child = fork(mm)
    user_store(child, BASE, b"child ")
    grandchild = fork(child)
    user_store(grandchild, BASE + PAGE, b"grand ")
    mmput(child)
    assert [user_load(grandchild, BASE + page * PAGE, 6) for page in (0, 1)] == [b"child ", b"grand "]
    assert [user_load(mm, BASE + page * PAGE, 6) for page in (0, 1)] == [b"parent"] * 2
    check_invariants(grandchild)
    mmput(grandchild)


# ------------------------------------------------------------------------------------------------ anon_vmas


def chain(mm, address=BASE):
    return vma_lookup(mm, address).anon_vma_chain


def test_a_chain_grows_by_one_with_each_generation(mm):
    """The child is on its parent's anon_vmas and on its own, which comes last and whose root is the first."""
    anonymous(mm, 1)
    child = fork(mm)
    user_store(child, BASE, b"x")
    grandchild = fork(child)
    assert [len(chain(m)) for m in (mm, child, grandchild)] == [1, 2, 3]
    assert chain(grandchild)[:2] == chain(child)
    assert chain(child)[:1] == chain(mm)
    for m in (mm, child, grandchild):
        assert vma_lookup(m, BASE).anon_vma is chain(m)[-1]
        assert chain(m)[-1].root is chain(mm)[0]
    mmput(child)
    mmput(grandchild)


def test_an_ancestor_that_lost_its_mapping_is_used_again(mm):
    """A child that forks and then ends leaves its anon_vma to the generation after: chains stay short."""
    anonymous(mm, 1)
    generations = [fork(mm)]
    for _ in range(6):
        child = fork(generations[-1])
        mmput(generations.pop())
        generations.append(child)
    assert len(chain(generations[-1])) <= 4
    mmput(generations.pop())


def test_a_fork_child_does_not_merge_its_neighbours(mm):
    """A chain of more than one may not be passed on (is_mergeable_anon_vma); a fresh VMA next to it stays
    alone, where in the parent the two become one.
    """
    anonymous(mm, 2)
    child = fork(mm)
    for who, end in ((mm, BASE + 4 * PAGE), (child, BASE + 2 * PAGE)):
        mmap(who, BASE + 2 * PAGE, 2 * PAGE, RW, ANON)
        mmap_read_lock(who)
        assert find_vma(who, BASE).vm_end == end
        mmap_read_unlock(who)
    mmput(child)


def test_an_unfaulted_child_merges(mm):
    """Without private pages there is no chain, and nothing in the way."""
    mmap(mm, BASE, 2 * PAGE, RW, ANON)
    child = fork(mm)
    mmap(child, BASE + 2 * PAGE, 2 * PAGE, RW, ANON)
    assert child.map_count == 1
    mmput(child)


# ------------------------------------------------------------------------------------------------ errors


def test_a_killed_fork(mm):
    """-EINTR while it waits for mmap_lock, and nothing was copied."""
    anonymous(mm)
    words = variables(locked=0, go=0)

    def holder():
        mmap_read_lock(mm)
        words.locked = 1
        smp_cond_load_acquire(words, "go", bool)
        mmap_read_unlock(mm)

    task = kthread_run(holder, daemon=False)
    smp_cond_load_acquire(words, "locked", bool)
    xchg(current(), "sigkill", True)
    with pytest.raises(InterruptedError):
        fork(mm)
    xchg(current(), "sigkill", False)
    words.go = 1
    assert engine().join(task, timeout=10)


@pytest.mark.parametrize("cache", ["mm_struct", "vm_area_struct", "anon_vma", "maple_leaf"])
def test_no_memory(mm, cache):
    """Every allocation may fail: -ENOMEM, nothing is left of the child, and the parent goes on."""
    file = open_file("/A", size=16 * PAGE)
    for number in range(4):
        at = BASE + number * 8 * PAGE
        mmap(mm, at, 2 * PAGE, RW, ANON)
        user_store(mm, at, b"p")
        mmap(mm, at + 2 * PAGE, 2 * PAGE, RW, MAP_SHARED | MAP_FIXED, file)
        user_store(mm, at + 2 * PAGE, b"f")
    links = len(file.f_mapping.i_mmap)
    rcu_barrier()
    live = len([leak for leak in leaks() if leak.cache in OURS])
    failed = 0
    for nth in range(1, 40):
        with fail_nth(nth, cache=cache) as injected:
            child = dup_mm(mm)
        if child == -errno.ENOMEM:
            failed += 1
            child = None
        if child is not None:
            assert not injected.failed
            mmput(child)
        rcu_barrier()
        assert len(file.f_mapping.i_mmap) == links
        assert len([leak for leak in leaks() if leak.cache in OURS]) == live
        if child is not None:
            break
    assert failed
    for number in range(4):
        assert user_load(mm, BASE + number * 8 * PAGE) == b"p"
        user_store(mm, BASE + number * 8 * PAGE, b"q")
    fput(file)


def test_flags_are_not_inherited(mm):
    """MMF_ bits are the hooks' business: without probes the child has none."""
    anonymous(mm, 1)
    child = fork(mm)
    assert not bit_is_set(MMF_HAS_UPROBES, child, "flags")
    mmput(child)
