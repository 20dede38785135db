"""Changing where VMAs lie: the steps every split and merge shares.

Models:      mm/vma.c, vma_prepare, vma_complete, __split_vma, split_vma, vma_link_file, remove_vma (7.2)
Guards:      mmap_lock (write); VMA write locks of every VMA touched; i_mmap_rwsem
Invariants:  P1 the bounds of a VMA change while it is write-locked and out of its file's i_mmap
             P2 the tree is stored between vma_prepare() and vma_complete(), with nodes that were got before,
             so that nothing between can fail
             P3 map_count == number of VMAs in the tree, when mmap_lock is free
Leaves out:  anon_vma interval trees, huge page adjustment, may_split
Read next:   mm/vma_merge.py

Lock order: mmap_lock, VMA write lock, i_mmap_rwsem.
"""

from errno import ENOMEM
from typing import Any

import attrs

from kmodel.core import shared_int
from kmodel.fs import (
    fput,
    get_file,
    i_mmap_lock_write,
    i_mmap_unlock_write,
    mapping_map_writable,
    mapping_unmap_writable,
    vma_interval_tree_insert,
    vma_interval_tree_remove,
)
from kmodel.mm import hooks, mm_struct
from kmodel.mm.anon_vma import anon_vma_clone, unlink_anon_vmas
from kmodel.mm.flags import PAGE_SHIFT
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.vma import VmAreaStruct, is_shared_maywrite, vm_area_dup, vm_area_free
from kmodel.mm.vma_iter import VmaIterator, vma_iter_prealloc, vma_iter_store_new
from kmodel.mm.vma_lock import vma_mark_detached, vma_start_write


@attrs.define(eq=False)
class VmaPrepare:
    """Who takes part in a change (struct vma_prepare)."""

    vma: VmAreaStruct  # grows, or is split
    file: Any = None
    adj_next: VmAreaStruct | None = None  # its lower bound moves
    insert: VmAreaStruct | None = None  # the other half of a split
    remove: list[VmAreaStruct] = attrs.field(factory=list)  # swallowed by `vma`
    skip_vma_uprobe: bool = False


# ------------------------------------------------------------------------------------------------ i_mmap


def __vma_link_file(vma: VmAreaStruct, mapping: Any) -> None:
    """Enter the VMA in its file's i_mmap, which is locked for writing."""
    if is_shared_maywrite(vma.vm_flags):
        mapping_map_writable(mapping)
    vma_interval_tree_insert(vma, mapping)


def __remove_shared_vm_struct(vma: VmAreaStruct, mapping: Any) -> None:
    if is_shared_maywrite(vma.vm_flags):
        mapping_unmap_writable(mapping)
    vma_interval_tree_remove(vma, mapping)


def vma_link_file(vma: VmAreaStruct) -> None:
    """Enter a file VMA in its file's i_mmap: from here on register finds it (H49)."""
    if vma.vm_file is not None:
        mapping = vma.vm_file.f_mapping
        i_mmap_lock_write(mapping)
        __vma_link_file(vma, mapping)
        i_mmap_unlock_write(mapping)


def unlink_file_vma(vma: VmAreaStruct) -> None:
    """Take a file VMA out of its file's i_mmap."""
    if vma.vm_file is not None:
        mapping = vma.vm_file.f_mapping
        i_mmap_lock_write(mapping)
        __remove_shared_vm_struct(vma, mapping)
        i_mmap_unlock_write(mapping)


# ------------------------------------------------------------------------------------------------ the steps


def vma_prepare(vp: VmaPrepare) -> None:
    """Take whoever will change out of i_mmap. Everything that can fail is done."""
    if vp.file is None:
        return
    hooks.uprobe_munmap(vp.vma, vp.vma.vm_start, vp.vma.vm_end)
    if vp.adj_next is not None:
        hooks.uprobe_munmap(vp.adj_next, vp.adj_next.vm_start, vp.adj_next.vm_end)
    mapping = vp.file.f_mapping
    i_mmap_lock_write(mapping)
    if vp.insert is not None:
        __vma_link_file(vp.insert, mapping)
    vma_interval_tree_remove(vp.vma, mapping)
    if vp.adj_next is not None:
        vma_interval_tree_remove(vp.adj_next, mapping)


