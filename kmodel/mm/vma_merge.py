"""When two mappings become one, and how.

Models:      mm/vma.c, is_mergeable_vma, is_mergeable_anon_vma, can_vma_merge_left / _right,
             vma_merge_new_range, vma_merge_existing_range, vma_merge_extend, vma_expand, commit_merge,
             vma_modify (7.2)
Guards:      mmap_lock (write); every VMA that takes part gets its write lock before anything changes
Invariants:  G1 a merge changes the tree by one store; G2 what the bounds, flags and offsets of the result say
             about any page is what they said before
Leaves out:  huge pages, KSM, memory policies beyond identity
Read next:   mm/vma_unmap.py

A new range:                          An existing one whose attributes change:
    left   extend prev                    needs to touch an edge of its VMA (middle):
    right  extend next downwards          left or right, all of middle: it goes, the neighbour takes its range
    both   extend prev over next,         left or right, a part: the shared bound moves
           next goes                      both: prev takes all, middle and next go
"""

from errno import ENOMEM
from typing import Any

import attrs

from kmodel.core import shared_int
from kmodel.mm.anon_vma import dup_anon_vma, unlink_anon_vmas, vma_is_fork_child
from kmodel.mm.flags import PAGE_SHIFT, VM_SPECIAL, VM_STICKY
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap_lock import mmap_assert_write_locked
from kmodel.mm.vma import VmAreaStruct, vma_pages, vma_set_range
from kmodel.mm.vma_iter import (
    VmaIterator,
    find_vma,
    vma_iter_clear,
    vma_iter_init,
    vma_iter_prealloc,
    vma_iter_store_overwrite,
)
from kmodel.mm.vma_lock import vma_start_write
from kmodel.mm.vma_prepare import VmaPrepare, split_vma, vma_complete, vma_prepare


@attrs.define(eq=False)
class VmaMergeStruct:
    """A proposed range and its surroundings (struct vma_merge_struct)."""

    mm: MmStruct
    prev: VmAreaStruct | None
    next: VmAreaStruct | None
    start: int
    end: int
    pgoff: int
    vm_flags: int
    file: Any = None
    anon_vma: Any = None
    policy: Any = None
    uffd_ctx: Any = None
    anon_name: str | None = None
    middle: VmAreaStruct | None = None  # the existing VMA whose attributes change
    copied_from: VmAreaStruct | None = None  # mremap: whose pages the new range will hold
    just_expand: bool = False
    skip_vma_uprobe: bool = False
    out_of_memory: bool = False

    # results of the decision
    target: VmAreaStruct | None = None
    remove: list[VmAreaStruct] = attrs.field(factory=list)
    adjust_middle_start: bool = False
    adjust_next_start: bool = False


def vmg_of(middle: VmAreaStruct, prev: Any, next_: Any, start: int, end: int) -> VmaMergeStruct:
    """A change of [start, end) of an existing VMA, with its attributes as they are."""
    mm = middle.vm_mm
    assert mm is not None
    return VmaMergeStruct(
        mm,
        prev,
        next_,
        start,
        end,
        middle.vm_pgoff + ((start - middle.vm_start) >> PAGE_SHIFT),
        middle.vm_flags,
        file=middle.vm_file,
        anon_vma=middle.anon_vma,
        policy=middle.vm_policy,
        uffd_ctx=middle.vm_userfaultfd_ctx,
        anon_name=middle.anon_name,
        middle=middle,
    )


# ------------------------------------------------------------------------------------------------ may they?


def is_mergeable_vma(vmg: VmaMergeStruct, vma: VmAreaStruct) -> bool:
    """Whether the proposed range has the attributes of this neighbour. The same struct file, not only the
    same inode; equal flags but for sticky ones.
    """
    return (
        vma.vm_policy is vmg.policy
        and not (vma.vm_flags ^ vmg.vm_flags) & ~VM_STICKY
        and vma.vm_file is vmg.file
        and vma.vm_userfaultfd_ctx is vmg.uffd_ctx
        and vma.anon_name == vmg.anon_name
    )


def is_mergeable_anon_vma(vmg: VmaMergeStruct, tgt: VmAreaStruct) -> bool:
    """Whether the private pages of both sides may have one owner. One that descends from a fork may not pass
    its anon_vmas on.
    """
    if tgt.anon_vma is None and vmg.anon_vma is not None:
        return not vma_is_fork_child(vmg.middle) and not vma_is_fork_child(vmg.copied_from)
    if tgt.anon_vma is not None and vmg.anon_vma is None:
        return not vma_is_fork_child(tgt)
    return tgt.anon_vma is vmg.anon_vma


def can_vma_merge_left(vmg: VmaMergeStruct) -> bool:
    """Whether prev ends where the range begins, and goes on into it."""
    prev = vmg.prev
    return (
        prev is not None
        and prev.vm_end == vmg.start
        and is_mergeable_vma(vmg, prev)
        and is_mergeable_anon_vma(vmg, prev)
        and prev.vm_pgoff + vma_pages(prev) == vmg.pgoff
    )


