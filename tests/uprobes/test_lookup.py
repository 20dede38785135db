"""The speculative lookup in five stories, the slow path behind it, and what a removed recheck lets
through.
"""

import errno
from typing import Any

import pytest

from kmodel.core import current, guards, test_bit
from kmodel.fs import fput
from kmodel.mm import MMF_HAS_UPROBES, MMF_RECALC_UPROBES, PAGE_SIZE, MmStruct, munmap
from kmodel.rcu import rcu_read_lock_trace, rcu_read_unlock_trace
from kmodel.uprobes import (
    find_active_uprobe_rcu,
    find_active_uprobe_speculative,
    lifetime,
    lookup,
    tree,
    uprobe_unregister,
)
from tests.uprobes.stories import Gate, both_engines, coop_seeds, stop_after, stop_before
from tests.uprobes.world import TEXT, map_text, new_file, recorder, registered


class Story:
    """One program mapped at TEXT with a probe at offset 0x10, a second file with a probe at the same
    offset.
    """

    last: "Story"

    def __init__(self) -> None:
        self.gate = Gate()
        self.mm = MmStruct()
        self.file = new_file("/bin/one")
        self.other = new_file("/bin/two")
        map_text(self.mm, self.file)
        self.uc = recorder()
        self.uprobe = registered(self.file, 0x10, self.uc)
        self.other_uprobe = registered(self.other, 0x10)
        self.found: Any = "not looked"
        self.slow: Any = "not looked"
        self.reused: Any = None
        self.mapped = 0.0
        Story.last = self


def gate() -> Gate:
    return Story.last.gate


def speculate(mm: MmStruct, addr: int) -> Any:
    current().mm = mm
    rcu_read_lock_trace()
    found = find_active_uprobe_speculative(addr)
    rcu_read_unlock_trace()
    return found


def look_up(mm: MmStruct, addr: int) -> Any:
    current().mm = mm
    rcu_read_lock_trace()
    found = find_active_uprobe_rcu(addr)
    rcu_read_unlock_trace()
    return found


def reader(story: Story) -> None:
    story.found = speculate(story.mm, TEXT + 0x10)


# -------------------------------------------------------------------- 1 and 2: nothing happens meanwhile


@both_engines
def test_hit(run: Any) -> None:
    """An undisturbed lookup finds the uprobe of the mapped byte."""
    story = run(Story, [reader])

    assert story.found is story.uprobe


@both_engines
def test_no_vma(run: Any) -> None:
    """Where nothing is mapped speculation says nothing, and the slow path -EFAULT."""

    def setup() -> Story:
        story = Story()
        munmap(story.mm, TEXT, 2 * PAGE_SIZE)
        return story

    def slow(story: Story) -> None:
        story.slow = look_up(story.mm, TEXT + 0x10)

    story = run(setup, [reader, slow])

    assert story.found is None
    assert story.slow == (None, -errno.EFAULT)


def test_offsets_are_those_of_the_mapping() -> None:
    """The byte looked for is the one the VMA maps there, also with a page offset and after a split."""
    mm = MmStruct()
    file = new_file()
    map_text(mm, file, TEXT, pages=1, pgoff=1)
    map_text(mm, file, TEXT + 0x10000, pages=2)
    uprobe = registered(file, PAGE_SIZE + 5)
    munmap(mm, TEXT + 0x10000, PAGE_SIZE)

    assert speculate(mm, TEXT + 5) is uprobe
    assert speculate(mm, TEXT + 0x10000 + PAGE_SIZE + 5) is uprobe
    assert speculate(mm, TEXT + 6) is None
    assert speculate(mm, TEXT + 0x10000 + 5) is None


