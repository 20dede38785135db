"""Page sizes, VM_ flags, MMF_ flags, and what mmap's prot and flags arguments mean as VM_ flags.

Models:      include/linux/mm.h, VM_*; include/linux/mm_types.h, MMF_*; include/linux/mman.h,
             calc_vm_prot_bits; include/uapi/asm-generic/mman*.h (7.2, x86-64)
Guards:      none, constants
Invariants:  none
Leaves out:  protection keys, huge pages, shadow stacks, memory tags
Read next:   mm/mm_struct.py
"""

import mmap as _mman
from typing import Final

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PAGE_MASK: Final = ~(PAGE_SIZE - 1)
TASK_SIZE: Final = (1 << 47) - PAGE_SIZE
DEFAULT_MMAP_BASE: Final = 0x7FFF_F7FF_F000
"""mm->mmap_base: mappings without an address go top-down from here (no randomisation)."""
MMAP_MIN_ADDR: Final = 0x10000
STACK_GUARD_GAP: Final = 256 << PAGE_SHIFT

VM_NONE: Final = 0
VM_READ: Final = 0x1
VM_WRITE: Final = 0x2
VM_EXEC: Final = 0x4
VM_SHARED: Final = 0x8
VM_MAYREAD: Final = 0x10
VM_MAYWRITE: Final = 0x20
VM_MAYEXEC: Final = 0x40
VM_MAYSHARE: Final = 0x80
VM_GROWSDOWN: Final = 0x100
VM_PFNMAP: Final = 0x400
VM_MAYBE_GUARD: Final = 0x800
VM_LOCKED: Final = 0x2000
VM_IO: Final = 0x4000
VM_SEQ_READ: Final = 0x8000
VM_RAND_READ: Final = 0x1_0000
VM_DONTCOPY: Final = 0x2_0000
VM_DONTEXPAND: Final = 0x4_0000
VM_ACCOUNT: Final = 0x10_0000
VM_NORESERVE: Final = 0x20_0000
VM_HUGETLB: Final = 0x40_0000
VM_WIPEONFORK: Final = 0x200_0000
VM_DONTDUMP: Final = 0x400_0000
VM_SOFTDIRTY: Final = 0x800_0000
VM_MIXEDMAP: Final = 0x1000_0000
VM_HUGEPAGE: Final = 0x2000_0000
VM_NOHUGEPAGE: Final = 0x4000_0000
VM_MERGEABLE: Final = 0x8000_0000
VM_DROPPABLE: Final = 1 << 40
VM_SEALED: Final = 1 << 42

VM_ACCESS_FLAGS: Final = VM_READ | VM_WRITE | VM_EXEC
VM_SPECIAL: Final = VM_IO | VM_DONTEXPAND | VM_PFNMAP | VM_MIXEDMAP
VM_STICKY: Final = VM_SOFTDIRTY | VM_MAYBE_GUARD
"""Flags in which two VMAs may differ and still merge; the result has them if either had."""
VM_STACK_FLAGS: Final = VM_GROWSDOWN | VM_ACCOUNT
VM_DATA_DEFAULT_FLAGS: Final = VM_READ | VM_WRITE | VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC

MMF_HAS_UPROBES: Final = 19
MMF_RECALC_UPROBES: Final = 20
MMF_UNSTABLE: Final = 22

PROT_NONE: Final = 0
PROT_READ: Final = _mman.PROT_READ
PROT_WRITE: Final = _mman.PROT_WRITE
PROT_EXEC: Final = _mman.PROT_EXEC
PROT_SEM: Final = 0x8
PROT_GROWSDOWN: Final = 0x100_0000
PROT_GROWSUP: Final = 0x200_0000

MAP_SHARED: Final = _mman.MAP_SHARED
MAP_PRIVATE: Final = _mman.MAP_PRIVATE
MAP_SHARED_VALIDATE: Final = 0x3
MAP_DROPPABLE: Final = 0x8
MAP_TYPE: Final = 0xF
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_GROWSDOWN: Final = 0x100
MAP_LOCKED: Final = 0x2000
MAP_NORESERVE: Final = 0x4000
MAP_STACK: Final = 0x2_0000
MAP_FIXED_NOREPLACE: Final = 0x10_0000

MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
MREMAP_DONTUNMAP: Final = 4

MADV_NORMAL: Final = 0
MADV_RANDOM: Final = 1
MADV_SEQUENTIAL: Final = 2
MADV_WILLNEED: Final = 3
MADV_DONTNEED: Final = 4
MADV_FREE: Final = 8
MADV_DONTFORK: Final = 10
MADV_DOFORK: Final = 11
MADV_MERGEABLE: Final = 12
MADV_UNMERGEABLE: Final = 13
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_DONTDUMP: Final = 16
MADV_DODUMP: Final = 17
MADV_WIPEONFORK: Final = 18
MADV_KEEPONFORK: Final = 19
MADV_COLD: Final = 20
MADV_PAGEOUT: Final = 21
MADV_DONTNEED_LOCKED: Final = 24


def PAGE_ALIGN(length: int) -> int:
    """Round up to whole pages."""
    return (length + PAGE_SIZE - 1) & PAGE_MASK


def offset_in_page(address: int) -> int:
    """The part of an address below page size."""
    return address & (PAGE_SIZE - 1)


def calc_vm_prot_bits(prot: int) -> int:
    """PROT_ bits as VM_ bits (they are the same numbers)."""
    return prot & (VM_READ | VM_WRITE | VM_EXEC)


def calc_vm_flag_bits(flags: int) -> int:
    """MAP_ bits that become VM_ bits."""
    return (
        (VM_GROWSDOWN if flags & MAP_GROWSDOWN else 0)
        | (VM_LOCKED if flags & MAP_LOCKED else 0)
        | (VM_NOHUGEPAGE if flags & MAP_STACK else 0)
    )
