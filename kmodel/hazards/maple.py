"""The maple tree: a lookup inside a node that a writer replaces, and whose words are used for something else.

Models:      lib/maple_tree.c, mtree_load beside mas_store (7.2)
Guards:      RCU keeps the node's memory; a node that left the tree is its own parent
Invariants:  W1 for one index a lookup returns what was stored there at some moment during the lookup
Leaves out:  trees of more than one level
Read next:   mm/maple_node.py, ma_dead_node() and ma_free_rcu()
"""

import mmap as prot
from typing import Any

from kmodel.core import boot
from kmodel.hazards.catalogue import Scenario, register
from kmodel.mm import MAP_FIXED, PAGE_SIZE, MmStruct, mmap, munmap, vma_lookup

LOW = 0x100000
HIGH = 0x900000


class State:
    """Two mappings far from each other; the tree is one leaf."""

    def __init__(self) -> None:
        boot()
        self.mm = MmStruct()
        for address in (LOW, HIGH):
            flags = prot.MAP_PRIVATE | prot.MAP_ANONYMOUS | MAP_FIXED
            mmap(self.mm, address, PAGE_SIZE, prot.PROT_READ | prot.PROT_WRITE, flags)
        self.low: Any = vma_lookup(self.mm, LOW)
        self.high: Any = vma_lookup(self.mm, HIGH)


def unmap_low(state: State) -> None:
    """The leaf is replaced by one without LOW; the old one is marked dead and queued to be freed."""
    munmap(state.mm, LOW, PAGE_SIZE)


def look_up_high(state: State) -> None:
    """HIGH is mapped before and after."""
    found = vma_lookup(state.mm, HIGH)
    assert found is state.high, "the mapping at HIGH is in the tree, and the lookup returns something else"


def _maple(name: str, guard: str, summary: str, memory: str) -> None:
    register(
        Scenario(
            name=name,
            hazards="H42",
            summary=summary,
            setup=State,
            threads=(look_up_high, unmap_low),
            without=guard,
            breaks="assertion",
            memory=memory,
            options={"races": False},
        )
    )


_maple(
    "maple-dead-check",
    "no-maple-dead-check",
    "A lookup believes what it finds in a node that was replaced, and whose first words are an rcu_head.",
    "sc",
)
_maple(
    "maple-dead-wmb",
    "no-maple-dead-wmb",
    "A lookup sees the reused words of a dead node, and does not see that it is dead.",
    "lkmm",
)
