"""mmap(2) and munmap(2).

Models:      mm/mmap.c, do_mmap, vm_mmap_pgoff, __vm_munmap, arch_get_unmapped_area_topdown, vm_unmapped_area;
             mm/vma.c, mmap_region, __mmap_new_vma (7.2, x86-64)
Guards:      mmap_lock (write) for all of it
Invariants:  A1 a new VMA is write-locked, attached, put in the tree, put in i_mmap, hooked, in this order
             A2 what MAP_FIXED replaces stays in the tree until the new VMA takes its
             place in one store
Leaves out:  docs/limits.d/mm.md: RLIMITs, overcommit refusals, mlock, huge pages, seals, files' own mmap
Read next:   mm/vma_unmap.py, mm/vma_merge.py
"""

import itertools
import os
from errno import (
    EACCES,
    EBADF,
    EEXIST,
    EINTR,
    EINVAL,
    ENODEV,
    ENOMEM,
    EOPNOTSUPP,
    EOVERFLOW,
)
from typing import Any, Final

import attrs

from kmodel.core import initcall
from kmodel.fs import (
    FMODE_READ,
    FMODE_WRITE,
    O_RDWR,
    File,
    alloc_empty_file,
    file_init_path,
    get_file,
    iget_path,
    iput,
    mapping_map_writable,
    mapping_unmap_writable,
    shmem_aops,
    task_work_run,
    unlink,
)
from kmodel.mm import hooks, mm_struct
from kmodel.mm.flags import (
    MAP_ANONYMOUS,
    MAP_DROPPABLE,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_GROWSDOWN,
    MAP_LOCKED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    MAP_STACK,
    MAP_TYPE,
    PAGE_ALIGN,
    PAGE_SHIFT,
    PROT_WRITE,
    VM_ACCOUNT,
    VM_DONTDUMP,
    VM_DROPPABLE,
    VM_GROWSDOWN,
    VM_MAYEXEC,
    VM_MAYREAD,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_NORESERVE,
    VM_SHARED,
    VM_WIPEONFORK,
    VM_WRITE,
    calc_vm_flag_bits,
    calc_vm_prot_bits,
)
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap_lock import (
    mmap_assert_write_locked,
    mmap_write_lock_killable,
    mmap_write_unlock,
)
from kmodel.mm.unmapped_area import get_unmapped_area, round_hint_to_min
from kmodel.mm.vma import (
    VmAreaStruct,
    VmOperations,
    is_shared_maywrite,
    vm_area_alloc,
    vm_area_free,
    vm_flags_init,
    vma_set_range,
)
from kmodel.mm.vma_iter import (
    find_vma,
    find_vma_intersection,
    find_vma_prev,
    vma_find,
    vma_iter_clear,
    vma_iter_free,
    vma_iter_init,
    vma_iter_prealloc,
    vma_iter_store_new,
)
from kmodel.mm.vma_lock import vma_start_write
from kmodel.mm.vma_merge import VmaMergeStruct, vma_merge_new_range
from kmodel.mm.vma_prepare import vma_link_file
from kmodel.mm.vma_unmap import (
    VmaMunmapStruct,
    do_munmap,
    vms_clear_ptes,
    vms_complete_munmap_vmas,
    vms_gather_munmap_vmas,
)

LEGACY_MAP_MASK: Final = (
    MAP_SHARED
    | MAP_PRIVATE
    | MAP_FIXED
    | MAP_ANONYMOUS
    | MAP_GROWSDOWN
    | MAP_LOCKED
    | MAP_NORESERVE
    | MAP_STACK
    | 0x7C05_9800  # MAP_DENYWRITE, MAP_EXECUTABLE, MAP_POPULATE, MAP_NONBLOCK, MAP_HUGETLB, its sizes
)
"""What MAP_SHARED_VALIDATE accepts: what there was when it was invented. MAP_FIXED_NOREPLACE is younger."""
MAX_LFS_FILESIZE: Final = (1 << 63) - 1

generic_file_vm_ops: Final = VmOperations()
shmem_vm_ops: Final = VmOperations()
shmem_dev: Final = (0, 1)

_shmem_numbers = itertools.count(1)


@initcall
def _shmem_init() -> None:
    global _shmem_numbers
    _shmem_numbers = itertools.count(1)


# ---------------------------------------------------------------------------------------------- system calls


