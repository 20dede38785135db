"""anon_vma: who owns private pages, and so which anonymous neighbours may become one mapping.

Models:      mm/rmap.c, __anon_vma_prepare, anon_vma_clone, anon_vma_fork, unlink_anon_vmas; mm/vma.c,
             find_mergeable_anon_vma, dup_anon_vma (7.2)
Guards:      vma.anon_vma: see VmAreaStruct; the counts of a family: its root's rwsem; `refcount`: atomic
Invariants:  A1 an anon_vma lives while a VMA's chain names it
             A2 vma.anon_vma is in the VMA's chain; a chain of more than one belongs to the child of a fork
Leaves out:  the reverse map itself (interval trees)
Read next:   mm/vma_merge.py; mm/dup_mmap.py

A fork gives the child an anon_vma of its own for pages it will copy, and keeps it on the parent's, whose
pages
it maps as well: so its chain gets longer by one with every generation. Only chains of one may be passed on to
a neighbour. A child of a fork takes over an ancestor's anon_vma that lost its last VMA instead of making
another one, or a process that forks in turn with its children would make chains without end.
"""

from errno import ENOMEM
from typing import TYPE_CHECKING, Any

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    Struct,
    atomic,
    atomic_dec_and_test,
    atomic_inc,
    atomic_set,
    embedded,
    initcall,
    kernel_struct,
)
from kmodel.mm.flags import PAGE_SHIFT, VM_ACCESS_FLAGS, VM_SOFTDIRTY
from kmodel.slab import KmemCache, kmem_cache_create, kmem_cache_free, kmem_cache_zalloc
from kmodel.sync import RwSemaphore, down_write, spin_lock, spin_unlock, up_write

if TYPE_CHECKING:
    from kmodel.mm.vma import VmAreaStruct


@kernel_struct
class AnonVma(Struct):
    """The private pages that some mappings share by descent (struct anon_vma)."""

    # one while a chain names it, one for each descendant whose root it is
    refcount: int = atomic(default=0)
    rwsem: RwSemaphore = embedded(factory=RwSemaphore)

    # constant once others know it
    root: Any = None
    parent: Any = None

    # write and read: root's rwsem
    num_children: int = 0  # anon_vmas whose parent it is; a root is its own child
    num_active_vmas: int = 0  # VMAs that would put new pages in it
    nr_chains: int = 0  # chains that name it: the size of the kernel's interval tree

    __hash__ = object.__hash__


anon_vma_cachep: KmemCache


@initcall
def anon_vma_init() -> None:
    """Create the cache."""
    global anon_vma_cachep
    anon_vma_cachep = kmem_cache_create("anon_vma", AnonVma)


def anon_vma_alloc() -> AnonVma | None:
    """A root that nothing names yet, or None without memory."""
    anon_vma: AnonVma | None = kmem_cache_zalloc(anon_vma_cachep)
    if anon_vma is not None:
        anon_vma.root = anon_vma.parent = anon_vma
        anon_vma.num_children = 1
        atomic_set(anon_vma, "refcount", 1)
    return anon_vma


def _put_anon_vma(anon_vma: AnonVma) -> None:
    root = anon_vma.root
    if atomic_dec_and_test(anon_vma, "refcount"):
        if root is not anon_vma:
            _put_anon_vma(root)
        kmem_cache_free(anon_vma_cachep, anon_vma)


def anon_vma_lock_write(anon_vma: AnonVma) -> None:
    """Lock the whole family."""
    down_write(anon_vma.root.rwsem)


def anon_vma_unlock_write(anon_vma: AnonVma) -> None:
    """End of anon_vma_lock_write."""
    up_write(anon_vma.root.rwsem)


# --------------------------------------------------------------------------------------------- the first page


def vma_is_fork_child(vma: "VmAreaStruct | None") -> bool:
    """Whether the VMA's pages descend from a parent's: more than one anon_vma in its chain."""
    return vma is not None and vma.anon_vma is not None and len(vma.anon_vma_chain) > 1


def anon_vma_prepare(vma: "VmAreaStruct", prev: Any, next_: Any) -> int:
    """The first private page of the VMA appears: give it an anon_vma, a neighbour's if the two could merge.

    Needs mmap_lock (read is enough; here: any). `prev` and `next_` are the VMA's neighbours. 0 or -ENOMEM.
    """
    if READ_ONCE(vma, "anon_vma") is not None:
        return 0
    found = _reusable_anon_vma(next_, vma, next_) if next_ is not None else None
    if found is None and prev is not None:
        found = _reusable_anon_vma(prev, prev, vma)
    anon_vma = found
    if anon_vma is None:
        anon_vma = anon_vma_alloc()
        if anon_vma is None:
            return -ENOMEM
    mm = vma.vm_mm
    assert mm is not None
    anon_vma_lock_write(anon_vma)
    # Two faults may be here at once, both with mmap_lock for reading.
    spin_lock(mm.pgd.page_table_lock)
    first = vma.anon_vma is None
    if first:
        anon_vma.nr_chains += 1
        anon_vma.num_active_vmas += 1
        vma.anon_vma_chain = (anon_vma,)
        # Plain in the kernel; faults under the VMA lock look at it meanwhile.
        WRITE_ONCE(vma, "anon_vma", anon_vma)
    spin_unlock(mm.pgd.page_table_lock)
    anon_vma_unlock_write(anon_vma)
    if not first and found is None:
        _put_anon_vma(anon_vma)
    return 0


