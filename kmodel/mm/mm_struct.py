"""mm_struct: one address space.

Models:      include/linux/mm_types.h, struct mm_struct; include/linux/sched/mm.h, mmgrab / mmdrop / mmget;
             kernel/fork.c, mm_init (7.2)
Guards:      see the groups of fields
Invariants:  M1 mm_count reaches 0 after mm_users did (the users together hold one count), and then nobody
             touches the struct any more
Leaves out:  contexts, notifiers, RLIMITs
Read next:   mm/mmap_lock.py; mm/page_table.py; mm/fork.py for mm_alloc and mmput
"""

from typing import Any

from kmodel.core import (
    Pooled,
    atomic,
    atomic_dec_and_test,
    atomic_inc,
    atomic_inc_not_zero,
    embedded,
    initcall,
    kernel_struct,
    kfree,
    untraced,
)
from kmodel.mm.flags import DEFAULT_MMAP_BASE
from kmodel.mm.maple_node import MapleTree
from kmodel.mm.page_table import PageTable, check_mm
from kmodel.slab import KmemCache, kmem_cache_create, kmem_cache_free
from kmodel.sync import Rcuwait, RwSemaphore, Seqcount

sysctl_max_map_count = 65530


@kernel_struct
class UprobesState(Pooled):
    """struct uprobes_state: what uprobes/ keeps for each address space."""

    # published under mmap_lock (write), with release; read with READ_ONCE
    xol_area: Any = None


@kernel_struct
class MmStruct(Pooled):
    """An address space (struct mm_struct). `MmStruct()` and mm_alloc() give an empty one with one user."""

    mmap_lock: RwSemaphore = embedded(factory=RwSemaphore)
    # odd: write-locked. A VMA whose vm_lock_seq equals it is write-locked too. Written under mmap_lock
    # (write)
    mm_lock_seq: Seqcount = embedded(factory=Seqcount)
    # the one VMA writer that waits for readers; callers serialise by mmap_lock (write)
    vma_writer_wait: Rcuwait = embedded(factory=Rcuwait)

    # write: mmap_lock; read: mmap_lock, or RCU with a recheck
    mm_mt: MapleTree = embedded(factory=MapleTree)

    # page tables and RSS counters, with a lock of their own
    pgd: PageTable = embedded(factory=PageTable)

    # tasks that use the address space; together they hold one mm_count
    mm_users: int = atomic(default=1)
    # references to the struct
    mm_count: int = atomic(default=1)
    # MMF_* bits
    flags: int = atomic(default=0)

    # write: mmap_lock (write)
    map_count: int = 0
    total_vm: int = 0
    def_flags: int = 0
    mmap_base: int = DEFAULT_MMAP_BASE
    start_brk: int = 0
    brk: int = 0
    start_stack: int = 0
    # x86: the vsyscall page's VMA, which is in no tree; constant, None without one
    gate_vma: Any = untraced(default=None)

    # uprobes/'s
    uprobes_state: UprobesState = embedded(factory=UprobesState)

    __hash__ = object.__hash__

    def __attrs_post_init__(self) -> None:
        self.mm_mt.ma_external_lock = self.mmap_lock

    @classmethod
    def from_proc_maps(cls, path_or_pid: Any) -> "MmStruct":
        """The address space that a /proc/PID/maps text describes (see mm/from_proc_maps.py)."""
        from kmodel.mm.from_proc_maps import load_proc_maps

        return load_proc_maps(path_or_pid)


mm_cachep: KmemCache


@initcall
def mm_cache_init() -> None:
    """Create the cache of address spaces."""
    global mm_cachep
    mm_cachep = kmem_cache_create("mm_struct", MmStruct)


def mm_init(mm: MmStruct) -> MmStruct:
    """What zeroed memory does not give: the tree's lock."""
    mm.mm_mt.ma_external_lock = mm.mmap_lock
    return mm


# ------------------------------------------------------------------------------------------------ references


def mmgrab(mm: MmStruct) -> None:
    """Keep the struct, not its mappings. The caller holds a reference, or a count on one of its VMAs."""
    atomic_inc(mm, "mm_count")


def mmdrop(mm: MmStruct) -> None:
    """Give up a reference to the struct; the last one frees it. Not inside an RCU reader: it may sleep."""
    if atomic_dec_and_test(mm, "mm_count"):
        __mmdrop(mm)


def __mmdrop(mm: MmStruct) -> None:
    check_mm(mm)
    if mm._k_slab is None:
        kfree(mm)  # built by MmStruct()
    else:
        kmem_cache_free(mm_cachep, mm)


def mmget(mm: MmStruct) -> None:
    """Become a user of the address space. The caller is one, or knows of one."""
    atomic_inc(mm, "mm_users")


def mmget_not_zero(mm: MmStruct) -> bool:
    """Become a user unless the last one is gone and the mappings are being torn down."""
    return atomic_inc_not_zero(mm, "mm_users")
