"""Reference counters in the probed program: counted per breakpoint, put off until mapped, purged in time."""

from typing import Any

import pytest

from kmodel.core import UseAfterFree, guards
from kmodel.fs import PAGE_SIZE
from kmodel.mm import MmStruct, munmap
from kmodel.uprobes import breakpoint as breakpoints
from kmodel.uprobes import delayed, lifetime, uprobe_register, uprobe_unregister
from kmodel.uprobes.ref_ctr import read_ref_ctr
from tests.uprobes.stories import assert_warned
from tests.uprobes.world import TEXT, map_data, map_text, new_file, recorder, registered

DATA = 0x600000
CODE_AND_DATA = b"\x90" * PAGE_SIZE + bytes(PAGE_SIZE)
CTR = PAGE_SIZE + 0x20


@pytest.fixture
def file() -> Any:
    return new_file("/bin/sdt", CODE_AND_DATA)


def counter(mm: MmStruct) -> int | None:
    from kmodel.mm import mmap_read_lock, mmap_read_unlock, vma_lookup

    mmap_read_lock(mm)
    value = read_ref_ctr(vma_lookup(mm, DATA), DATA + 0x20)
    mmap_read_unlock(mm)
    return value


def map_ctr(mm: MmStruct, file: Any) -> None:
    map_data(mm, file, DATA, pages=1, pgoff=1)


def test_the_counter_is_the_number_of_breakpoints(file: Any) -> None:
    """One per installed breakpoint that names it, whatever the number of consumers (P12)."""
    mm = MmStruct()
    map_text(mm, file, pages=1)
    map_ctr(mm, file)
    one, two, three = recorder(), recorder(), recorder()

    first = registered(file, 0x10, one, CTR)
    registered(file, 0x10, two, CTR)
    other = registered(file, 0x20, three, CTR)
    assert counter(mm) == 2

    uprobe_unregister(first, one)
    assert counter(mm) == 2
    uprobe_unregister(first, two)
    assert counter(mm) == 1
    uprobe_unregister(other, three)
    assert counter(mm) == 0


def test_an_increment_waits_for_its_mapping(file: Any) -> None:
    """If the counter is not mapped yet, the increment is delayed until it is (P12)."""
    mm = MmStruct()
    map_text(mm, file, pages=1)
    registered(file, 0x10, ref_ctr_offset=CTR)
    assert len(delayed.delayed_uprobe_list) == 1

    map_ctr(mm, file)
    assert counter(mm) == 1
    assert delayed.delayed_uprobe_list == []


def test_an_unregister_takes_a_waiting_increment_back(file: Any) -> None:
    """Removing the breakpoint drops the delayed entry."""
    mm = MmStruct()
    map_text(mm, file, pages=1)
    uc = recorder()
    uprobe_unregister(registered(file, 0x10, uc, CTR), uc)

    assert delayed.delayed_uprobe_list == []


@pytest.mark.parametrize("guard", [None, "no-delayed-purge"])
def test_a_waiting_increment_does_not_outlive_its_uprobe(file: Any, guard: str | None) -> None:
    """If the code was unmapped before the unregister, the deferred free purges the entry; else it dangles
    (H53).
    """
    mm = MmStruct()
    map_text(mm, file, pages=1)
    uc = recorder()
    uprobe = registered(file, 0x10, uc, CTR)
    munmap(mm, TEXT, PAGE_SIZE)
    with guards.without(*([guard] if guard else [])):
        uprobe_unregister(uprobe, uc)
        lifetime.wait_for_frees()

    if guard is None:
        assert delayed.delayed_uprobe_list == []
        map_ctr(mm, file)
        assert counter(mm) == 0
    else:
        registered(file, 0x20)  # so that uprobe_mmap has a reason to look
        with pytest.raises(UseAfterFree):
            map_ctr(mm, file)


def test_the_counter_never_becomes_negative(file: Any) -> None:
    """A program that zeroed its counter makes the removal fail, with a warning, and the breakpoint stays."""
    mm = MmStruct()
    map_text(mm, file, pages=1)
    map_ctr(mm, file)
    uc = recorder()
    uprobe = registered(file, 0x10, uc, CTR)
    from kmodel.mm import mmap_write_lock, mmap_write_unlock, vma_lookup
    from kmodel.uprobes.pages import write_page

    mmap_write_lock(mm)
    assert write_page(vma_lookup(mm, DATA), DATA + 0x20, b"\0\0") == 0
    mmap_write_unlock(mm)

    uprobe_unregister(uprobe, uc)
    assert_warned("reference counter")
    assert counter(mm) == 0


def test_a_failed_write_takes_the_count_back(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the breakpoint cannot be written after the counter was raised, the counter is lowered again
    (H54).
    """
    mm = MmStruct()
    map_text(mm, file, pages=1)
    map_ctr(mm, file)
    write = breakpoints.write_page

    def no_breakpoints(vma: Any, vaddr: int, data: bytes) -> int:
        return -14 if data == b"\xcc" else write(vma, vaddr, data)

    monkeypatch.setattr(breakpoints, "write_page", no_breakpoints)
    assert uprobe_register(file.f_inode, 0x10, CTR, recorder()) == -14
    assert counter(mm) == 0


@pytest.mark.parametrize("guard", [None, "no-verify-opcode"])
def test_one_breakpoint_counts_once(file: Any, guard: str | None) -> None:
    """A second consumer finds the breakpoint installed and counts nothing; without verify_opcode it does
    (H54, P12).
    """
    mm = MmStruct()
    map_text(mm, file, pages=1)
    map_ctr(mm, file)
    with guards.without(*([guard] if guard else [])):
        registered(file, 0x10, ref_ctr_offset=CTR)
        registered(file, 0x10, ref_ctr_offset=CTR)

    assert counter(mm) == (2 if guard else 1)
