"""The life of an address space: mm_alloc, mmput, exit_mmap.

Models:      kernel/fork.c, mm_alloc, mmput, __mmput; mm/mmap.c, exit_mmap (7.2)
Guards:      mm_users, mm_count
Invariants:  M1 of mm/mm_struct.py; E1 nothing is mapped, counted or kept when the last user is gone
Leaves out:  mmput_async, oom reaping
Read next:   mm/dup_mmap.py
"""

from kmodel.core import BUG_ON, WARN, atomic_dec_and_test, might_sleep
from kmodel.fs import task_work_run
from kmodel.mm import hooks, mm_struct
from kmodel.mm.flags import TASK_SIZE
from kmodel.mm.maple_node import ULONG_MAX
from kmodel.mm.maple_tree import mt_destroy
from kmodel.mm.mm_struct import MmStruct, mm_init, mmdrop
from kmodel.mm.mmap_lock import mmap_write_lock, mmap_write_unlock
from kmodel.mm.vma import vma_pages
from kmodel.mm.vma_iter import vma_find, vma_iter_init, vma_iter_set
from kmodel.mm.vma_lock import vma_mark_detached, vma_start_write
from kmodel.mm.vma_unmap import VmaMunmapStruct, vms_clear_ptes, vms_complete_munmap_vmas
from kmodel.slab import kmem_cache_zalloc


def mm_alloc() -> MmStruct | None:
    """An empty address space with one user, or None without memory."""
    mm: MmStruct | None = kmem_cache_zalloc(mm_struct.mm_cachep)
    return None if mm is None else mm_init(mm)


def mmput(mm: MmStruct) -> None:
    """Stop using the address space; the last user tears the mappings down. May sleep."""
    might_sleep()
    if atomic_dec_and_test(mm, "mm_users"):
        hooks.uprobe_clear_state(mm)
        exit_mmap(mm)
        mmdrop(mm)
        task_work_run()


def exit_mmap(mm: MmStruct) -> None:
    """Unmap everything. No user is left; others may hold the struct and look for a VMA to lock."""
    mmap_write_lock(mm)
    unmap_all(mm)
    BUG_ON(mm.map_count != 0, f"E1: {mm.map_count} mappings are counted in an empty address space")
    WARN(mm.total_vm, f"an address space ends with {mm.total_vm} pages mapped")
    mmap_write_unlock(mm)


def unmap_all(mm: MmStruct) -> None:
    """Take every mapping away, with its pages, its anon_vmas and its file. mmap_lock (write)."""
    vms = VmaMunmapStruct(mm, 0, TASK_SIZE)
    vmi = vma_iter_init(mm)
    while (vma := vma_find(vmi, ULONG_MAX)) is not None:
        vma_start_write(vma)
        vma_mark_detached(vma)
        vms.vmas.append(vma)
        vms.nr_pages += vma_pages(vma)
        vma_iter_set(vmi, vma.vm_end)
    mt_destroy(mm.mm_mt)
    vms_clear_ptes(vms)
    vms_complete_munmap_vmas(vms)