def mmap(
    mm: MmStruct, addr: int, length: int, prot: int, flags: int, file: File | None = None, pgoff: int = 0
) -> int:
    """Map `file` from page `pgoff`, or anonymous memory; the address. OSError with the kernel's errno."""
    if flags & MAP_ANONYMOUS:
        file = None
    elif file is None:
        _raise(-EBADF)
    error = mmap_write_lock_killable(mm)
    if error:
        _raise(-EINTR)
    result = do_mmap(mm, file, addr, length, prot, flags, pgoff)
    mmap_write_unlock(mm)
    task_work_run()
    return _raise(result)


def munmap(mm: MmStruct, addr: int, length: int) -> int:
    """Unmap whole pages; 0. OSError with the kernel's errno."""
    error = mmap_write_lock_killable(mm)
    if error:
        _raise(-EINTR)
    error = do_munmap(mm, addr, length, unlock=True)
    if error:
        mmap_write_unlock(mm)
    task_work_run()
    return _raise(error)


def _raise(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


# ------------------------------------------------------------------------------------------------ do_mmap


def do_mmap(
    mm: MmStruct, file: File | None, addr: int, length: int, prot: int, flags: int, pgoff: int
) -> int:
    """The checks of mmap(2), then mmap_region(): the address or a negative errno. mmap_lock (write)."""
    mmap_assert_write_locked(mm)
    if not length:
        return -EINVAL
    if flags & MAP_FIXED_NOREPLACE:
        flags |= MAP_FIXED
    if not flags & MAP_FIXED:
        addr = round_hint_to_min(addr)
    length = PAGE_ALIGN(length)
    if not 0 < length <= 0xFFFF_FFFF_FFFF_F000:
        return -ENOMEM
    if pgoff + (length >> PAGE_SHIFT) > 0xFFFF_FFFF_FFFF_FFFF:
        return -EOVERFLOW
    if mm.map_count > mm_struct.sysctl_max_map_count:
        return -ENOMEM
    vm_flags = (
        calc_vm_prot_bits(prot)
        | calc_vm_flag_bits(flags)
        | mm.def_flags
        | VM_MAYREAD
        | VM_MAYWRITE
        | VM_MAYEXEC
    )
    addr = get_unmapped_area(mm, addr, length, flags)
    if addr < 0:
        return addr
    if flags & MAP_FIXED_NOREPLACE and find_vma_intersection(mm, addr, addr + length) is not None:
        return -EEXIST
    if file is not None:
        if pgoff << PAGE_SHIFT > MAX_LFS_FILESIZE - length:
            return -EOVERFLOW
        vm_flags = _file_vm_flags(file, vm_flags, prot, flags)
        if vm_flags < 0:
            return vm_flags
    else:
        match flags & MAP_TYPE:
            case 1:  # MAP_SHARED
                if vm_flags & VM_GROWSDOWN:
                    return -EINVAL
                pgoff = 0
                vm_flags |= VM_SHARED | VM_MAYSHARE
            case 2 | 8:  # MAP_PRIVATE or MAP_DROPPABLE: neighbours that were mapped one by one line up
                pgoff = addr >> PAGE_SHIFT
                if flags & MAP_DROPPABLE:
                    if vm_flags & VM_GROWSDOWN or flags & MAP_LOCKED:
                        return -EINVAL  # stacks and locked memory may not just vanish
                    vm_flags |= VM_DROPPABLE | VM_NORESERVE | VM_WIPEONFORK | VM_DONTDUMP
            case _:
                return -EINVAL
    if flags & MAP_NORESERVE:
        vm_flags |= VM_NORESERVE
    return mmap_region(mm, file, addr, length, vm_flags, pgoff)


def _file_vm_flags(file: File, vm_flags: int, prot: int, flags: int) -> int:
    """What the file's open mode makes of the flags, or an error."""
    map_type = flags & MAP_TYPE
    if map_type not in (MAP_SHARED, MAP_SHARED_VALIDATE, MAP_PRIVATE):
        return -EINVAL
    if map_type == MAP_SHARED_VALIDATE and flags & ~(LEGACY_MAP_MASK | MAP_SHARED_VALIDATE):
        return -EOPNOTSUPP
    if map_type != MAP_PRIVATE:
        if prot & PROT_WRITE and not file.f_mode & FMODE_WRITE:
            return -EACCES
        vm_flags |= VM_SHARED | VM_MAYSHARE
        if not file.f_mode & FMODE_WRITE:
            vm_flags &= ~(VM_MAYWRITE | VM_SHARED)
    if not file.f_mode & FMODE_READ:
        return -EACCES
    if file.f_mapping is None:
        return -ENODEV
    if vm_flags & VM_GROWSDOWN:
        return -EINVAL
    return vm_flags


# ------------------------------------------------------------------------------------------------ mmap_region


@attrs.define(eq=False)
class _MmapState:
    mm: MmStruct
    addr: int
    end: int
    pgoff: int
    vm_flags: int
    file: File | None


def mmap_region(mm: MmStruct, file: File | None, addr: int, length: int, vm_flags: int, pgoff: int) -> int:
    """Put the mapping in place of whatever is there: the address or a negative errno."""
    mapping = file.f_mapping if file is not None and is_shared_maywrite(vm_flags) else None
    if mapping is not None:
        # Counted while we work, so that nobody denies writable mappings meanwhile.
        error = mapping_map_writable(mapping)
        if error:
            return error
    result = __mmap_region(_MmapState(mm, addr, addr + length, pgoff, vm_flags, file))
    if mapping is not None:
        mapping_unmap_writable(mapping)
    return result


def __mmap_region(state: _MmapState) -> int:
    mm, addr, end = state.mm, state.addr, state.end
    vmi = vma_iter_init(mm, addr)
    vms = VmaMunmapStruct(mm, addr, end)
    overlapped = vma_find(vmi, end)
    if overlapped is not None:
        error = vms_gather_munmap_vmas(vms, overlapped)
        if error:
            return error
        # While the old VMAs are in the tree still, so that reverse maps are gone before the new one is known.
        vms_clear_ptes(vms)
    if state.vm_flags & (VM_NORESERVE | VM_SHARED | VM_WRITE) == VM_WRITE:
        state.vm_flags |= VM_ACCOUNT

    # What is about to be replaced is still in the tree: prev ends at or before addr, next begins at or after
    # end.
    prev = find_vma_prev(mm, addr)[1]
    next_ = find_vma(mm, end)
    vmg = VmaMergeStruct(mm, prev, next_, addr, end, state.pgoff, state.vm_flags, file=state.file)
    vma = vma_merge_new_range(vmg)
    if vma is None:
        made = __mmap_new_vma(state)
        if isinstance(made, int):
            _abort_munmap(vms)
            return made
        vma = made
    vms_complete_munmap_vmas(vms)
    mm.total_vm += (end - addr) >> PAGE_SHIFT
    if vma.vm_file is not None:
        hooks.uprobe_mmap(vma)
    return addr


def _abort_munmap(vms: VmaMunmapStruct) -> None:
    """The new mapping failed after the old ones lost their pages: they cannot stay."""
    if not vms.vmas:
        return
    vmi = vma_iter_init(vms.mm, vms.start)
    error = vma_iter_prealloc(vmi, vms.start, vms.end, None)
    if error:
        # The kernel retries without fail here; so does this model, whose failures are injected one by one.
        while vma_iter_prealloc(vmi, vms.start, vms.end, None):
            pass
    vma_iter_clear(vmi)
    vms_complete_munmap_vmas(vms)


def __mmap_new_vma(state: _MmapState) -> VmAreaStruct | int:
    """Make a VMA of its own for the range; or an error."""
    mm = state.mm
    vma = vm_area_alloc(mm)
    if vma is None:
        return -ENOMEM
    vma_set_range(vma, state.addr, state.end, state.pgoff)
    vm_flags_init(vma, state.vm_flags)
    vmi = vma_iter_init(mm, state.addr)
    error = vma_iter_prealloc(vmi, state.addr, state.end, vma)
    if error:
        vm_area_free(vma)
        return error
    if state.file is not None:
        vma.vm_file = get_file(state.file)
        vma.vm_ops = generic_file_vm_ops
    elif state.vm_flags & VM_SHARED:
        error = shmem_zero_setup(vma)
        if error:
            vma_iter_free(vmi)
            vm_area_free(vma)
            return error
    # The VMA is changed after it is in the tree (flags, hooks): locked until mmap_lock is dropped.
    vma_start_write(vma)
    vma_iter_store_new(vmi, vma)
    mm.map_count += 1
    vma_link_file(vma)
    return vma


def shmem_zero_setup(vma: VmAreaStruct) -> int:
    """Shared anonymous memory is a file of its own that has no name: 0 or -ENOMEM."""
    size = vma.vm_end - vma.vm_start
    number = next(_shmem_numbers)
    key = f"/dev/zero#{number}"
    inode = iget_path(key, size=size, ino=number, dev=shmem_dev, a_ops=shmem_aops)
    if inode is None:
        return -ENOMEM
    unlink(key)
    file: Any = alloc_empty_file(O_RDWR)
    if isinstance(file, int):
        iput(inode)
        return file
    file_init_path(file, "/dev/zero (deleted)", inode)
    vma.vm_file = file
    vma.vm_ops = shmem_vm_ops
    return 0
