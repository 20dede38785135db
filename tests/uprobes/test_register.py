"""Registration: what is refused, where breakpoints appear and go, rollback, filters, and races with mmap."""

import errno
from typing import Any

import pytest

from kmodel.core import current, guards, is_freed, test_bit
from kmodel.fs import PAGE_SIZE, empty_aops, open_file, shmem_aops
from kmodel.mm import MMF_HAS_UPROBES, MmStruct, munmap
from kmodel.mm.page_table import anon_pages
from kmodel.slab import fail_nth
from kmodel.sync import refcount_read
from kmodel.uprobes import (
    Uprobe,
    UprobeConsumer,
    lifetime,
    register,
    tree,
    uprobe_apply,
    uprobe_register,
    uprobe_unregister,
    uprobe_unregister_nosync,
    uprobe_unregister_sync,
)
from kmodel.uprobes import (
    breakpoint as breakpoints,
)
from kmodel.uprobes.arch import ENOTSUPP
from tests.uprobes.stories import Gate, assert_warned, both_engines, coop_seeds
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


# ------------------------------------------------------------------------------ refusals


def test_a_consumer_without_handlers_is_refused() -> None:
    """-EINVAL without handler and ret_handler; a ret_handler alone is enough."""
    file = new_file()

    assert uprobe_register(file.f_inode, 0, 0, UprobeConsumer()) == -errno.EINVAL
    assert isinstance(uprobe_register(file.f_inode, 0, 0, UprobeConsumer(ret_handler=print)), Uprobe)


def test_a_file_that_cannot_be_read_is_refused() -> None:
    """-EIO for a mapping that has no read_folio and is not shmem; shmem is fine."""
    device = open_file("/dev/null", size=PAGE_SIZE, a_ops=empty_aops)
    tmpfs = open_file("/tmp/prog", contents=CODE, a_ops=shmem_aops)

    assert uprobe_register(device.f_inode, 0, 0, recorder()) == -errno.EIO
    assert isinstance(uprobe_register(tmpfs.f_inode, 0, 0, recorder()), Uprobe)


def test_an_offset_past_the_end_is_refused() -> None:
    """-EINVAL past the end; exactly at the end is accepted as long as nobody maps it."""
    file = new_file()

    assert uprobe_register(file.f_inode, len(CODE) + 1, 0, recorder()) == -errno.EINVAL
    assert isinstance(uprobe_register(file.f_inode, len(CODE), 0, recorder()), Uprobe)


def test_an_odd_reference_counter_is_refused() -> None:
    """-EINVAL for a ref_ctr_offset that a short could not have."""
    assert uprobe_register(new_file().f_inode, 0, 0x801, recorder()) == -errno.EINVAL


def test_one_place_has_one_reference_counter() -> None:
    """-EINVAL for another ref_ctr_offset than the uprobe that is there has; its references are as before."""
    file = new_file()
    uprobe = registered(file, 0, ref_ctr_offset=0x800)

    assert uprobe_register(file.f_inode, 0, 0x900, recorder()) == -errno.EINVAL
    assert uprobe_register(file.f_inode, 0, 0, recorder()) == -errno.EINVAL
    assert refcount_read(uprobe, "ref") == 1
    assert registered(file, 0, ref_ctr_offset=0x800) is uprobe


@pytest.mark.parametrize(("code", "ret"), [(b"\xcc", -ENOTSUPP), (b"\xf4", -ENOTSUPP)])
def test_instructions_that_cannot_be_probed_are_refused_where_mapped(code: bytes, ret: int) -> None:
    """A breakpoint in the file, or an instruction not to be probed, gives -ENOTSUPP as soon as an mm maps
    it.
    """
    mm = MmStruct()
    file = new_file("/bin/odd", code * PAGE_SIZE)
    registered(file, 0)  # nobody maps it yet: nothing is read
    map_text(mm, file, pages=1)

    assert uprobe_register(file.f_inode, 8, 0, recorder()) == ret
    lifetime.wait_for_frees()
    assert [u.offset for u in tree.uprobes()] == [0]