def can_vma_merge_right(vmg: VmaMergeStruct, can_merge_left: bool) -> bool:
    """Whether the range goes on into next; if prev merges too, prev and next must also fit each other."""
    next_ = vmg.next
    if (
        next_ is None
        or next_.vm_start != vmg.end
        or not is_mergeable_vma(vmg, next_)
        or not is_mergeable_anon_vma(vmg, next_)
        or next_.vm_pgoff != vmg.pgoff + ((vmg.end - vmg.start) >> PAGE_SHIFT)
    ):
        return False
    if not can_merge_left:
        return True
    prev = vmg.prev
    assert prev is not None
    return prev.anon_vma is None or next_.anon_vma is None or prev.anon_vma is next_.anon_vma


def can_merge_remove_vma(vma: VmAreaStruct) -> bool:
    """A VMA whose owner wants to hear of its end may not vanish in a merge."""
    return vma.vm_ops is None or vma.vm_ops.close is None


# ------------------------------------------------------------------------------------------------ a new range


def vma_merge_new_range(vmg: VmaMergeStruct) -> VmAreaStruct | None:
    """Let neighbours take in a range that nothing maps (any more): the VMA that did, or None."""
    mmap_assert_write_locked(vmg.mm)
    if vmg.vm_flags & VM_SPECIAL or (vmg.prev is None and vmg.next is None):
        return None
    end = vmg.end
    merge_left = can_vma_merge_left(vmg)
    merge_right = not vmg.just_expand and can_vma_merge_right(vmg, merge_left)
    if merge_right:
        assert vmg.next is not None
        vmg.end = vmg.next.vm_end
        vmg.target = vmg.next
    if merge_left:
        assert vmg.prev is not None
        vmg.start = vmg.prev.vm_start
        vmg.pgoff = vmg.prev.vm_pgoff
        vmg.target = vmg.prev
        if merge_right and vmg.next is not None and not can_merge_remove_vma(vmg.next):
            vmg.end = end  # next must stay: only prev grows
    if vmg.target is not None and not vma_expand(vmg):
        return vmg.target
    return None


def vma_merge_extend(vma: VmAreaStruct, delta: int) -> VmAreaStruct | None:
    """Let a VMA grow upwards by `delta` free bytes, and merge with what it meets there; None: no memory."""
    mm = vma.vm_mm
    assert mm is not None
    vmg = vmg_of(vma, vma, find_vma(mm, vma.vm_end), vma.vm_end, vma.vm_end + delta)
    vmg.middle = None
    return vma_merge_new_range(vmg)


def vma_expand(vmg: VmaMergeStruct) -> int:
    """Let vmg.target cover [vmg.start, vmg.end), swallowing next if that is inside: 0 or -ENOMEM."""
    target, next_ = vmg.target, vmg.next
    assert target is not None
    vma_start_write(target)
    undo = None
    if next_ is not None and next_ is not target and vmg.end == next_.vm_end:
        undo = dup_anon_vma(target, next_)
        vma_start_write(next_)
        vmg.remove.append(next_)
    if vmg.copied_from is not None:
        # The pages that mremap will move in belong to the source's anon_vma.
        undo = dup_anon_vma(target, vmg.copied_from) or undo
    return _commit_or_undo(vmg, undo)


def vma_shrink(mm: MmStruct, vma: VmAreaStruct, start: int, end: int, pgoff: int) -> int:
    """Cut an unfaulted VMA (a stack in the making) down to [start, end): 0 or -ENOMEM."""
    vmi = vma_iter_init(mm, vma.vm_start)
    if vma.vm_start < start:
        error = vma_iter_prealloc(vmi, vma.vm_start, start, None)
    else:
        error = vma_iter_prealloc(vmi, end, vma.vm_end, None)
    if error:
        return error
    vma_start_write(vma)
    vp = VmaPrepare(vma, vma.vm_file)
    vma_prepare(vp)
    vma_iter_clear(vmi)
    vma_set_range(vma, start, end, pgoff)
    vma_complete(vp, vmi, mm)
    return 0


# ------------------------------------------------------------------------------------------------ existing