def vma_complete(vp: VmaPrepare, vmi: VmaIterator, mm: MmStruct) -> None:
    """Put them back, store the other half of a split, let go of what was swallowed."""
    mapping = vp.file.f_mapping if vp.file is not None else None
    if mapping is not None:
        if vp.adj_next is not None:
            vma_interval_tree_insert(vp.adj_next, mapping)
        vma_interval_tree_insert(vp.vma, mapping)
        for removed in vp.remove:
            __remove_shared_vm_struct(removed, mapping)
    if vp.insert is not None:
        vma_iter_store_new(vmi, vp.insert)
        mm.map_count += 1
    if mapping is not None:
        i_mmap_unlock_write(mapping)
        if not vp.skip_vma_uprobe:
            hooks.uprobe_mmap(vp.vma)
            if vp.adj_next is not None:
                hooks.uprobe_mmap(vp.adj_next)
    for removed in vp.remove:
        # Its range is another VMA's in the tree already. The free comes after the last reader (H26).
        vma_mark_detached(removed)
        if vp.file is not None:
            hooks.uprobe_munmap(removed, removed.vm_start, removed.vm_end)
            fput(vp.file)
        unlink_anon_vmas(removed)
        mm.map_count -= 1
        vm_area_free(removed)
    if vp.insert is not None and vp.file is not None and not vp.skip_vma_uprobe:
        hooks.uprobe_mmap(vp.insert)


# ------------------------------------------------------------------------------------------------ split


def __split_vma(vmi: VmaIterator, vma: VmAreaStruct, addr: int, new_below: bool) -> int:
    """Cut the VMA in two at `addr`; the new one is the lower part if new_below. 0 or -ENOMEM.

    The map limit may be passed for a moment (munmap).
    """
    mm = vma.vm_mm
    assert mm is not None
    new = vm_area_dup(vma)
    if new is None:
        return -ENOMEM
    pages_below = (addr - vma.vm_start) >> PAGE_SHIFT
    if new_below:
        new.vm_end = shared_int(addr)
    else:
        new.vm_start = shared_int(addr)
        new.vm_pgoff = shared_int(new.vm_pgoff + pages_below)
    error = vma_iter_prealloc(vmi, new.vm_start, new.vm_end, new)
    if error:
        vm_area_free(new)
        return error
    anon_vma_clone(new, vma)
    if new.vm_file is not None:
        get_file(new.vm_file)

    vma_start_write(vma)
    vma_start_write(new)
    vp = VmaPrepare(vma, vma.vm_file, insert=new)
    vma_prepare(vp)
    if new_below:
        vma.vm_start = shared_int(addr)
        vma.vm_pgoff = shared_int(vma.vm_pgoff + pages_below)
    else:
        vma.vm_end = shared_int(addr)
    vma_complete(vp, vmi, mm)
    return 0


def split_vma(vmi: VmaIterator, vma: VmAreaStruct, addr: int, new_below: bool) -> int:
    """__split_vma within the map limit."""
    mm = vma.vm_mm
    assert mm is not None
    if mm.map_count >= mm_struct.sysctl_max_map_count:
        return -ENOMEM
    return __split_vma(vmi, vma, addr, new_below)


def remove_vma(vma: VmAreaStruct) -> None:
    """A detached VMA goes: its hook, its file reference, its memory."""
    if vma.vm_ops is not None and vma.vm_ops.close is not None:
        vma.vm_ops.close(vma)
    file = vma.vm_file
    if file is not None:
        fput(file)
    vm_area_free(vma)
