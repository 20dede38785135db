"""What mm/ calls in rooms above it, by slots that they fill.

Models:      include/linux/uprobes.h, the calls from mm/ and kernel/fork.c (7.2)
Guards:      assigned at import of the room that fills them, before anything runs
Invariants:  none: imports go one way, calls go both
Leaves out:  notifiers for anybody else
Read next:   uprobes/mm_hooks.py

Always call them as module attributes: hooks.uprobe_mmap(vma).
"""

from typing import Any


def uprobe_mmap(vma: Any) -> int:
    """A VMA was mapped or changed and is in i_mmap; mmap_lock (write). Always 0."""
    return 0


def uprobe_munmap(vma: Any, start: int, end: int) -> None:
    """[start, end) of the VMA goes away or is about to change hands; mmap_lock (write)."""


def zap_pages(mm: Any, start: int, end: int) -> None:
    """[start, end) was unmapped: private pages there go; mmap_lock (write, or downgraded)."""


def move_pages(mm: Any, old: int, new: int, length: int) -> None:
    """mremap moved [old, old + length) to `new`: private pages go along; mmap_lock (write)."""


def uprobe_start_dup_mmap() -> None:
    """A fork is about to copy mappings."""


def uprobe_end_dup_mmap() -> None:
    """The fork has copied them."""


def uprobe_dup_mmap(oldmm: Any, newmm: Any) -> None:
    """The child has the parent's private pages."""


def uprobe_clear_state(mm: Any) -> None:
    """The address space ends."""