def _anon_vma_compatible(a: "VmAreaStruct", b: "VmAreaStruct") -> bool:
    """Whether `b` follows `a` and mprotect could make them one."""
    return (
        a.vm_end == b.vm_start
        and a.vm_policy is b.vm_policy
        and a.vm_file is b.vm_file
        and not (a.vm_flags ^ b.vm_flags) & ~(VM_ACCESS_FLAGS | VM_SOFTDIRTY)
        and b.vm_pgoff == a.vm_pgoff + ((b.vm_start - a.vm_start) >> PAGE_SHIFT)
    )


def _reusable_anon_vma(old: "VmAreaStruct", a: "VmAreaStruct", b: "VmAreaStruct") -> AnonVma | None:
    anon_vma: AnonVma | None = READ_ONCE(old, "anon_vma")
    if anon_vma is not None and len(old.anon_vma_chain) == 1 and _anon_vma_compatible(a, b):
        return anon_vma
    return None


# ------------------------------------------------------------------------------------------------ more VMAs


def anon_vma_clone(dst: "VmAreaStruct", src: "VmAreaStruct") -> int:
    """Let `dst` hold every anon_vma that `src` holds; 0. A `dst` without one of its own (a fork's) may get
    one
    whose VMAs are gone.
    """
    chain = src.anon_vma_chain
    if not chain:
        return 0
    anon_vma_lock_write(chain[0])
    for anon_vma in chain:
        anon_vma.nr_chains += 1
        if (
            dst.anon_vma is None
            and src.anon_vma is not None
            and anon_vma.num_children < 2
            and anon_vma.num_active_vmas == 0
        ):
            dst.anon_vma = anon_vma
    if dst.anon_vma is not None:
        dst.anon_vma.num_active_vmas += 1
    dst.anon_vma_chain = chain
    anon_vma_unlock_write(chain[0])
    return 0


def anon_vma_fork(vma: "VmAreaStruct", pvma: "VmAreaStruct") -> int:
    """`vma` is the child's copy of `pvma`: it stays on the parent's anon_vmas, and gets one for pages of its
    own.
    0 or -ENOMEM.
    """
    if pvma.anon_vma is None:
        return 0
    vma.anon_vma = None  # what the copy of the VMA brought along is the parent's
    anon_vma_clone(vma, pvma)
    if vma.anon_vma is not None:
        return 0
    anon_vma = anon_vma_alloc()
    if anon_vma is None:
        unlink_anon_vmas(vma)
        return -ENOMEM
    parent = pvma.anon_vma
    anon_vma.num_children = 0
    anon_vma.num_active_vmas = anon_vma.nr_chains = 1
    anon_vma.root = parent.root
    anon_vma.parent = parent
    atomic_inc(parent.root, "refcount")
    anon_vma_lock_write(parent)
    # The VMA's own comes last: the chain is in the order of descent.
    vma.anon_vma = anon_vma
    vma.anon_vma_chain = (*vma.anon_vma_chain, anon_vma)
    parent.num_children += 1
    anon_vma_unlock_write(parent)
    return 0


def dup_anon_vma(dst: "VmAreaStruct", src: "VmAreaStruct") -> "VmAreaStruct | None":
    """`dst` takes in `src`: it needs src's anon_vma if it has none. What to undo if the merge fails."""
    if src.anon_vma is None or dst.anon_vma is not None:
        return None
    dst.anon_vma = src.anon_vma
    anon_vma_clone(dst, src)
    return dst


def unlink_anon_vmas(vma: "VmAreaStruct") -> None:
    """The VMA goes: so does its hold on its anon_vmas."""
    chain = vma.anon_vma_chain
    if not chain:
        return
    anon_vma_lock_write(chain[0])
    if vma.anon_vma is not None:
        vma.anon_vma.num_active_vmas -= 1
    unnamed = []
    for anon_vma in chain:
        anon_vma.nr_chains -= 1
        if not anon_vma.nr_chains:
            # Its children are gone: their chains would name it.
            anon_vma.parent.num_children -= 1
            unnamed.append(anon_vma)
    anon_vma_unlock_write(chain[0])
    for anon_vma in unnamed:
        _put_anon_vma(anon_vma)
    vma.anon_vma_chain = ()
    vma.anon_vma = None
