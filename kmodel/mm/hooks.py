"""What mm/ calls in rooms above it, or in modules that come later, by slots that they fill.

Models:      include/linux/uprobes.h, the calls from mm/ and kernel/fork.c (7.2)
Guards:      assigned at import of the room that fills them, before anything runs
Invariants:  none: imports go one way, calls go both
Leaves out:  notifiers for anybody else
Read next:   mm/page_table.py; uprobes/mm_hooks.py

Always call them as module attributes: hooks.uprobe_mmap(vma).
"""

from typing import Any


def uprobe_mmap(vma: Any) -> int:
    """A VMA was mapped or changed and is in i_mmap; mmap_lock (write). Always 0."""
    return 0


def uprobe_munmap(vma: Any, start: int, end: int) -> None:
    """[start, end) of the VMA goes away or is about to change hands; mmap_lock (write)."""


def zap_pages(mm: Any, start: int, end: int) -> None:
    """[start, end) was unmapped: its page table entries go; mmap_lock (write, or downgraded). Filled by
    mm/page_table.py, as are the next two.
    """


def move_pages(mm: Any, old: int, new: int, length: int) -> None:
    """mremap moved [old, old + length) to `new`: its page table entries go along; mmap_lock (write)."""


def change_protection(vma: Any, start: int, end: int) -> None:
    """The VMA's flags changed: its page table entries allow what they say; mmap_lock and VMA (write)."""


def uprobe_start_dup_mmap() -> None:
    """A fork is about to copy mappings."""


def uprobe_end_dup_mmap() -> None:
    """The fork has copied them."""


def uprobe_dup_mmap(oldmm: Any, newmm: Any) -> None:
    """A fork begins to copy: the child will have the parent's private pages; the parent's mmap_lock
    (write).
    """


def uprobe_clear_state(mm: Any) -> None:
    """The address space ends."""