def test_reading_past_the_end_of_a_mapped_file_is_refused() -> None:
    """-EIO if the file ends at the offset although a mapping covers it."""
    mm = MmStruct()
    file = new_file("/bin/short", b"\x90" * 100)
    map_text(mm, file, pages=1)

    assert uprobe_register(file.f_inode, 100, 0, recorder()) == -errno.EIO


def test_no_memory() -> None:
    """-ENOMEM if the struct cannot be allocated."""
    file = new_file()
    uc = recorder()
    with fail_nth(1):
        assert uprobe_register(file.f_inode, 0, 0, uc) == -errno.ENOMEM


# ------------------------------------------------------------------------------ breakpoints


def test_breakpoints_appear_in_every_mapping_and_go_again() -> None:
    """Every executable private mapping gets the breakpoint; unregister restores the byte and the shared
    page.
    """
    first, second = MmStruct(), MmStruct()
    file = new_file()
    map_text(first, file)
    map_text(second, file, TEXT + 0x20000)
    map_text(second, file, TEXT + 0x40000, pages=1, pgoff=1)
    map_data(second, file, TEXT + 0x60000)
    uc = recorder()

    uprobe = registered(file, 0x10, uc)
    assert opcode(first, TEXT + 0x10) == INT3
    assert opcode(second, TEXT + 0x20010) == INT3
    assert opcode(second, TEXT + 0x40010) == CODE[0x1010]
    assert opcode(second, TEXT + 0x60010) == CODE[0x10]
    assert test_bit(MMF_HAS_UPROBES, first, "flags")

    uprobe_unregister(uprobe, uc)
    assert opcode(first, TEXT + 0x10) == CODE[0x10]
    assert opcode(second, TEXT + 0x20010) == CODE[0x10]
    assert not anon_pages(first)


def test_two_probes_in_one_page_do_not_disturb_each_other() -> None:
    """Removing one breakpoint leaves the other in the private copy."""
    mm = MmStruct()
    file = new_file()
    map_text(mm, file)
    uc = recorder()
    uprobe = registered(file, 0x10, uc)
    registered(file, 0x20)

    uprobe_unregister(uprobe, uc)
    assert (opcode(mm, TEXT + 0x10), opcode(mm, TEXT + 0x20)) == (CODE[0x10], INT3)


def test_the_breakpoint_stays_until_the_last_consumer_leaves() -> None:
    """Consumers share uprobe and breakpoint; ref is their number."""
    mm = MmStruct()
    file = new_file()
    map_text(mm, file)
    one, two = recorder(), recorder()
    uprobe = registered(file, 0x10, one)
    assert registered(file, 0x10, two) is uprobe
    assert refcount_read(uprobe, "ref") == 2
    assert (one.id, two.id) == (1, 2)

    uprobe_unregister(uprobe, one)
    assert opcode(mm, TEXT + 0x10) == INT3
    uprobe_unregister(uprobe, two)
    assert opcode(mm, TEXT + 0x10) == CODE[0x10]
    lifetime.wait_for_frees()
    assert is_freed(uprobe)


def test_filters_decide_where_breakpoints_are() -> None:
    """Only the new consumer's filter is asked at register; at unregister all are."""
    wanted, unwanted = MmStruct(), MmStruct()
    file = new_file()
    map_text(wanted, file)
    map_text(unwanted, file)
    picky = recorder(filter=not_in, not_in=unwanted)
    uprobe = registered(file, 0x10, picky)
    assert (opcode(wanted, TEXT + 0x10), opcode(unwanted, TEXT + 0x10)) == (INT3, CODE[0x10])

    everywhere = recorder()
    registered(file, 0x10, everywhere)
    assert opcode(unwanted, TEXT + 0x10) == INT3

    uprobe_unregister(uprobe, everywhere)
    assert (opcode(wanted, TEXT + 0x10), opcode(unwanted, TEXT + 0x10)) == (INT3, CODE[0x10])


