"""Where a mapping goes: the fixed address, the hint, or the highest gap that is large enough.

Models:      mm/mmap.c, get_unmapped_area, generic_get_unmapped_area_topdown, round_hint_to_min; mm/vma.c,
             unmapped_area_topdown; include/linux/mm.h, vm_start_gap (7.2, x86-64)
Guards:      mmap_lock
Invariants:  W1 the range returned is free, unless it was asked for by MAP_FIXED
Leaves out:  randomisation, MAP_32BIT, alignment for huge pages, filesystems with areas of their own
Read next:   mm/mmap.py
"""

from errno import EINVAL, ENOMEM, EPERM

from kmodel.mm.flags import (
    MAP_FIXED,
    MMAP_MIN_ADDR,
    PAGE_ALIGN,
    PAGE_MASK,
    PAGE_SIZE,
    STACK_GUARD_GAP,
    TASK_SIZE,
    VM_GROWSDOWN,
    offset_in_page,
)
from kmodel.mm.maple_walk import MaState, mas_empty_area_rev
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap_lock import mmap_assert_locked
from kmodel.mm.vma import VmAreaStruct
from kmodel.mm.vma_iter import find_vma


def round_hint_to_min(hint: int) -> int:
    """A hint, not below what may be mapped."""
    hint &= PAGE_MASK
    return PAGE_ALIGN(MMAP_MIN_ADDR) if 0 < hint < MMAP_MIN_ADDR else hint


def get_unmapped_area(mm: MmStruct, addr: int, length: int, flags: int) -> int:
    """Where the mapping goes: the fixed address, the hint if it is free, else top-down from mmap_base."""
    mmap_assert_locked(mm)
    if length > TASK_SIZE:
        return -ENOMEM
    if not flags & MAP_FIXED:
        addr = _unmapped_area(mm, addr, length)
        if addr < 0:
            return addr
    if addr > TASK_SIZE - length:
        return -ENOMEM
    if offset_in_page(addr):
        return -EINVAL
    if addr < MMAP_MIN_ADDR:
        return -EPERM
    return addr


def _unmapped_area(mm: MmStruct, hint: int, length: int) -> int:
    if hint and hint + length <= TASK_SIZE:
        vma = find_vma(mm, hint)
        if vma is None or hint + length <= vm_start_gap(vma):
            return hint
    found = _unmapped_area_topdown(mm, length, PAGE_SIZE, mm.mmap_base)
    if found < 0:
        # Nothing below mmap_base: from there up, as a last resort.
        found = _unmapped_area_topdown(mm, length, mm.mmap_base, TASK_SIZE)
    return found


def _unmapped_area_topdown(mm: MmStruct, length: int, low_limit: int, high_limit: int) -> int:
    """The highest gap of this length in [low_limit, high_limit) that leaves a stack its guard gap."""
    low_limit = max(low_limit, MMAP_MIN_ADDR)
    while high_limit - length >= low_limit:
        mas = MaState(mm.mm_mt)
        if mas_empty_area_rev(mas, low_limit, high_limit - 1, length):
            break
        gap, gap_end = mas.index, mas.last + 1
        above = find_vma(mm, gap_end)
        if above is None or vm_start_gap(above) >= gap_end:
            return gap
        high_limit = vm_start_gap(above)
    return -ENOMEM


def vm_start_gap(vma: VmAreaStruct) -> int:
    """Where others must end before this VMA: stacks keep a guard gap."""
    if vma.vm_flags & VM_GROWSDOWN:
        return max(vma.vm_start - STACK_GUARD_GAP, 0)
    return vma.vm_start
