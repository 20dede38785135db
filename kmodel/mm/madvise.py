"""madvise(2), and names for anonymous memory: what splits and merges mappings like mprotect does.

Models:      mm/madvise.c, do_madvise, madvise_walk_vmas, madvise_vma_behavior, madvise_update_vma,
             prctl_set_vma_anon_name; mm/ksm.c, ksm_madvise; mm/khugepaged.c, hugepage_madvise (7.2)
Guards:      mmap_lock: write where VMAs change, read where only pages do
Invariants:  G2 of mm/vma_merge.py; a hole is passed over and reported at the end (D1)
Leaves out:  what the advice does to pages (a hook for those that drop them), MADV_REMOVE, populating,
             collapsing, guard pages, poisoning
Read next:   mm/mremap.py
"""

from errno import EAGAIN, EBADF, EINTR, EINVAL, ENOMEM, EPERM
from typing import Final

from kmodel.fs import task_work_run
from kmodel.mm import hooks
from kmodel.mm.flags import (
    MADV_COLD,
    MADV_DODUMP,
    MADV_DOFORK,
    MADV_DONTDUMP,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_DONTNEED_LOCKED,
    MADV_FREE,
    MADV_HUGEPAGE,
    MADV_KEEPONFORK,
    MADV_MERGEABLE,
    MADV_NOHUGEPAGE,
    MADV_NORMAL,
    MADV_PAGEOUT,
    MADV_RANDOM,
    MADV_SEQUENTIAL,
    MADV_UNMERGEABLE,
    MADV_WILLNEED,
    MADV_WIPEONFORK,
    PAGE_ALIGN,
    VM_DONTCOPY,
    VM_DONTDUMP,
    VM_DROPPABLE,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_IO,
    VM_LOCKED,
    VM_MAYSHARE,
    VM_MERGEABLE,
    VM_NOHUGEPAGE,
    VM_PFNMAP,
    VM_RAND_READ,
    VM_SEALED,
    VM_SEQ_READ,
    VM_SHARED,
    VM_SPECIAL,
    VM_STICKY,
    VM_WIPEONFORK,
    VM_WRITE,
    offset_in_page,
)
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap import _raise, shmem_dev
from kmodel.mm.mmap_lock import (
    mmap_read_lock,
    mmap_read_unlock,
    mmap_write_lock_killable,
    mmap_write_unlock,
)
from kmodel.mm.vma import VmAreaStruct, vm_flags_reset, vma_is_anonymous
from kmodel.mm.vma_iter import find_vma, find_vma_prev, vma_iter_init
from kmodel.mm.vma_lock import vma_start_write
from kmodel.mm.vma_merge import vma_modify, vmg_of

ANON_VMA_NAME_MAX_LEN: Final = 80
_NAME_INVALID_CHARS: Final = frozenset("\\`$[]")

_PAGES_ONLY: Final = frozenset(
    {MADV_WILLNEED, MADV_DONTNEED, MADV_FREE, MADV_COLD, MADV_PAGEOUT, MADV_DONTNEED_LOCKED}
)
_FLAGS: Final = frozenset(
    {
        MADV_NORMAL,
        MADV_RANDOM,
        MADV_SEQUENTIAL,
        MADV_DONTFORK,
        MADV_DOFORK,
        MADV_MERGEABLE,
        MADV_UNMERGEABLE,
        MADV_HUGEPAGE,
        MADV_NOHUGEPAGE,
        MADV_DONTDUMP,
        MADV_DODUMP,
        MADV_WIPEONFORK,
        MADV_KEEPONFORK,
    }
)
_DISCARDS: Final = frozenset({MADV_FREE, MADV_DONTNEED, MADV_DONTNEED_LOCKED, MADV_DONTFORK, MADV_WIPEONFORK})