def vma_merge_existing_range(vmg: VmaMergeStruct) -> VmAreaStruct | None:
    """[start, end) of vmg.middle gets vmg's attributes: let a neighbour that has them take it over. None: no
    merge (or no memory: vmg.out_of_memory).
    """
    middle, prev, next_ = vmg.middle, vmg.prev, vmg.next
    assert middle is not None
    mmap_assert_write_locked(vmg.mm)
    start, end, pglen = vmg.start, vmg.end, (vmg.end - vmg.start) >> PAGE_SHIFT
    left_side, right_side = start == middle.vm_start, end == middle.vm_end
    if vmg.vm_flags & VM_SPECIAL or not (left_side or right_side):
        return None
    merge_left = left_side and can_vma_merge_left(vmg)
    merge_right = right_side and can_vma_merge_right(vmg, merge_left)
    if not (merge_left or merge_right):
        return None
    remove_middle = left_side and right_side
    if remove_middle and not can_merge_remove_vma(middle):
        return None
    remove_next = merge_left and merge_right
    if remove_next and next_ is not None and not can_merge_remove_vma(next_):
        remove_next = merge_right = False

    # Every VMA whose bounds change is write-locked before the first of them does.
    vma_start_write(middle)
    if merge_right:
        assert next_ is not None
        vma_start_write(next_)
        vmg.target = next_
    if merge_left:
        assert prev is not None
        vma_start_write(prev)
        vmg.target = prev
    if merge_left and merge_right:
        assert prev is not None
        assert next_ is not None
        vmg.start, vmg.end, vmg.pgoff = prev.vm_start, next_.vm_end, prev.vm_pgoff
        undo = dup_anon_vma(prev, next_ if next_.anon_vma is not None else middle)
    elif merge_left:
        assert prev is not None
        vmg.start, vmg.pgoff = prev.vm_start, prev.vm_pgoff
        vmg.adjust_middle_start = not remove_middle
        undo = dup_anon_vma(prev, middle)
    else:
        assert next_ is not None
        if remove_middle:
            vmg.end, vmg.pgoff = next_.vm_end, next_.vm_pgoff - pglen
        else:
            vmg.adjust_next_start = True
            vmg.start, vmg.end, vmg.pgoff = middle.vm_start, start, middle.vm_pgoff
        undo = dup_anon_vma(next_, middle)
    if remove_middle:
        vmg.remove.append(middle)
    if remove_next and next_ is not None:
        vmg.remove.append(next_)
    if _commit_or_undo(vmg, undo):
        vmg.out_of_memory = True
        return None
    return vmg.target


def _commit_or_undo(vmg: VmaMergeStruct, undo: VmAreaStruct | None) -> int:
    error = commit_merge(vmg)
    if error and undo is not None:
        unlink_anon_vmas(undo)
    return error


def commit_merge(vmg: VmaMergeStruct) -> int:
    """Carry a decided merge out: 0, or -ENOMEM with nothing changed."""
    target, middle, next_ = vmg.target, vmg.middle, vmg.next
    assert target is not None
    vmi = vma_iter_init(vmg.mm)
    if vmg.adjust_next_start:
        # middle loses its end to next, which is what the tree is told.
        assert middle is not None
        assert next_ is not None
        vma, store_start, store_end = middle, vmg.end, next_.vm_end
    else:
        vma, store_start, store_end = target, vmg.start, vmg.end
    if vma_iter_prealloc(vmi, store_start, store_end, target):
        return -ENOMEM
    adjusted = middle if vmg.adjust_middle_start else next_ if vmg.adjust_next_start else None
    sticky = vmg.vm_flags & VM_STICKY
    for removed in vmg.remove:
        sticky |= removed.vm_flags & VM_STICKY
    vp = VmaPrepare(
        vma, vma.vm_file, adj_next=adjusted, remove=vmg.remove, skip_vma_uprobe=vmg.skip_vma_uprobe
    )
    vma_prepare(vp)
    vma_set_range(vma, vmg.start, vmg.end, vmg.pgoff)
    if vmg.adjust_middle_start:
        assert middle is not None
        moved = (vmg.end - middle.vm_start) >> PAGE_SHIFT
        vma_set_range(middle, vmg.end, middle.vm_end, middle.vm_pgoff + moved)
    elif vmg.adjust_next_start:
        assert next_ is not None
        moved = (next_.vm_start - vmg.end) >> PAGE_SHIFT
        vma_set_range(next_, vmg.end, next_.vm_end, next_.vm_pgoff - moved)
    if sticky & ~target.vm_flags:
        target.vm_flags = shared_int(target.vm_flags | sticky)
    vma_iter_store_overwrite(vmi, target)
    vma_complete(vp, vmi, vmg.mm)
    return 0


def vma_modify(vmg: VmaMergeStruct, vmi: VmaIterator) -> VmAreaStruct | int:
    """The VMA that is exactly [start, end) of vmg.middle and may get vmg's attributes: by merging it into a
    neighbour that has them, else by splitting. Or -ENOMEM.
    """
    vma, start, end = vmg.middle, vmg.start, vmg.end
    assert vma is not None
    merged = vma_merge_existing_range(vmg)
    if merged is not None:
        return merged
    if vmg.out_of_memory:
        return -ENOMEM
    if vma.vm_start < start:
        error = split_vma(vmi, vma, start, True)
        if error:
            return error
    if vma.vm_end > end:
        error = split_vma(vmi, vma, end, False)
        if error:
            return error
    return vma
