"""Other ways to count references on a uprobe, each with the race it was made to win.

Models:      the series of July 2024: put_uprobe with epochs, the tree's own reference, find_uprobe that takes
             a reference in a speculative lookup; percpu_rw_semaphore as treelock. None of it was merged so
Guards:      see uprobes/ref_epoch.py, uprobes/ref_tree.py
Invariants:  U3 nobody touches a freed uprobe, and one task frees it; U5 every reference that was taken is put
Leaves out:  consumers and breakpoints: unregister here is the end of the last reference
Read next:   uprobes/references.py; hazards/lifetimes.py for the same races as the kernel has them now

A scenario here runs with the parts of a scheme (uprobes/schemes.py), which its `scheme` names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from kmodel.core import READ_ONCE, boot, current
from kmodel.fs import PAGE_SHIFT, PAGE_SIZE, Inode, iget_path, open_file
from kmodel.hazards.catalogue import Scenario, register
from kmodel.hazards.speculation import map_text
from kmodel.mm import (
    MmStruct,
    mmap_lock_speculate_retry,
    mmap_lock_speculate_try_begin,
    munmap,
    vma_lookup,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock
from kmodel.sync import down_write, up_write
from kmodel.uprobes import (
    ALL_SCHEMES,
    Uprobe,
    find_refcount,
    find_rwlock,
    put_uprobe,
    references,
    uprobe_scheme,
)
from kmodel.uprobes.register import alloc_uprobe
from kmodel.uprobes.tree import check_invariants, uprobes

OFFSET = 0x10
TEXT = 0x400000


@attrs.frozen(kw_only=True)
class SchemeScenario(Scenario):
    """A scenario with another treelock, other references or another protection than the kernel's."""

    scheme: str

    @contextmanager
    def guarded(self, *, broken: bool = False, also_without: tuple[str, ...] = ()) -> Iterator[None]:
        """The guards removed, and the scheme chosen."""
        removed = Scenario.guarded(self, broken=broken, also_without=also_without)
        with removed, uprobe_scheme(ALL_SCHEMES[self.scheme]):
            try:
                yield
            finally:
                boot()  # what an execution left in the tree may be freed, and is nobody's any more


class State:
    """A file with one uprobe, to which one reference is left (and the tree's, where it has one)."""

    def __init__(self) -> None:
        boot()
        inode = iget_path("/bin/prog", size=0x1000)
        assert inode is not None
        self.inode: Inode = inode
        uprobe = alloc_uprobe(inode, OFFSET, 0)
        assert isinstance(uprobe, Uprobe)
        self.uprobe = uprobe


def use(uprobe: Uprobe) -> None:
    """What a task does with a uprobe that it thinks it may use."""
    assert uprobe.offset == OFFSET


def unregister(state: State) -> None:
    """The last consumer goes."""
    down_write(state.uprobe.register_rwsem)
    references.implementation.delete_uprobe(state.uprobe)
    up_write(state.uprobe.register_rwsem)
    put_uprobe(state.uprobe)


def last_put(state: State) -> None:
    """Only its last step."""
    put_uprobe(state.uprobe)


def final_empty(state: State) -> None:
    """Nobody has a reference, so nothing is in the tree."""
    check_invariants()
    assert uprobes() == [], "a uprobe that nobody has a reference on is still in the tree"


# ------------------------------------------------------------------------- H73: the epoch


def hit_locked(state: State) -> None:
    """A breakpoint handler of the series: find under the treelock, get, use, put."""
    uprobe = find_rwlock.find_uprobe(state.inode, OFFSET)
    if uprobe is not None:
        use(uprobe)
        put_uprobe(uprobe)


def _epoch(name: str, guard: str, summary: str, breaks: str, scheme: str, **more: Any) -> None:
    register(
        SchemeScenario(
            name=name,
            hazards="H73",
            summary=summary,
            setup=State,
            threads=(last_put, hit_locked),
            final=final_empty,
            without=guard,
            breaks=breaks,
            scheme=scheme,
            **more,
        )
    )


