"""/proc/PID/maps: exact text, there and back, for real processes and for changing address spaces."""

import os
from itertools import pairwise
from pathlib import Path

import pytest

from kmodel.core import CoopEngine, boot
from kmodel.fs import backing_file_open, open_file
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    MmStruct,
    mm_alloc,
    mmap,
    mmput,
    munmap,
)
from kmodel.mm.from_proc_maps import parse_maps
from kmodel.proc import proc_maps

KINDS = """\
00400000-00452000 r-xp 00000000 08:02 173521                             /usr/bin/dbus-daemon
00651000-00652000 r--p 00051000 08:02 173521                             /usr/bin/dbus-daemon
00652000-00655000 rw-p 00052000 08:02 173521                             /usr/bin/dbus-daemon
00e03000-00e24000 rw-p 00000000 00:00 0                                  [heap]
35b1800000-35b1820000 r-xp 00000000 08:02 135522                         /usr/lib64/ld-2.15.so
7f0000000000-7f0000001000 rw-p 00000000 00:00 0                          [anon:glibc: malloc]
7f0000001000-7f0000002000 rw-s 00000000 00:01 1027                       [anon_shmem:name]
7f0000002000-7f0000003000 rw-s 00000000 00:01 1028                       /memfd:x (deleted)
7f0000003000-7f0000004000 ---p 00000000 00:00 0 \n\
7f0000004000-7f0000006000 rw-s 00000000 00:0f 5                          /dev/zero (deleted)
7f0000006000-7f0000007000 rw-s 00003000 00:10 9233                       anon_inode:[perf_event]
7f0000007000-7f0000008000 r--p 00001000 103:02 99                        /a\\012b c
7ffc11111000-7ffc11132000 rw-p 00000000 00:00 0                          [stack]
7ffc111fe000-7ffc11200000 r--p 00000000 00:00 0                          [vvar]
7ffc11200000-7ffc11202000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""


def test_every_kind_of_line_comes_back():
    """R1 for files, deleted and nameless ones, heap, stack, named anonymous memory, escapes, wide devices."""
    assert proc_maps(MmStruct.from_proc_maps(KINDS)) == KINDS


def test_this_process_comes_back():
    """R1 for the address space of the process that runs the test."""
    text = os.fsdecode(Path("/proc/self/maps").read_bytes())
    mm = MmStruct.from_proc_maps(text)
    assert proc_maps(mm) == text
    assert mm.map_count == text.count("\n") - text.count("[vsyscall]")


def test_a_pid_and_a_path_load_too(tmp_path):
    """from_proc_maps takes a process number or a path as well."""
    (tmp_path / "maps").write_text(KINDS)
    assert proc_maps(MmStruct.from_proc_maps(tmp_path / "maps")) == KINDS
    assert proc_maps(MmStruct.from_proc_maps(os.getpid())).count("\n") > 5


def test_other_text_is_refused_with_its_line():
    """A ValueError names the line that is not one of maps."""
    with pytest.raises(ValueError, match="line 2"):
        parse_maps(KINDS.splitlines()[0] + "\nhello\n")


def test_the_text_follows_mmap_and_munmap():
    """Permissions, offsets, shared anonymous memory and merged neighbours as the kernel prints them."""
    mm = mm_alloc()
    file = open_file("/lib/libx.so", size=1 << 20, ino=42, dev=(0xFE, 1))
    base = 0x10_0000_0000
    mmap(mm, base, 0x4000, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, file, 0x10)
    mmap(mm, base + 0x4000, 0x1000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
    mmap(mm, base + 0x5000, 0x1000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
    mmap(mm, base + 0x6000, 0x1000, PROT_READ, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED)
    munmap(mm, base + 0x1000, 0x1000)
    assert proc_maps(mm) == (
        f"1000000000-1000001000 r-xp 00010000 fe:01 42{' ' * 28} /lib/libx.so\n"
        f"1000002000-1000004000 r-xp 00012000 fe:01 42{' ' * 28} /lib/libx.so\n"
        "1000004000-1000006000 rw-p 00000000 00:00 0 \n"
        f"1000006000-1000007000 r--s 00000000 00:01 1{' ' * 29} /dev/zero (deleted)\n"
    )
    mmput(mm)


def test_a_backing_file_shows_the_users_path():
    """FMODE_BACKING: the line names the file the user opened, not the real one below."""
    mm = mm_alloc()
    file = backing_file_open("/merged/x", "/lower/x", size=4096)
    mmap(mm, 0, 4096, PROT_READ, MAP_PRIVATE, file)
    assert proc_maps(mm).endswith(" /merged/x\n")


def test_a_dead_address_space_has_no_lines():
    """After the last user left there is nothing to read."""
    mm = MmStruct.from_proc_maps(KINDS)
    from kmodel.mm import mmdrop, mmgrab

    mmgrab(mm)
    mmput(mm)
    assert proc_maps(mm) == ""
    mmdrop(mm)


BASE = 0x10_0000_0000
PAGE = 0x1000


def two_neighbours():
    boot()
    mm = mm_alloc()
    mmap(mm, BASE, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
    mmap(mm, BASE + 4 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
    return mm


def border_mover(mm):
    """Replaces the end of the first mapping by the second's kind, and back: there is never a hole."""
    for prot in (PROT_READ | PROT_WRITE, PROT_READ, PROT_READ | PROT_WRITE):
        mmap(mm, BASE + 2 * PAGE, 2 * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)


def maps_reader(mm):
    lines = parse_maps(proc_maps(mm))
    for a, b in pairwise(lines):
        assert a.end == b.start, f"a hole between {a} and {b}"
    assert (lines[0].start, lines[-1].end) == (BASE, BASE + 8 * PAGE)


@pytest.mark.parametrize("seed", range(12))
def test_no_hole_is_shown_that_never_was(seed):
    """T1 and H40 beside a task that moves the border of two adjacent mappings."""
    CoopEngine(seed).run(two_neighbours, [border_mover, maps_reader])
