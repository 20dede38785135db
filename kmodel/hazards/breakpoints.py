"""What an address space remembers of its breakpoints: flags, counted semaphores, pages that move.

Models:      kernel/events/uprobes.c, mmf_recalc_uprobes, uprobe_write_opcode, delayed_uprobe_remove (7.2);
             mm/mremap.c, copy_vma's skip_vma_uprobe
Guards:      mmap_lock; delayed_uprobe_lock
Invariants:  B2 an mm with a breakpoint says so (MMF_HAS_UPROBES)
             P12 the reference counter equals the breakpoints
             D2 no entry of the delayed list outlives its uprobe
Leaves out:  the lookup's other half; hits are of breakpoints that were removed
Read next:   uprobes/ref_ctr.py, uprobes/delayed.py
"""

import mmap as prot

from kmodel.core import current, set_bit, test_bit
from kmodel.explore import Verdict
from kmodel.fs import PAGE_SIZE, open_file
from kmodel.hazards.catalogue import Scenario, register
from kmodel.hazards.registration import (
    CODE,
    COUNTER,
    DATA,
    OFFSET,
    PLACE,
    TEXT,
    State,
    counter,
    map_data,
    map_text,
)
from kmodel.mm import (
    MMF_HAS_UPROBES,
    MMF_RECALC_UPROBES,
    mmap,
    mmap_write_lock,
    mmap_write_unlock,
    mremap,
    vma_lookup,
)
from kmodel.mm.flags import MAP_FIXED, MREMAP_FIXED, MREMAP_MAYMOVE
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.slab import fail_nth
from kmodel.uprobes import (
    UPROBE_SWBP_INSN,
    Uprobe,
    delayed,
    fetch_opcode,
    put_uprobe,
    uprobe_mmap,
    uprobe_register,
)
from kmodel.uprobes.consumer import consumer_add
from kmodel.uprobes.lookup import find_active_uprobe_rcu
from kmodel.uprobes.ref_ctr import update_ref_ctr
from kmodel.uprobes.register import alloc_uprobe, register_one_vma

# ------------------------------------------------------------------------------- H52: is there any left?


