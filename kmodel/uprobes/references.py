"""The references on a uprobe, whichever way they are counted.

Models:      kernel/events/uprobes.c, uprobe->ref at several ages; the kernel has one way at a time
Guards:      see the way that is chosen
Invariants:  U1 or what stands for it: nobody gets a reference on a uprobe that is being freed
Leaves out:  nothing of its own
Read next:   uprobes/ref_count.py (7.2), uprobes/ref_epoch.py, uprobes/ref_tree.py

    ref_count  refcount_t, one for each user. Who finds a uprobe may find a dying one: inc-not-zero
    ref_epoch  an unconditional add; who came down to zero asks under the treelock whether it still counts
    ref_tree   the tree has a reference of its own, dropped a grace period after the erase: who finds a uprobe
               finds a living one, and a plain increment will do
"""

from typing import Any, Protocol

from kmodel.uprobes import ref_count
from kmodel.uprobes.uprobe import Uprobe


class References(Protocol):
    """A way to count: a module with these functions."""

    def init(self, uprobe: Uprobe, users: int) -> None:
        """`users` references, and the tree's if it has one. Nobody else uses the uprobe."""

    def get(self, uprobe: Uprobe) -> None:
        """One more, by somebody who has one."""

    def try_get(self, uprobe: Uprobe) -> bool:
        """One more, by somebody who found the uprobe in the tree, as a reader or under the treelock."""

    def put(self, uprobe: Uprobe) -> bool:
        """Drop one; whether the caller must free the uprobe."""

    def users(self, uprobe: Uprobe) -> int:
        """How many there are, not counting the tree's."""

    def usable(self, uprobe: Uprobe) -> bool:
        """Whether a consumer may be added to a uprobe that was found in the tree. Needs register_rwsem."""

    def delete_uprobe(self, uprobe: Uprobe) -> None:
        """Called after a consumer or would-be consumer left. Needs register_rwsem held for writing."""


implementation: Any = ref_count