def madvise(mm: MmStruct, start: int, length: int, behavior: int) -> int:
    """Say how [start, start + length) will be used; 0. OSError with the kernel's errno; what is mapped around
    a hole is advised all the same.
    """
    if behavior not in _FLAGS and behavior not in _PAGES_ONLY:
        _raise(-EINVAL)
    end = _range_end(start, length)
    if end <= start:
        return _raise(end if end < 0 else 0)
    if behavior in _PAGES_ONLY:
        mmap_read_lock(mm)
        error = madvise_walk_vmas(mm, start, end, behavior)
        mmap_read_unlock(mm)
    else:
        if mmap_write_lock_killable(mm):
            _raise(-EINTR)
        error = madvise_walk_vmas(mm, start, end, behavior)
        mmap_write_unlock(mm)
    task_work_run()
    return _raise(error)


def prctl_set_vma_anon_name(mm: MmStruct, start: int, length: int, name: str | None) -> int:
    """prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME): what /proc shows as [anon:NAME]; 0 or OSError."""
    if name is not None:
        if len(name.encode()) >= ANON_VMA_NAME_MAX_LEN:
            _raise(-EINVAL)
        if not all(" " <= letter <= "~" and letter not in _NAME_INVALID_CHARS for letter in name):
            _raise(-EINVAL)
    if mmap_write_lock_killable(mm):
        _raise(-EINTR)
    error = madvise_set_anon_name(mm, start, length, name)
    mmap_write_unlock(mm)
    task_work_run()
    return _raise(error)


def madvise_set_anon_name(mm: MmStruct, start: int, length: int, name: str | None) -> int:
    """0 or a negative errno. mmap_lock (write)."""
    end = _range_end(start, length)
    if end <= start:
        return end if end < 0 else 0
    return madvise_walk_vmas(mm, start, end, None, name)


def _range_end(start: int, length: int) -> int:
    """The end of a range of whole pages, `start` if it is empty, or -EINVAL."""
    if offset_in_page(start):
        return -EINVAL
    end = start + PAGE_ALIGN(length)
    return -EINVAL if end > 0xFFFF_FFFF_FFFF_FFFF else end


def madvise_walk_vmas(
    mm: MmStruct, start: int, end: int, behavior: int | None, name: str | None = None
) -> int:
    """Every VMA of the range in turn: 0, its first error, or -ENOMEM for a hole (D1). behavior None: `name`
    it.
    """
    unmapped = 0
    while start < end:
        vma = find_vma(mm, start)
        if vma is None:
            return -ENOMEM
        if start < vma.vm_start:
            unmapped = -ENOMEM
            start = vma.vm_start
            if start >= end:
                break
        stop = min(vma.vm_end, end)
        if behavior is None:
            result = madvise_vma_anon_name(vma, start, stop, name)
        else:
            result = madvise_vma_behavior(vma, start, stop, behavior)
        if isinstance(result, int):
            return result
        # It may have been merged with what follows, which is as asked for already.
        start = max(stop, result.vm_end)
    return unmapped


# ------------------------------------------------------------------------------------------------ one VMA


def can_madvise_modify(vma: VmAreaStruct, behavior: int) -> bool:
    """Whether a seal permits it: what the caller may not write to, it may not drop either."""
    if not vma.vm_flags & VM_SEALED or behavior not in _DISCARDS:
        return True
    return not vma_is_anonymous(vma) or bool(vma.vm_flags & VM_WRITE)


def madvise_vma_behavior(vma: VmAreaStruct, start: int, end: int, behavior: int) -> VmAreaStruct | int:
    """[start, end) of one VMA is advised: the VMA that covers it afterwards, or an error."""
    if not can_madvise_modify(vma, behavior):
        return -EPERM
    if behavior in _PAGES_ONLY:
        return _advise_pages(vma, start, end, behavior) or vma
    new_flags = _new_flags(vma, behavior)
    if new_flags < 0:
        return new_flags
    return madvise_update_vma(vma, start, end, new_flags, vma.anon_name)


def _advise_pages(vma: VmAreaStruct, start: int, end: int, behavior: int) -> int:
    forbidden = VM_PFNMAP | VM_HUGETLB
    match behavior:
        case 3:  # MADV_WILLNEED
            return 0
        case 8:  # MADV_FREE
            if not vma_is_anonymous(vma):
                return -EINVAL
        case 4 | 20 | 21:  # MADV_DONTNEED, MADV_COLD, MADV_PAGEOUT
            forbidden |= VM_LOCKED
    if behavior != MADV_FREE and vma.vm_flags & forbidden:
        return -EINVAL
    if behavior in (MADV_DONTNEED, MADV_DONTNEED_LOCKED):
        assert vma.vm_mm is not None
        hooks.zap_pages(vma.vm_mm, start, end)
    return 0


