"""struct uprobe: one probed place, named by (inode, offset).

Models:      kernel/events/uprobes.c, struct uprobe (7.2)
Guards:      see the groups of fields; inode, offset and ref_ctr_offset never change between allocation and
             free
Invariants:  U1 ref never goes from 0 to 1, U2 keys are unique in uprobes_tree, U3 freed only after both grace
             periods
Leaves out:  nothing of the struct; `rcu` and `work`, which share memory in the kernel, are one field `work`
Read next:   uprobes/tree.py, then uprobes/lifetime.py
"""

from typing import Any, Final

from kmodel.core import atomic, embedded, field, kernel_struct
from kmodel.rcu import INIT_LIST_HEAD, RB_CLEAR_NODE, ListHead, RbNode
from kmodel.sync import RwSemaphore
from kmodel.uprobes.arch import ArchUprobe

UPROBE_COPY_INSN: Final = 0
"""Bit of `flags`: arch.insn holds the original instruction and it was analysed."""


@kernel_struct
class Uprobe(RbNode):
    """One probed place. It is its own tree node (rb_node at offset zero, so container_of is the identity)."""

    # constant from allocation to free; read by lockless descents, hence watched: H05 is about seeing them
    # unset
    inode: Any = None
    offset: int = 0
    ref_ctr_offset: int = 0

    # live consumers, plus whoever holds the uprobe across something no grace period covers
    ref: int = atomic(default=0)

    # outer lock: register, unregister and apply write it; removal asked for by a handler reads it
    register_rwsem: RwSemaphore = embedded(factory=RwSemaphore)
    # inner lock: writers of `consumers`, prepare_uprobe; filter_chain reads it
    consumer_rwsem: RwSemaphore = embedded(factory=RwSemaphore)

    # write: consumer_rwsem; read: that, or an RCU tasks trace reader
    consumers: ListHead = embedded(factory=ListHead)

    # bit UPROBE_COPY_INSN, set once under consumer_rwsem
    flags: int = atomic(default=0)
    arch: ArchUprobe = embedded(factory=ArchUprobe)

    # whose turn it is in its end: the work item of the deferred free, then the function of its rcu_head (a
    # union)
    work: Any = field(default=None)


def init_uprobe(uprobe: Uprobe, inode: Any, offset: int, ref_ctr_offset: int) -> None:
    """Initialise a uprobe that nobody else can see yet; everything but its first reference."""
    uprobe.inode = inode
    uprobe.offset = offset
    uprobe.ref_ctr_offset = ref_ctr_offset
    uprobe.flags = 0
    INIT_LIST_HEAD(uprobe.consumers)
    RB_CLEAR_NODE(uprobe)