class LastRemoved(State):
    """The last breakpoint of the mm was removed: the flag still says there are some, and that it may be
    wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        map_text(self.mm, self.file)
        set_bit(MMF_HAS_UPROBES, self.mm, "flags")
        set_bit(MMF_RECALC_UPROBES, self.mm, "flags")


def late_hit(state: State) -> None:
    """A task that trapped before the removal looks for the probe: there is none, so it counts."""
    current().mm = state.mm
    rcu_read_lock_trace()
    find_active_uprobe_rcu(PLACE + 0x20)
    rcu_read_unlock_trace()


def first_again(state: State) -> None:
    """A registration comes to the mm: a uprobe in the tree, a breakpoint in the page."""
    uprobe = alloc_uprobe(state.file.f_inode, OFFSET, 0)
    assert isinstance(uprobe, Uprobe)
    consumer_add(uprobe, state.consumer)
    assert register_one_vma(uprobe, state.consumer, state.mm, PLACE) == 0


def admits_to_it(state: State) -> None:
    """B2: else the next hit is a SIGTRAP."""
    assert fetch_opcode(state.mm, PLACE) == UPROBE_SWBP_INSN
    assert test_bit(MMF_HAS_UPROBES, state.mm, "flags"), "the mm has a breakpoint, and says it has none"


register(
    Scenario(
        name="has-uprobes-recalc",
        hazards="H52",
        summary="A hit that found nothing clears MMF_HAS_UPROBES beside a registration that needs it.",
        setup=LastRemoved,
        threads=(late_hit, first_again),
        final=admits_to_it,
        without="no-recalc-lock",
        breaks="assertion",
        memory="sc",
        options={"races": False},
    )
)

# ------------------------------------------------------------------------------- H53: the delayed list


class Waiting(State):
    """A uprobe whose counter was not mapped when its breakpoint was installed, so that the increment waits.
    The code was unmapped since, and the counter is being mapped. Another probe exists.
    """

    def __init__(self) -> None:
        super().__init__()
        assert isinstance(alloc_uprobe(self.file.f_inode, OFFSET + 1, 0), Uprobe)
        uprobe = alloc_uprobe(self.file.f_inode, OFFSET, COUNTER)
        assert isinstance(uprobe, Uprobe)
        self.uprobe = uprobe
        mmap_write_lock(self.mm)
        assert update_ref_ctr(uprobe, self.mm, 1) == 0
        mmap_write_unlock(self.mm)
        map_data(self.mm, self.file)
        set_bit(MMF_HAS_UPROBES, self.mm, "flags")
        assert len(delayed.delayed_uprobe_list) == 1


def unregister(state: State) -> None:
    """The last put: there was no breakpoint to remove, so nobody dropped the entry."""
    put_uprobe(state.uprobe)


def map_the_counter(state: State) -> None:
    """The end of mmap(2): what waited for this mapping is applied, if it waits still."""
    mmap_write_lock(state.mm)
    uprobe_mmap(vma_lookup(state.mm, DATA))
    mmap_write_unlock(state.mm)


register(
    Scenario(
        name="delayed-purge",
        hazards="H53",
        summary="An increment that waits for its mapping outlives its uprobe, and is applied then.",
        setup=Waiting,
        threads=(unregister, map_the_counter),
        without="no-delayed-purge",
        breaks="use-after-free",
        memory="sc",
        options={"races": False},
    )
)

# ------------------------------------------------------------------------------- H54: a count taken back


class NoMemory(State):
    """Code and counter are mapped; there will be no memory for the page that the breakpoint needs."""

    def __init__(self) -> None:
        super().__init__()
        map_text(self.mm, self.file)
        map_data(self.mm, self.file)
        uprobe = alloc_uprobe(self.file.f_inode, OFFSET, COUNTER)
        assert isinstance(uprobe, Uprobe)
        self.uprobe = uprobe


def install_in_vain(state: State) -> None:
    """The counter is raised, then the breakpoint cannot be written: no page."""
    with fail_nth(3, cache="page"):  # the file's page, the counter's, and this one
        ret = register_one_vma(state.uprobe, state.consumer, state.mm, PLACE)
    assert ret < 0, "the installation was to fail"


def not_counted(state: State) -> None:
    """P12."""
    assert fetch_opcode(state.mm, PLACE) != UPROBE_SWBP_INSN
    assert counter(state.mm) == 0, f"no breakpoint, and the reference counter says {counter(state.mm)}"


register(
    Scenario(
        name="install-fails",
        hazards="H54",
        summary="There is no memory for a breakpoint whose reference counter was raised already.",
        setup=NoMemory,
        threads=(install_in_vain,),
        final=not_counted,
        without="no-ref-ctr-revert",
        breaks="assertion",
        memory="sc",
    )
)

# ------------------------------------------------------------------------------- H75: a page on the move


class SplitProgram(State):
    """A program of two pages whose second page is mapped elsewhere; the breakpoint is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.file = open_file("/bin/two", contents=2 * CODE)
        mmap_page(self, TEXT, 0)
        mmap_page(self, TEXT + 0x10000, 1)
        map_data(self.mm, self.file)
        uprobe = uprobe_register(self.file.f_inode, PAGE_SIZE + OFFSET, COUNTER, self.consumer)
        assert isinstance(uprobe, Uprobe)


def mmap_page(state: State, address: int, pgoff: int) -> None:
    """Map one page of code."""
    flags = prot.MAP_PRIVATE | MAP_FIXED
    mmap(state.mm, address, PAGE_SIZE, prot.PROT_READ | prot.PROT_EXEC, flags, state.file, pgoff)


def move_next_to_it(state: State) -> None:
    """The second page moves behind the first: one mapping again."""
    new = TEXT + PAGE_SIZE
    assert mremap(state.mm, TEXT + 0x10000, PAGE_SIZE, PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, new) == new


def one_breakpoint(state: State) -> None:
    """P12: the page that moved has the breakpoint, which is the one that was counted."""
    assert fetch_opcode(state.mm, TEXT + PAGE_SIZE + OFFSET) == UPROBE_SWBP_INSN
    assert counter(state.mm) == 1, f"one breakpoint, and the reference counter says {counter(state.mm)}"


register(
    Scenario(
        name="mremap-merge",
        hazards="H75",
        summary="A page with a breakpoint moves into a mapping that was just given one for it.",
        setup=SplitProgram,
        threads=(move_next_to_it,),
        final=one_breakpoint,
        without="no-skip-vma-uprobe",
        breaks="assertion",
        memory="sc",
        options={"preemptions": 0},  # one task; what else there is frees memory
        expected=Verdict.BOUNDED,
    )
)
