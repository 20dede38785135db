"""What mmap, munmap, split, merge and fork do to breakpoints and to the flags of an address space."""

import errno
from typing import Any

from kmodel.core import smp_cond_load_acquire, test_bit
from kmodel.fs import PAGE_SIZE
from kmodel.mm import (
    MMF_HAS_UPROBES,
    MMF_RECALC_UPROBES,
    VM_DONTCOPY,
    MmStruct,
    fork,
    hooks,
    mmap_write_lock,
    mmap_write_unlock,
    munmap,
    vm_flags_set,
    vma_lookup,
)
from kmodel.mm.page_table import anon_pages
from kmodel.uprobes import lifetime, uprobe_unregister
from tests.uprobes.stories import Gate, both_engines
from tests.uprobes.world import (
    CODE,
    TEXT,
    hit,
    map_data,
    map_text,
    new_file,
    not_in,
    opcode,
    recorder,
    registered,
)

INT3 = 0xCC


def test_a_new_mapping_gets_its_breakpoints() -> None:
    """mmap of a probed file installs what lies in its range, and nothing else (P9)."""
    mm = MmStruct()
    file = new_file()
    registered(file, 0x10)
    registered(file, PAGE_SIZE + 0x10)
    map_text(mm, file, pages=1, pgoff=1)

    assert opcode(mm, TEXT + 0x10) == INT3
    assert opcode(mm, TEXT + 0x11) == CODE[0x1011]
    assert test_bit(MMF_HAS_UPROBES, mm, "flags")


def test_a_new_mapping_respects_filters() -> None:
    """mmap asks all consumers; if none wants the mm, nothing is installed."""
    mm = MmStruct()
    file = new_file()
    registered(file, 0x10, recorder(filter=not_in, not_in=mm))
    map_text(mm, file)

    assert opcode(mm, TEXT + 0x10) == CODE[0x10]


def test_writable_and_shared_mappings_get_none() -> None:
    """Only private mappings that may be executed and are not writable are probed (valid_vma)."""
    mm = MmStruct()
    file = new_file()
    registered(file, 0x10)
    map_data(mm, file, TEXT)

    assert opcode(mm, TEXT + 0x10) == CODE[0x10]


def test_an_unprobeable_instruction_does_not_fail_mmap() -> None:
    """Errors of uprobe_mmap are ignored: its callers could do nothing about them."""
    mm = MmStruct()
    file = new_file("/bin/debugged", b"\xcc" * PAGE_SIZE)
    registered(file, 0)

    assert map_text(mm, file, pages=1) == TEXT
    assert not test_bit(MMF_HAS_UPROBES, mm, "flags")


def test_unmapping_drops_private_copies_and_asks_for_a_recount() -> None:
    """After munmap the breakpoint is gone with its page; the next miss clears MMF_HAS_UPROBES (H52)."""
    mm = MmStruct()
    file = new_file()
    map_text(mm, file)
    uc = recorder()
    uprobe = registered(file, 0x10, uc)
    munmap(mm, TEXT, PAGE_SIZE)

    assert test_bit(MMF_RECALC_UPROBES, mm, "flags")
    assert opcode(mm, TEXT + 0x10) == -errno.EFAULT
    uprobe_unregister(uprobe, uc)
    lifetime.wait_for_frees()
    map_text(mm, file)
    assert opcode(mm, TEXT + 0x10) == CODE[0x10], "an old private copy came back"

    hit(mm, TEXT + 0x1000)
    assert not test_bit(MMF_HAS_UPROBES, mm, "flags")


def test_a_mapping_over_a_probed_one_replaces_its_pages() -> None:
    """MAP_FIXED over a probed page shows the new file, with the new file's breakpoints."""
    mm = MmStruct()
    one, two = new_file("/bin/one"), new_file("/bin/two", b"\xc3" * 2 * PAGE_SIZE)
    map_text(mm, one)
    registered(one, 0x10)
    registered(two, 0x20)
    map_text(mm, two)

    assert (opcode(mm, TEXT + 0x10), opcode(mm, TEXT + 0x20)) == (0xC3, INT3)


def test_splitting_a_probed_mapping_keeps_its_breakpoints() -> None:
    """Unmapping a neighbour page splits the VMA; private copies of the rest stay."""
    mm = MmStruct()
    file = new_file("/bin/three", CODE + CODE)
    map_text(mm, file, pages=4)
    registered(file, 0x10)
    registered(file, 3 * PAGE_SIZE + 0x10)
    munmap(mm, TEXT + PAGE_SIZE, PAGE_SIZE)

    assert opcode(mm, TEXT + 0x10) == INT3
    assert opcode(mm, TEXT + 3 * PAGE_SIZE + 0x10) == INT3


def test_a_child_inherits_breakpoints_but_not_those_of_mappings_left_out() -> None:
    """Forking copies private pages and MMF_HAS_UPROBES, and asks for a recount (H48)."""
    parent = MmStruct()
    one, two = new_file("/bin/one"), new_file("/bin/two")
    map_text(parent, one)
    map_text(parent, two, TEXT + 0x10000)
    registered(one, 0x10)
    registered(two, 0x20)
    mmap_write_lock(parent)
    vm_flags_set(vma_lookup(parent, TEXT + 0x10000), VM_DONTCOPY)
    mmap_write_unlock(parent)

    child = fork(parent)

    assert sorted(anon_pages(child)) == [TEXT]
    assert opcode(child, TEXT + 0x10) == INT3
    assert test_bit(MMF_HAS_UPROBES, child, "flags")
    assert test_bit(MMF_RECALC_UPROBES, child, "flags")


class Fork:
    """A fork holds dup_mmap_sem while a registration wants to begin."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.gate = Gate()
        self.mm = MmStruct()
        self.file = new_file()
        map_text(self.mm, self.file)


def forks(story: Fork) -> None:
    hooks.uprobe_start_dup_mmap()
    story.gate.open()
    for _ in range(5):
        hooks.uprobe_dup_mmap(story.mm, MmStruct())
    assert opcode(story.mm, TEXT + 0x10) == CODE[0x10], "a breakpoint appeared during the fork"
    hooks.uprobe_end_dup_mmap()


def registers(story: Fork) -> None:
    smp_cond_load_acquire(story.gate.at, "opened", bool)
    registered(story.file, 0x10)


@both_engines
def test_a_registration_waits_for_a_fork(run: Any) -> None:
    """dup_mmap_sem keeps register's scan out until the fork has linked its mappings (H48)."""
    story = run(Fork, [forks, registers])

    assert opcode(story.mm, TEXT + 0x10) == INT3


def test_private_pages_move_with_their_mapping() -> None:
    """The mm hook for mremap takes the copies along."""
    mm = MmStruct()
    file = new_file()
    map_text(mm, file)
    registered(file, PAGE_SIZE + 0x10)
    mmap_write_lock(mm)
    hooks.move_pages(mm, TEXT, 0x900000, 2 * PAGE_SIZE)
    mmap_write_unlock(mm)

    assert sorted(anon_pages(mm)) == [0x900000 + PAGE_SIZE]
