"""anon_vma: what decides whether two anonymous neighbours may become one mapping.

Models:      mm/rmap.c, __anon_vma_prepare, anon_vma_clone, unlink_anon_vmas; mm/vma.c,
             find_mergeable_anon_vma, dup_anon_vma (7.2)
Guards:      vma.anon_vma: see VmAreaStruct; the reference count: atomic
Invariants:  A1 an anon_vma lives while a VMA's chain names it
Leaves out:  the reverse map itself (interval trees, rwsem, root); fork's second anon_vma per VMA comes with
             fork
Read next:   mm/vma_merge.py
"""

from typing import TYPE_CHECKING, Any

from kmodel.core import Struct, atomic, atomic_dec_and_test, atomic_inc, kernel_struct, kfree
from kmodel.mm.flags import PAGE_SHIFT, VM_ACCESS_FLAGS, VM_SOFTDIRTY
from kmodel.sync import SpinLock, spin_lock, spin_unlock

if TYPE_CHECKING:
    from kmodel.mm.vma import VmAreaStruct


@kernel_struct
class AnonVma(Struct):
    """The private pages that some mappings share by descent (struct anon_vma)."""

    refcount: int = atomic(default=0)

    __hash__ = object.__hash__


_page_table_lock = SpinLock()


def vma_is_fork_child(vma: "VmAreaStruct | None") -> bool:
    """Whether the VMA's pages descend from a parent's: more than one anon_vma in its chain."""
    return vma is not None and vma.anon_vma is not None and len(vma.anon_vma_chain) > 1


def anon_vma_prepare(vma: "VmAreaStruct", prev: Any, next_: Any) -> int:
    """The first private page of the VMA appears: give it an anon_vma, a neighbour's if the two could merge.

    Needs mmap_lock (read is enough; here: any). `prev` and `next_` are the VMA's neighbours. 0.
    """
    if vma.anon_vma is not None:
        return 0
    found = _reusable_anon_vma(next_, vma, next_) if next_ is not None else None
    if found is None and prev is not None:
        found = _reusable_anon_vma(prev, prev, vma)
    anon_vma = AnonVma() if found is None else found
    spin_lock(_page_table_lock)
    if vma.anon_vma is None:
        atomic_inc(anon_vma, "refcount")
        vma.anon_vma = anon_vma
        vma.anon_vma_chain = (anon_vma,)
    spin_unlock(_page_table_lock)
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
    anon_vma = old.anon_vma
    if anon_vma is not None and len(old.anon_vma_chain) == 1 and _anon_vma_compatible(a, b):
        return anon_vma  # type: ignore[no-any-return]
    return None


def anon_vma_clone(dst: "VmAreaStruct", src: "VmAreaStruct") -> int:
    """Let `dst` hold every anon_vma that `src` holds; 0."""
    for anon_vma in src.anon_vma_chain:
        atomic_inc(anon_vma, "refcount")
    dst.anon_vma_chain = src.anon_vma_chain
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
    for anon_vma in vma.anon_vma_chain:
        if atomic_dec_and_test(anon_vma, "refcount"):
            kfree(anon_vma)
    vma.anon_vma_chain = ()
    vma.anon_vma = None