def test_anonymous_memory_has_no_uprobes() -> None:
    """A VMA without a file ends the speculation; the slow path reports the byte that is there."""
    from kmodel.mm import mmap
    from tests.uprobes.world import MAP_FIXED, prot

    mm = MmStruct()
    registered(new_file(), 0)
    mmap(mm, TEXT, PAGE_SIZE, prot.PROT_READ, prot.MAP_PRIVATE | prot.MAP_ANONYMOUS | MAP_FIXED)

    assert speculate(mm, TEXT) is None
    assert look_up(mm, TEXT) == (None, 0)


# -------------------------------------------------------------------- 3 and 4: the mapping changes meanwhile


def unmapper(story: Story) -> None:
    story.gate.wait()
    munmap(story.mm, TEXT, 2 * PAGE_SIZE)
    story.gate.open()


def remapper(story: Story) -> None:
    """Put the other file where the reader looks, and let go of the first."""
    story.gate.wait()
    map_text(story.mm, story.other)
    story.gate.open()


@both_engines
def test_munmap_between_begin_and_retry(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A uprobe found through a mapping that went away meanwhile is not believed (H10)."""
    stop_before(monkeypatch, lookup, "mmap_lock_speculate_retry", gate)
    story = run(Story, [reader, unmapper])

    assert story.found is None


@both_engines
def test_without_the_final_retry_an_unmapped_probe_is_found(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """no-final-retry: the lookup returns the uprobe of a mapping that is gone (H10)."""
    stop_before(monkeypatch, lookup, "mmap_lock_speculate_retry", gate)
    with guards.without("no-final-retry"):
        story = run(Story, [reader, unmapper])

    assert story.found is story.uprobe


def file_reuser(story: Story) -> None:
    """Nothing is mapped at TEXT any more. The struct file becomes /bin/two, the VMA one of another address
    space.
    """
    story.gate.wait()
    munmap(story.mm, TEXT, 2 * PAGE_SIZE)
    fput(story.file)
    story.reused = new_file("/bin/two")
    map_text(MmStruct(), new_file("/bin/three"))
    story.gate.open()


@both_engines
def test_vm_file_reused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vm_file whose memory became another open file leads to a wrong inode, and the recheck throws that
    away (H11).
    """
    stop_after(monkeypatch, lookup, "READ_ONCE", gate)
    story = run(Story, [reader, file_reuser])

    assert story.reused is story.file
    assert story.found is None


@both_engines
def test_without_the_final_retry_a_reused_file_gives_the_wrong_probe(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """no-final-retry: the uprobe of the file that moved into the struct is returned (H11)."""
    stop_after(monkeypatch, lookup, "READ_ONCE", gate)
    with guards.without("no-final-retry"):
        story = run(Story, [reader, file_reuser])

    assert story.reused is story.file
    assert story.found is story.other_uprobe


# -------------------------------------------------------------------- 5: hidden by a rotation


def rotating() -> Story:
    """In tree order 0x20, then our 0x30 to its right; adding 0x40 rotates ours above 0x20."""
    story = Story.__new__(Story)
    story.gate = Gate()
    story.mm = MmStruct()
    story.file = new_file("/bin/one")
    map_text(story.mm, story.file)
    registered(story.file, 0x20)
    story.uprobe = registered(story.file, 0x30)
    Story.last = story
    return story


def rotation_reader(story: Story) -> None:
    story.found = speculate(story.mm, TEXT + 0x30)


rotation_reader.__name__ = "reader"


def rotator(story: Story) -> None:
    story.gate.wait()
    registered(story.other if hasattr(story, "other") else new_file("/bin/one"), 0x40)


def inserter(story: Story) -> None:
    """Insert 0x40 into the tree only: a registration would move mm_lock_seq as well."""
    from tests.uprobes.test_tree import insert

    story.gate.wait()
    insert(story.file.f_inode, 0x40)
    story.gate.open()


@both_engines
@pytest.mark.parametrize("guard", [None, "no-seqcount-retry"])
def test_node_hidden_by_a_rotation(run: Any, guard: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit whose node a rotation hides is still found, by the seqcount retry alone (H03)."""
    compare = tree.uprobe_cmp_key

    def stopping(key: Any, node: Any) -> int:
        result = compare(key, node)
        if current().comm == "reader" and node.offset == 0x20:
            gate().stop()
        return result

    monkeypatch.setattr(tree, "uprobe_cmp_key", stopping)
    with guards.without(*([guard] if guard else [])):
        story = run(rotating, [rotation_reader, inserter])

    assert story.found is (None if guard else story.uprobe)


# -------------------------------------------------------------------- by chance instead of by story


def chance_reader(story: Story) -> None:
    """A probe may be missed by speculation, but never mistaken for another mapping's."""
    for _ in range(3):
        story.found = speculate(story.mm, TEXT + 0x10)
        assert story.found in (None, story.uprobe, story.other_uprobe)


def exact_reader(story: Story) -> None:
    """While the mapping at TEXT alternates, what is found must match what was mapped at some moment of the
    lookup.
    """
    before = story.mapped
    found = speculate(story.mm, TEXT + 0x10)
    after = story.mapped
    if found is not None and before == after:
        expected = story.uprobe if before % 2 == 0 else story.other_uprobe
        assert found is expected, "the probe of another mapping"


def test_speculation_beside_remapping_finds_only_what_was_mapped() -> None:
    """Under many schedules an accepted speculation is right (P1)."""

    def setup() -> Story:
        story = Story()
        story.mapped = 0
        return story

    def alternating(story: Story) -> None:
        for n in (1, 2):
            story.mapped += 0.5
            map_text(story.mm, story.other if n % 2 else story.file)
            story.mapped += 0.5

    coop_seeds(setup, [chance_reader, exact_reader, alternating], seeds=range(20))


# -------------------------------------------------------------------- the slow path


def test_the_slow_path_is_taken_while_a_writer_is_inside() -> None:
    """With an odd mm_lock_seq speculation gives up at once."""
    from kmodel.mm import mmap_write_lock, mmap_write_unlock

    story = Story()
    mmap_write_lock(story.mm)
    assert speculate(story.mm, TEXT + 0x10) is None
    mmap_write_unlock(story.mm)

    assert speculate(story.mm, TEXT + 0x10) is story.uprobe
    assert look_up(story.mm, TEXT + 0x10) == (story.uprobe, 0)


def test_a_foreign_breakpoint_is_told_from_a_removed_one() -> None:
    """is_swbp is 1 where the file itself holds int3 and 0 where another instruction is."""
    mm = MmStruct()
    map_text(mm, new_file("/bin/debugged", b"\x90\xcc" * 2048))

    assert look_up(mm, TEXT) == (None, 0)
    assert look_up(mm, TEXT + 1) == (None, 1)


def test_a_miss_recounts_the_breakpoints() -> None:
    """After the last unregister RECALC is set; the next miss clears both flags (H52)."""
    story = Story()
    uprobe_unregister(story.uprobe, story.uc)
    assert test_bit(MMF_HAS_UPROBES, story.mm, "flags")
    assert test_bit(MMF_RECALC_UPROBES, story.mm, "flags")
    lifetime.wait_for_frees()

    assert look_up(story.mm, TEXT + 0x10) == (None, 0)
    assert not test_bit(MMF_HAS_UPROBES, story.mm, "flags")
    assert not test_bit(MMF_RECALC_UPROBES, story.mm, "flags")


def test_a_recount_keeps_the_flag_while_a_probe_is_left() -> None:
    """With another probe in a mapping HAS_UPROBES stays."""
    story = Story()
    registered(story.file, 0x20)
    uprobe_unregister(story.uprobe, story.uc)
    lifetime.wait_for_frees()

    assert look_up(story.mm, TEXT + 0x10)[1] == 0
    assert test_bit(MMF_HAS_UPROBES, story.mm, "flags")
    assert not test_bit(MMF_RECALC_UPROBES, story.mm, "flags")
