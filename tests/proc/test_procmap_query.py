"""PROCMAP_QUERY: what it finds, what it refuses."""

import struct
from errno import E2BIG, EFAULT, EINVAL, ENAMETOOLONG, ENOENT, ENOTTY, ESRCH

import attrs
import pytest

from kmodel.core import raw_get, raw_set
from kmodel.fs import backing_file_open, open_file
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    VM_REFCNT_LIMIT,
    MmStruct,
    mm_alloc,
    mmap,
    mmdrop,
    mmgrab,
    mmput,
    vma_lookup,
)
from kmodel.proc import (
    PROCMAP_QUERY,
    PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
    PROCMAP_QUERY_FILE_BACKED_VMA,
    PROCMAP_QUERY_VMA_EXECUTABLE,
    PROCMAP_QUERY_VMA_SHARED,
    PROCMAP_QUERY_VMA_WRITABLE,
    ProcmapQuery,
    proc_maps,
    procmap_ioctl,
    procmap_query,
)

BASE = 0x10_0000_0000
PAGE = 0x1000
NEXT = PROCMAP_QUERY_COVERING_OR_NEXT_VMA
NOTE = struct.pack("<III4s8s", 4, 8, 3, b"GNU\0", b"build-id")
ELF = (
    b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    + struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(NOTE), len(NOTE), 4)
    + NOTE
)


