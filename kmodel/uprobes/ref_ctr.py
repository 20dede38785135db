"""Reference counters (SDT semaphores): a short in the probed program that says how many probes watch a place.

Models:      kernel/events/uprobes.c, update_ref_ctr, __update_ref_ctr, delayed_ref_ctr_inc, valid_ref_ctr_vma
             (7.2)
Guards:      mmap_lock of the mm for writing; delayed_uprobe_lock for what must wait
Invariants:  P12 the counter equals the installed breakpoints of the uprobes that name it, once delayed
             increments are applied
Leaves out:  nothing
Read next:   uprobes/breakpoint.py

The program skips the work of preparing a probe's arguments while its counter is 0. The counter lives in a
writable private mapping of the same file, which may not exist yet when the breakpoint is installed: then the
increment is put off until it is mapped.
"""

import errno
import struct
from typing import Any

from kmodel.core import WARN
from kmodel.mm import VM_SHARED, VM_WRITE, for_each_vma
from kmodel.sync import mutex_lock, mutex_unlock
from kmodel.uprobes import delayed
from kmodel.uprobes.pages import PAGE_MASK, offset_to_vaddr, read_page, write_page
from kmodel.uprobes.uprobe import Uprobe

_SHORT = struct.Struct("<h")


def valid_ref_ctr_vma(uprobe: Uprobe, vma: Any) -> bool:
    """Whether this mapping holds the uprobe's counter: private and writable, same file, covering the
    offset.
    """
    if uprobe.ref_ctr_offset == 0 or vma.vm_file is None or vma.vm_file.f_inode is not uprobe.inode:
        return False
    if vma.vm_flags & (VM_WRITE | VM_SHARED) != VM_WRITE:
        return False
    vaddr = offset_to_vaddr(vma, uprobe.ref_ctr_offset)
    return bool(vma.vm_start <= vaddr < vma.vm_end)


def find_ref_ctr_vma(uprobe: Uprobe, mm: Any) -> Any:
    """The mapping that holds the counter, or None."""
    for vma in for_each_vma(mm):
        if valid_ref_ctr_vma(uprobe, vma):
            return vma
    return None


def read_ref_ctr(vma: Any, vaddr: int) -> int | None:
    """The counter's value, or None where its page is past the end of the file."""
    page = read_page(vma, vaddr)
    return None if page is None else int(_SHORT.unpack_from(page, vaddr & ~PAGE_MASK)[0])


def __update_ref_ctr(vma: Any, vaddr: int, d: int) -> int:
    """Add d to the counter, unless that makes it negative: then -EINVAL and no change."""
    value = read_ref_ctr(vma, vaddr)
    if value is None:
        return -errno.EFAULT
    if value + d < 0:
        return -errno.EINVAL
    return write_page(vma, vaddr, _SHORT.pack(value + d))


def update_ref_ctr(uprobe: Uprobe, mm: Any, d: int) -> int:
    """Count one breakpoint more or less in `mm`: in memory if the counter is mapped, else on the delayed
    list.
    """
    ret = 0
    vma = find_ref_ctr_vma(uprobe, mm)
    if vma is not None:
        ret = __update_ref_ctr(vma, offset_to_vaddr(vma, uprobe.ref_ctr_offset), d)
        WARN(ret, "a uprobe's reference counter could not be updated")
        if d > 0:
            return ret
    mutex_lock(delayed.delayed_uprobe_lock)
    if d > 0:
        ret = delayed.delayed_uprobe_add(uprobe, mm)
    else:
        delayed.delayed_uprobe_remove(uprobe, mm)
    mutex_unlock(delayed.delayed_uprobe_lock)
    return ret


def delayed_ref_ctr_inc(vma: Any) -> int:
    """A writable private mapping appeared: apply what waited for it. Needs mmap_lock held for writing."""
    err = 0
    mutex_lock(delayed.delayed_uprobe_lock)
    for du in list(delayed.delayed_uprobe_list):
        if du.mm is not vma.vm_mm or not valid_ref_ctr_vma(du.uprobe, vma):
            continue
        ret = __update_ref_ctr(vma, offset_to_vaddr(vma, du.uprobe.ref_ctr_offset), 1)
        if ret:
            WARN(True, "a uprobe's delayed reference counter could not be updated")
            err = err or ret
        delayed.delayed_uprobe_list.remove(du)
    mutex_unlock(delayed.delayed_uprobe_lock)
    return err