_epoch(
    "epoch-double-destroy",
    "no-epoch-compare",
    "One task puts 1 to 0, another 0 to 1 to 0; both see zero under the treelock, and both destroy.",
    "use-after-free",  # the second free is a callback on what the first freed
    "rwlock tree + epoch + mmap_lock",
    # The race oracle would only tell the first thing that both do to the uprobe, not what comes of it.
    options={"races": False},
)
_epoch(
    "epoch-freed-check",
    "no-epoch-section",
    "A task puts 1 to 0; another puts 0 to 1 to 0, destroys and frees; the first looks at the count.",
    "use-after-free",
    "rwlock tree + epoch + mmap_lock",
)

# ------------------------------------------------------------------------- H01: the tree's reference


def hit_rcu(state: State) -> None:
    """Find without a lock, take a reference by a plain get, use it outside of any section."""
    uprobe = find_refcount.find_uprobe(state.inode, OFFSET)
    if uprobe is not None:
        use(uprobe)
        put_uprobe(uprobe)


register(
    SchemeScenario(
        name="tree-reference",
        hazards="H01",
        summary="A lookup takes references by a plain get: the tree's own keeps them from rising from 0.",
        setup=State,
        threads=(unregister, hit_rcu),
        final=final_empty,
        without="no-tree-reference",
        breaks="use-after-free",
        options={"warnings": False},
        scheme="RCU tree + tree's reference + mmap_lock",
    )
)


# ------------------------------------------------------------------------- H22: a reference, and the bail


class Mapped:
    """A program mapped at TEXT, with a uprobe in it to which the consumer has the one reference."""

    def __init__(self) -> None:
        boot()
        self.mm = MmStruct()
        prog = open_file("/bin/prog", size=PAGE_SIZE)
        uprobe = alloc_uprobe(prog.f_inode, OFFSET, 0)
        assert isinstance(uprobe, Uprobe)
        self.uprobe = uprobe
        map_text(self.mm, prog, pages=1)


def speculate_with_reference(state: Mapped, put_on_bail: bool) -> None:
    """find_active_uprobe_speculative() around a find_uprobe() that takes a reference."""
    task = current()
    task.mm = state.mm
    rcu_read_lock(task)
    began, seq = mmap_lock_speculate_try_begin(state.mm)
    vma = vma_lookup(state.mm, TEXT + OFFSET, task) if began else None
    vm_file = READ_ONCE(vma, "vm_file") if vma is not None else None
    uprobe = None
    if vma is not None and vm_file is not None:
        offset = (vma.vm_pgoff << PAGE_SHIFT) + (TEXT + OFFSET - vma.vm_start)
        uprobe = find_refcount.find_uprobe(vm_file.f_inode, offset)
        if uprobe is not None and mmap_lock_speculate_retry(state.mm, seq):
            if put_on_bail:
                put_uprobe(uprobe)
            uprobe = None
    rcu_read_unlock(task)
    if uprobe is not None:
        use(uprobe)
        put_uprobe(uprobe)


def hit_bails(state: Mapped) -> None:
    """What is found and then not believed is put."""
    speculate_with_reference(state, True)


def hit_leaks(state: Mapped) -> None:
    """What is not believed is forgotten, with its reference."""
    speculate_with_reference(state, False)


def unmap(state: Mapped) -> None:
    """Another task unmaps the program."""
    munmap(state.mm, TEXT, PAGE_SIZE)


def final_balanced(state: Mapped) -> None:
    """Nobody but the consumer has a reference."""
    left = references.implementation.users(state.uprobe)
    assert left == 1, f"{left - 1} reference was taken and never put: the uprobe will never be freed"


register(
    Scenario(
        name="speculation-reference-leak",
        hazards="H22",
        summary="A speculative lookup that took a reference is told to retry, and forgets to put it.",
        setup=Mapped,
        threads=(hit_bails, unmap),
        broken_threads=(hit_leaks, unmap),
        final=final_balanced,
        breaks="assertion",
        memory="sc",
        options={"races": False},
    )
)
