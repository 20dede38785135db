"""brk(2): the heap's end.

Models:      mm/mmap.c, brk; mm/vma.c, do_brk_flags (7.2)
Guards:      mmap_lock (write)
Invariants:  B1 [start_brk, brk) is mapped, rounded up to whole pages
Leaves out:  RLIMIT_DATA, mlock, randomised start_brk
Read next:   mm/fork.py
"""

from errno import EINTR, ENOMEM

from kmodel.fs import task_work_run
from kmodel.mm import mm_struct
from kmodel.mm.flags import (
    MAP_FIXED,
    PAGE_ALIGN,
    PAGE_SHIFT,
    PAGE_SIZE,
    VM_ACCOUNT,
    VM_DATA_DEFAULT_FLAGS,
)
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap import _raise
from kmodel.mm.mmap_lock import mmap_write_lock_killable, mmap_write_unlock
from kmodel.mm.unmapped_area import get_unmapped_area, vm_start_gap
from kmodel.mm.vma import vm_area_alloc, vm_area_free, vm_flags_init, vma_set_range
from kmodel.mm.vma_iter import (
    find_vma,
    find_vma_intersection,
    find_vma_prev,
    vma_iter_init,
    vma_iter_store_gfp,
)
from kmodel.mm.vma_lock import vma_start_write
from kmodel.mm.vma_merge import VmaMergeStruct, vma_merge_new_range
from kmodel.mm.vma_unmap import do_munmap


def brk(mm: MmStruct, new_brk: int) -> int:
    """Set the heap's end; the end afterwards, which is the old one if that failed."""
    if mmap_write_lock_killable(mm):
        _raise(-EINTR)
    unlocked = False
    origin, newbrk, oldbrk = mm.brk, PAGE_ALIGN(new_brk), PAGE_ALIGN(mm.brk)
    result = origin
    if new_brk < mm.start_brk:
        pass
    elif newbrk == oldbrk:
        mm.brk = result = new_brk
    elif newbrk < oldbrk and find_vma_intersection(mm, newbrk, oldbrk) is None:
        pass  # somebody unmapped the heap
    elif newbrk < oldbrk:
        # The end is set before the lock is downgraded; readers who get in then see the two agree.
        mm.brk = new_brk
        if do_munmap(mm, newbrk, oldbrk - newbrk, unlock=True):
            mm.brk = origin
        else:
            unlocked = True
            result = new_brk
    else:
        above = find_vma(mm, oldbrk)
        if above is None or newbrk + PAGE_SIZE <= vm_start_gap(above):
            if not do_brk_flags(mm, oldbrk, newbrk - oldbrk):
                mm.brk = result = new_brk
    if not unlocked:
        mmap_write_unlock(mm)
    task_work_run()
    return result


def do_brk_flags(mm: MmStruct, addr: int, length: int) -> int:
    """Map anonymous memory behind the heap: 0 or -ENOMEM. mmap_lock (write)."""
    vm_flags = VM_DATA_DEFAULT_FLAGS | VM_ACCOUNT | mm.def_flags
    end = addr + length
    if mm.map_count > mm_struct.sysctl_max_map_count:
        return -ENOMEM
    if get_unmapped_area(mm, addr, length, MAP_FIXED) < 0 or find_vma_intersection(mm, addr, end) is not None:
        return -ENOMEM
    prev, next_ = find_vma_prev(mm, addr)[1], find_vma(mm, addr)
    if prev is not None and prev.vm_end <= mm.start_brk:
        prev = None  # what lies below the heap does not become part of it
    vmg = VmaMergeStruct(mm, prev, next_, addr, end, addr >> PAGE_SHIFT, vm_flags, just_expand=True)
    if vma_merge_new_range(vmg) is None:
        vma = vm_area_alloc(mm)
        if vma is None:
            return -ENOMEM
        vma_set_range(vma, addr, end, addr >> PAGE_SHIFT)
        vm_flags_init(vma, vm_flags)
        vma_start_write(vma)
        if vma_iter_store_gfp(vma_iter_init(mm, addr), vma):
            vm_area_free(vma)
            return -ENOMEM
        mm.map_count += 1
    mm.total_vm += length >> PAGE_SHIFT
    return 0