@pytest.fixture
def mm():
    """[0, 2) anonymous RW; [4, 8) an ELF file, RX, from its second page; [8, 9) shared."""
    mm = mm_alloc()
    mmap(mm, BASE, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
    file = open_file("/bin/a\nb", contents=ELF + bytes(8 * PAGE), ino=42, dev=(0xFE, 1))
    mmap(mm, BASE + 4 * PAGE, 4 * PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, file, 1)
    mmap(mm, BASE + 8 * PAGE, PAGE, PROT_READ, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED)
    return mm


def errno_of(mm, addr, flags=0, **sizes):
    with pytest.raises(OSError, match="Errno") as raised:
        procmap_query(mm, addr, flags, **sizes)
    return raised.value.errno


def test_the_struct_is_the_kernels():
    """As in include/uapi/linux/fs.h: 104 bytes, and the number that _IOWR makes of them."""
    assert ProcmapQuery().size == 104
    assert 3 << 30 | 104 << 16 | ord("f") << 8 | 17 == PROCMAP_QUERY
    some = ProcmapQuery(*range(1, 16))
    assert ProcmapQuery.unpack(some.pack()) == some


def test_a_file_mapping_is_described(mm):
    """Range, permissions, offset, device, inode, path as it is, build ID."""
    answer, name, build_id = procmap_query(mm, BASE + 5 * PAGE, build_id_size=20)
    assert answer == attrs.evolve(
        answer,
        vma_start=BASE + 4 * PAGE,
        vma_end=BASE + 8 * PAGE,
        vma_flags=0x5,
        vma_page_size=PAGE,
        vma_offset=PAGE,
        inode=42,
        dev_major=0xFE,
        dev_minor=1,
        vma_name_size=len("/bin/a\nb") + 1,
        build_id_size=8,
    )
    assert (name, build_id) == (b"/bin/a\nb", b"build-id")


def test_a_mapping_without_a_name_has_none(mm):
    """The size of the name and of the build ID come back as 0."""
    answer, name, build_id = procmap_query(mm, BASE, build_id_size=20)
    assert (answer.vma_name_size, answer.build_id_size, name, build_id) == (0, 0, b"", b"")
    assert (answer.inode, answer.vma_offset, answer.vma_flags) == (0, 0, 0x3)


@pytest.mark.parametrize(
    ("page", "flags", "found"),
    [
        (1, 0, 0),
        (2, NEXT, 4),
        (0, NEXT | PROCMAP_QUERY_FILE_BACKED_VMA, 4),
        (0, NEXT | PROCMAP_QUERY_VMA_SHARED, 8),
        (0, NEXT | PROCMAP_QUERY_VMA_EXECUTABLE, 4),
        (5, PROCMAP_QUERY_FILE_BACKED_VMA | PROCMAP_QUERY_VMA_EXECUTABLE, 4),
    ],
)
def test_the_mapping_that_was_asked_for_is_found(mm, page, flags, found):
    """Covering, or the next that satisfies the flags."""
    assert procmap_query(mm, BASE + page * PAGE, flags)[0].vma_start == BASE + found * PAGE


@pytest.mark.parametrize(
    ("page", "flags"),
    [
        (2, 0),  # a hole
        (9, NEXT),  # behind the last
        (0, PROCMAP_QUERY_FILE_BACKED_VMA),
        (0, PROCMAP_QUERY_VMA_EXECUTABLE),
        (2, PROCMAP_QUERY_VMA_EXECUTABLE),
        (4, NEXT | PROCMAP_QUERY_VMA_WRITABLE),
    ],
)
def test_enoent_when_there_is_none(mm, page, flags):
    """And without NEXT only the one at the address is looked at."""
    assert errno_of(mm, BASE + page * PAGE, flags) == ENOENT


def test_the_vsyscall_page_is_no_mapping():
    """It is in the text, but in no tree."""
    text = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"
    mm = MmStruct.from_proc_maps(text)
    assert proc_maps(mm) == text
    assert errno_of(mm, 0xFFFFFFFFFF600000) == ENOENT


def test_names_and_build_ids_must_fit(mm):
    """ENAMETOOLONG; the NUL counts, and a build ID is asked for at one's own risk too."""
    size = len("/bin/a\nb") + 1
    assert procmap_query(mm, BASE + 4 * PAGE, name_size=size)[0].vma_name_size == size
    assert errno_of(mm, BASE + 4 * PAGE, name_size=size - 1) == ENAMETOOLONG
    assert errno_of(mm, BASE + 4 * PAGE, build_id_size=7) == ENAMETOOLONG


def test_a_path_longer_than_path_max_has_no_answer():
    """But the text has it."""
    mm = mm_alloc()
    path = "/" + "x" * 5000
    mmap(mm, BASE, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, open_file(path, size=PAGE))
    assert errno_of(mm, BASE, name_size=8192) == ENAMETOOLONG
    assert proc_maps(mm).endswith(f" {path}\n")


def test_a_backing_file_is_what_the_user_opened():
    """Path, device and inode number of the upper file."""
    mm = mm_alloc()
    file = backing_file_open("/merged/x", "/lower/x", size=PAGE, ino=7, dev=(8, 1), user_ino=((0, 0x31), 9))
    mmap(mm, BASE, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, file)
    answer, name, _build_id = procmap_query(mm, BASE)
    assert (answer.dev_major, answer.dev_minor, answer.inode, name) == (0, 0x31, 9, b"/merged/x")
    assert " 00:31 9 " in proc_maps(mm)


def ioctl(mm, uarg, cmd=PROCMAP_QUERY):
    return procmap_ioctl(mm, cmd, bytearray(uarg), {})


def test_bad_arguments(mm):
    """Unknown commands and flags, sizes too small and too large, half a buffer, memory that is not there."""
    good = ProcmapQuery(query_addr=BASE)
    assert ioctl(mm, good.pack()) == 0
    assert ioctl(mm, good.pack(), PROCMAP_QUERY + 1) == -ENOTTY
    assert ioctl(mm, attrs.evolve(good, query_flags=0x40).pack()) == -EINVAL
    assert ioctl(mm, attrs.evolve(good, size=23).pack()) == -EINVAL
    assert ioctl(mm, attrs.evolve(good, size=24).pack()[:24]) == 0
    assert ioctl(mm, attrs.evolve(good, size=4097).pack()) == -E2BIG
    assert ioctl(mm, attrs.evolve(good, size=112).pack() + bytes(8)) == 0
    assert ioctl(mm, attrs.evolve(good, size=112).pack() + b"\1" + bytes(7)) == -E2BIG
    assert ioctl(mm, attrs.evolve(good, vma_name_size=9).pack()) == -EINVAL
    assert ioctl(mm, attrs.evolve(good, vma_name_addr=9).pack()) == -EINVAL
    assert ioctl(mm, attrs.evolve(good, build_id_size=9).pack()) == -EINVAL
    named = ProcmapQuery(query_addr=BASE + 4 * PAGE, vma_name_size=99, vma_name_addr=0x1000)
    assert ioctl(mm, named.pack()) == -EFAULT
    assert ioctl(mm, b"") == -EFAULT


def test_a_short_struct_is_answered_as_far_as_it_goes(mm):
    """A program of before a field was added does not get it."""
    uarg = bytearray(attrs.evolve(ProcmapQuery(query_addr=BASE), size=32).pack()[:32])
    assert procmap_ioctl(mm, PROCMAP_QUERY, uarg, {}) == 0
    assert struct.unpack("<4Q", uarg) == (32, 0, BASE, BASE)


def test_a_dead_address_space_is_gone(mm):
    """ESRCH, as for a kernel thread, which has none."""
    mmgrab(mm)
    mmput(mm)
    assert errno_of(mm, BASE) == ESRCH
    assert errno_of(None, BASE) == ESRCH
    mmdrop(mm)


def test_a_vma_with_too_many_readers_is_asked_under_mmap_lock(mm):
    """-EAGAIN of lock_next_vma() is answered by holding mmap_lock, here and in maps."""
    text = proc_maps(mm)
    vma = vma_lookup(mm, BASE + 4 * PAGE)
    raw_set(vma, "vm_refcnt", VM_REFCNT_LIMIT)
    assert procmap_query(mm, BASE + 4 * PAGE)[0].vma_start == BASE + 4 * PAGE
    assert proc_maps(mm) == text
    assert raw_get(vma, "vm_refcnt") == VM_REFCNT_LIMIT
    raw_set(vma, "vm_refcnt", 1)
