"""Mappings of pages that the kernel itself provides: [vdso], [vvar], [uprobes].

Models:      mm/vma.c, __install_special_mapping, insert_vm_struct, special_mapping_name (7.2)
Guards:      mmap_lock (write)
Invariants:  S1 a special mapping has no file and is never expanded or merged (VM_DONTEXPAND)
Leaves out:  the pages: they cannot be faulted in, who provides them keeps their contents; mremap and close
             hooks
Read next:   uprobes/xol.py, which makes one; mm/from_proc_maps.py
"""

from errno import ENOMEM
from typing import Final

from kmodel.mm.flags import PAGE_SHIFT, VM_DONTEXPAND
from kmodel.mm.mm_struct import MmStruct
from kmodel.mm.mmap_lock import mmap_assert_write_locked
from kmodel.mm.vma import (
    VmAreaStruct,
    VmOperations,
    vm_area_alloc,
    vm_area_free,
    vm_flags_init,
    vma_set_range,
)
from kmodel.mm.vma_iter import find_vma, vma_iter_init, vma_iter_store_gfp
from kmodel.mm.vma_lock import vma_start_write
from kmodel.mm.vma_prepare import vma_link_file


def special_mapping_name(vma: VmAreaStruct) -> str | None:
    """What /proc/PID/maps says of it."""
    return vma.vm_private_data  # type: ignore[no-any-return]


special_mapping_vmops: Final = VmOperations(name=special_mapping_name)


def insert_vm_struct(mm: MmStruct, vma: VmAreaStruct) -> int:
    """Put a finished VMA into the address space: 0, or -ENOMEM if something is there or memory is out."""
    mmap_assert_write_locked(mm)
    there = find_vma(mm, vma.vm_start)
    if there is not None and there.vm_start < vma.vm_end:
        return -ENOMEM
    vma_start_write(vma)
    if vma_iter_store_gfp(vma_iter_init(mm, vma.vm_start), vma):
        return -ENOMEM
    mm.map_count += 1
    mm.total_vm += (vma.vm_end - vma.vm_start) >> PAGE_SHIFT
    vma_link_file(vma)
    return 0


def _install_special_mapping(
    mm: MmStruct, addr: int, length: int, vm_flags: int, name: str
) -> VmAreaStruct | int:
    """Map the kernel's own pages at [addr, addr + length); the VMA or -ENOMEM."""
    vma = vm_area_alloc(mm)
    if vma is None:
        return -ENOMEM
    vma_set_range(vma, addr, addr + length, 0)
    vma.vm_ops = special_mapping_vmops
    vma.vm_private_data = name
    vm_flags_init(vma, vm_flags | mm.def_flags | VM_DONTEXPAND)
    ret = insert_vm_struct(mm, vma)
    if ret:
        vm_area_free(vma)
        return ret
    return vma