def test_unregister_meets_a_mapping_that_nobody_prepared_for() -> None:
    """Where no breakpoint was ever wanted the instruction was not copied, and there is nothing to restore."""
    mm, file = MmStruct(), new_file()
    map_text(mm, file)
    registered(file, 0)
    nowhere = recorder(filter=not_in, not_in=mm)
    uprobe = registered(file, 2, nowhere)

    assert test_bit(MMF_HAS_UPROBES, mm, "flags")
    uprobe_unregister(uprobe, nowhere)

    assert opcode(mm, TEXT) == INT3
    assert opcode(mm, TEXT + 2) == CODE[2]


def test_apply_asks_a_filter_again() -> None:
    """uprobe_apply() installs where the filter now says yes and removes where nobody does."""
    mm = MmStruct()
    file = new_file()
    map_text(mm, file)
    uc = recorder(filter=not_in, not_in=mm)
    uprobe = registered(file, 0x10, uc)
    assert opcode(mm, TEXT + 0x10) == CODE[0x10]

    uc.not_in = None
    assert uprobe_apply(uprobe, uc, True) == 0
    assert opcode(mm, TEXT + 0x10) == INT3
    uc.not_in = mm
    assert uprobe_apply(uprobe, uc, False) == 0
    assert opcode(mm, TEXT + 0x10) == CODE[0x10]
    assert uprobe_apply(uprobe, recorder(), True) == -errno.ENOENT


def test_a_failed_registration_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """If one address space fails, the breakpoints already installed go, and so does the uprobe."""
    first, second = MmStruct(), MmStruct()
    file = new_file()
    map_text(first, file)
    map_text(second, file)
    write = breakpoints.write_page
    writes: list[MmStruct] = []

    def second_write_fails(vma: Any, vaddr: int, data: bytes) -> int:
        if data == bytes([INT3]):
            writes.append(vma.vm_mm)
            if len(writes) == 2:
                return -errno.EFAULT
        return write(vma, vaddr, data)

    monkeypatch.setattr(breakpoints, "write_page", second_write_fails)
    assert uprobe_register(file.f_inode, 0x10, 0, recorder()) == -errno.EFAULT

    assert set(writes) == {first, second}
    assert opcode(first, TEXT + 0x10) == opcode(second, TEXT + 0x10) == CODE[0x10]
    lifetime.wait_for_frees()
    assert tree.uprobes() == []


def test_an_unregister_that_cannot_remove_a_breakpoint_leaks_the_uprobe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The uprobe stays for whoever hits the breakpoint that stayed, and the kernel warns."""
    mm = MmStruct()
    file = new_file()
    map_text(mm, file)
    uc = recorder()
    uprobe = registered(file, 0x10, uc)
    monkeypatch.setattr(breakpoints, "write_page", lambda *_args: -errno.EFAULT)

    uprobe_unregister(uprobe, uc)

    assert_warned("leaking uprobe")
    assert tree.uprobes() == [uprobe]
    assert refcount_read(uprobe, "ref") == 1


# ------------------------------------------------------------------------------ beside mmap and hits


class MmapRace:
    """A file with nothing mapped yet."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.mm = MmStruct()
        self.file = new_file()
        self.uc = recorder()


def registrar(race: MmapRace) -> None:
    registered(race.file, 0x10, race.uc)


def mapper(race: MmapRace) -> None:
    map_text(race.mm, race.file)


def has_breakpoint(race: MmapRace) -> None:
    assert opcode(race.mm, TEXT + 0x10) == INT3, "a mapping was missed"


def test_register_beside_mmap_misses_no_mapping() -> None:
    """Whichever comes first, the mapping has the breakpoint afterwards (H49, P9)."""
    coop_seeds(MmapRace, [registrar, mapper], has_breakpoint, seeds=range(20))


