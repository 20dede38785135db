"""dump_vma(): what a VMA looks like, in words, when something is wrong with it.

Models:      mm/debug.c, dump_vma (7.2)
Guards:      none: it is called when nothing can be relied on any more
Invariants:  looking at a VMA changes nothing, and no engine sees it
Leaves out:  dump_mm, dump_page; the text is not the kernel's
Read next:   mm/vma_refcnt.py, the table of vm_refcnt's values
"""

from kmodel.core import raw_get
from kmodel.core.report import log
from kmodel.mm import vma_lock
from kmodel.mm.flags import VM_EXEC, VM_MAYSHARE, VM_READ, VM_WRITE
from kmodel.mm.vma import VmAreaStruct


def vma_in_words(vma: VmAreaStruct) -> str:
    """The lines that dump_vma() logs."""
    get = {
        name: raw_get(vma, name)
        for name in (
            "vm_start",
            "vm_end",
            "vm_mm",
            "vm_flags",
            "vm_pgoff",
            "vm_file",
            "vm_lock_seq",
            "vm_refcnt",
            "anon_vma",
        )
    }
    mm = get["vm_mm"]
    seq = "no mm" if mm is None else f"mm_lock_seq {raw_get(mm.mm_lock_seq, 'sequence')}"
    flags = get["vm_flags"]
    mode = "".join(
        letter if flags & bit else "-" for letter, bit in (("r", VM_READ), ("w", VM_WRITE), ("x", VM_EXEC))
    ) + ("s" if flags & VM_MAYSHARE else "p")
    return "\n".join(
        (
            f"{vma!r} {get['vm_start']:x}-{get['vm_end']:x} {mode} of {mm!r}",
            f"  pgoff {get['vm_pgoff']:#x} flags {flags:#x} file {get['vm_file']!r}"
            f" anon_vma {get['anon_vma']!r}",
            f"  vm_refcnt {get['vm_refcnt']:#x} vm_lock_seq {get['vm_lock_seq']} {seq}:"
            f" {vma_lock.vma_state_in_words(vma)}",
        )
    )


def dump_vma(vma: VmAreaStruct) -> str:
    """Log the VMA, in words, and return the text."""
    text = vma_in_words(vma)
    log.error("%s", text)
    return text