def _new_flags(vma: VmAreaStruct, behavior: int) -> int:
    """The VMA's flags as the advice wants them, or an error."""
    flags = vma.vm_flags
    if behavior == MADV_NORMAL:
        return flags & ~(VM_RAND_READ | VM_SEQ_READ)
    if behavior == MADV_SEQUENTIAL:
        return flags & ~VM_RAND_READ | VM_SEQ_READ
    if behavior == MADV_RANDOM:
        return flags & ~VM_SEQ_READ | VM_RAND_READ
    if behavior == MADV_DONTFORK:
        return flags | VM_DONTCOPY
    if behavior == MADV_DOFORK:
        return -EINVAL if flags & VM_IO else flags & ~VM_DONTCOPY
    if behavior == MADV_WIPEONFORK:
        # A child that finds zeroes: no file may say otherwise.
        return -EINVAL if vma.vm_file is not None or flags & VM_SHARED else flags | VM_WIPEONFORK
    if behavior == MADV_KEEPONFORK:
        return -EINVAL if flags & VM_DROPPABLE else flags & ~VM_WIPEONFORK
    if behavior == MADV_DONTDUMP:
        return flags | VM_DONTDUMP
    if behavior == MADV_DODUMP:
        special = not flags & VM_HUGETLB and flags & VM_SPECIAL
        return -EINVAL if special or flags & VM_DROPPABLE else flags & ~VM_DONTDUMP
    if behavior in (MADV_MERGEABLE, MADV_UNMERGEABLE):
        return ksm_madvise(vma, behavior)
    return hugepage_madvise(flags, behavior)


def ksm_madvise(vma: VmAreaStruct, behavior: int) -> int:
    """The flags after KSM was told; a mapping it cannot merge in stays as it is, without an error."""
    flags = vma.vm_flags
    if behavior == MADV_UNMERGEABLE:
        return flags & ~VM_MERGEABLE
    if flags & (VM_SHARED | VM_MAYSHARE | VM_SPECIAL | VM_HUGETLB | VM_DROPPABLE):
        return flags
    return flags | VM_MERGEABLE


def hugepage_madvise(flags: int, behavior: int) -> int:
    """The flags with one wish about huge pages in place of the other."""
    if behavior == MADV_HUGEPAGE:
        return flags & ~VM_NOHUGEPAGE | VM_HUGEPAGE
    assert behavior == MADV_NOHUGEPAGE
    return flags & ~VM_HUGEPAGE | VM_NOHUGEPAGE


def madvise_vma_anon_name(vma: VmAreaStruct, start: int, end: int, name: str | None) -> VmAreaStruct | int:
    """Name [start, end) of one VMA, which must be anonymous or the kernel's own shared memory."""
    if vma.vm_file is not None and vma.vm_file.f_inode.i_dev != shmem_dev:
        return -EBADF
    return madvise_update_vma(vma, start, end, vma.vm_flags, name)


def madvise_update_vma(
    vma: VmAreaStruct, start: int, end: int, new_flags: int, name: str | None
) -> VmAreaStruct | int:
    """Give [start, end) of one VMA these flags and this name: the VMA that covers it, or an error."""
    if new_flags == vma.vm_flags and name == vma.anon_name:
        return vma
    mm = vma.vm_mm
    assert mm is not None
    prev = find_vma_prev(mm, vma.vm_start)[1]
    vmg = vmg_of(vma, prev, find_vma(mm, vma.vm_end), start, end)
    vmg.vm_flags, vmg.anon_name = new_flags, name
    modified = vma_modify(vmg, vma_iter_init(mm, start))
    if isinstance(modified, int):
        return -EAGAIN if modified == -ENOMEM else modified
    vma_start_write(modified)
    # What it merged with may have had sticky flags.
    vm_flags_reset(modified, new_flags | modified.vm_flags & VM_STICKY)
    modified.anon_name = name
    return modified