@pytest.mark.parametrize("seed", range(3))
def test_without_publishing_first_a_mapping_is_missed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """no-consumer-before-scan: a mapping made after the scan and before the consumer is there has no
    breakpoint (H49).
    """
    scan = register.register_for_each_vma

    def scan_then_map(uprobe: Uprobe, new: Any) -> int:
        ret = scan(uprobe, new)
        mapper(race)
        return ret

    race = MmapRace()
    monkeypatch.setattr(register, "register_for_each_vma", scan_then_map)
    registrar(race)
    has_breakpoint(race)

    race = MmapRace()
    race.file = new_file("/bin/other")
    with guards.without("no-consumer-before-scan"):
        registrar(race)
    with pytest.raises(AssertionError, match="was missed"):
        has_breakpoint(race)


class Churn:
    """Registrations of one place come and go while two address spaces map and unmap the file."""

    def __init__(self) -> None:
        self.mms = [MmStruct(), MmStruct()]
        self.file = new_file()
        for mm in self.mms:
            map_text(mm, self.file)
        self.stays = recorder()


def comes_and_goes(churn: Churn) -> None:
    for _ in range(2):
        uc = recorder()
        uprobe = registered(churn.file, 0x10, uc)
        uprobe_unregister(uprobe, uc)
    lifetime.wait_for_frees()


def comes_and_stays(churn: Churn) -> None:
    registered(churn.file, 0x20, churn.stays)


def remaps(churn: Churn) -> None:
    mm = churn.mms[0]
    munmap(mm, TEXT, 2 * PAGE_SIZE)
    map_text(mm, churn.file)


def settled(churn: Churn) -> None:
    tree.check_invariants()
    assert [u.offset for u in tree.uprobes()] == [0x20]
    for mm in churn.mms:
        assert (opcode(mm, TEXT + 0x10), opcode(mm, TEXT + 0x20)) == (CODE[0x10], INT3)


def test_breakpoints_are_right_after_any_interleaving() -> None:
    """Afterwards there is a breakpoint where somebody wants one, and nowhere else (P9)."""
    coop_seeds(Churn, [comes_and_goes, comes_and_stays, remaps], seeds=range(15))


# ------------------------------------------------------------------------------ uprobe_unregister_sync


class Goodbye:
    """A task hits the probe while its consumer is unregistered and freed."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.mm = MmStruct()
        self.file = new_file()
        map_text(self.mm, self.file)
        self.uc = recorder(then=self.linger)
        self.uprobe = registered(self.file, 0x10, self.uc)
        self.gone = False
        self.called_late = False

    def linger(self, uc: Any, regs: Any) -> None:
        self.called_late |= self.gone
        if current().comm == "stopping_hitter":
            self.gate.stop()
        self.called_late |= self.gone


def hitter(story: Goodbye) -> None:
    for _ in range(2):
        hit(story.mm, TEXT + 0x10)


def stopping_hitter(story: Goodbye) -> None:
    hit(story.mm, TEXT + 0x10)


def leaver(story: Goodbye) -> None:
    uprobe_unregister_nosync(story.uprobe, story.uc)
    uprobe_unregister_sync()
    story.gone = True


def leaver_in_between(story: Goodbye) -> None:
    story.gate.wait()
    uprobe_unregister_nosync(story.uprobe, story.uc)
    if "no-unregister-sync" not in guards.removed:
        story.gate.open()  # else nobody would ever be done: the sync waits for the handler
    uprobe_unregister_sync()
    story.gone = True
    story.gate.open()


def test_no_handler_runs_after_unregister_sync() -> None:
    """Under many schedules the consumer is left alone once uprobe_unregister_sync() returned (P7, H44)."""
    for story in coop_seeds(Goodbye, [hitter, leaver], seeds=range(12)):
        assert not story.called_late


@both_engines
def test_unregister_sync_waits_for_a_running_handler(run: Any) -> None:
    """A handler that runs when its consumer is unregistered is waited for."""
    story = run(Goodbye, [stopping_hitter, leaver_in_between])

    assert not story.called_late


@both_engines
def test_without_unregister_sync_a_handler_outlives_its_consumer(run: Any) -> None:
    """no-unregister-sync: the handler still runs when the consumer's owner thinks it is gone (H44, H45)."""
    with guards.without("no-unregister-sync"):
        story = run(Goodbye, [stopping_hitter, leaver_in_between])

    assert story.called_late
