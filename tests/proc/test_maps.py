"""/proc/PID/maps: exact text, there and back, for real processes and for changing address spaces."""

import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from kmodel.core import (
    CoopEngine,
    boot,
    current,
    engine,
    kernel_warnings,
    kill,
    kthread_run,
    raw_get,
    smp_cond_load_acquire,
    variables,
)
from kmodel.fs import backing_file_open, open_file, unlink
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
    mmap_write_lock,
    mmap_write_unlock,
    mmput,
    mprotect,
    munmap,
)
from kmodel.mm.from_proc_maps import parse_maps
from kmodel.proc import (
    maps_variants,
    proc_map_release,
    proc_maps,
    proc_maps_open,
    proc_maps_read,
    proc_maps_reads,
)

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


VARIANTS = tuple(maps_variants())


def two_neighbours():
    boot()
    mm = mm_alloc()
    mmap(mm, BASE, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
    mmap(mm, BASE + 4 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
    return mm


def border_mover(mm):
    """Replaces the end of the first mapping by the second's kind, and back: there is never a hole."""
    for prot in (PROT_READ | PROT_WRITE, PROT_READ):
        mmap(mm, BASE + 2 * PAGE, 2 * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
    mprotect(mm, BASE + PAGE, 2 * PAGE, PROT_READ | PROT_WRITE)


def maps_reader(variant):
    def reader(mm):
        lines = parse_maps(proc_maps(mm, variant))
        for a, b in pairwise(lines):
            assert a.end >= b.start, f"a hole between {a} and {b}"
            assert a.end < b.end, f"back from {a} to {b}"
        assert (lines[0].start, lines[-1].end) == (BASE, BASE + 8 * PAGE)

    return reader


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(8))
def test_no_hole_is_shown_that_never_was(seed, variant):
    """T1 and H40 beside a task that moves the border of two adjacent mappings, for each way to read."""
    CoopEngine(seed).run(two_neighbours, [border_mover, maps_reader(variant)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_readers_and_writers_on_real_threads(variant):
    """The same on the threads engine, twenty times each."""
    mm = two_neighbours()
    tasks = [kthread_run(repeatedly, task, mm, daemon=False) for task in (border_mover, maps_reader(variant))]
    assert [engine().join(task, timeout=30) for task in tasks] == [True, True]
    assert kernel_warnings() == ()


def repeatedly(task, mm):
    for _ in range(20):
        task(mm)


def test_a_killed_reader_says_eintr():
    """mmap_lock, where it is needed, is waited for until a fatal signal comes."""

    state = SimpleNamespace(mm=two_neighbours())
    state.words = variables(locked=0, done=0)

    def holder(state):
        mmap_write_lock(state.mm)
        state.words.locked = 1
        smp_cond_load_acquire(state.words, "done", bool)
        mmap_write_unlock(state.mm)

    def killed(variant):
        def task(state):
            smp_cond_load_acquire(state.words, "locked", bool)
            kill(current())
            with pytest.raises(OSError, match="Interrupted"):
                proc_maps(state.mm, variant)
            state.words.done = 1

        return task

    for variant in ("mmap-lock", "snapshot"):
        state.words.locked = state.words.done = 0
        tasks = [kthread_run(task, state, daemon=False) for task in (holder, killed(variant))]
        assert [engine().join(task, timeout=30) for task in tasks] == [True, True]
    assert raw_get(state.mm, "mm_users") == 1


def test_a_deleted_file_is_said_to_be():
    """unlink() of a mapped file adds (deleted) to its line."""
    mm = mm_alloc()
    mmap(mm, BASE, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, open_file("/tmp/x", size=PAGE))
    unlink("/tmp/x")
    assert proc_maps(mm).endswith(" /tmp/x (deleted)\n")


def test_files_of_one_name_are_told_apart():
    """A replaced file, or one behind a mount: two lines, one path, two inodes."""
    text = "".join(
        f"{start:08x}-{start + PAGE:08x} r--p 00000000 08:0{n} {n}{' ' * 26} /x\n"
        for n, start in ((1, 0x10000), (2, 0x20000))
    )
    assert proc_maps(MmStruct.from_proc_maps(text)).split() == text.split()


def test_a_line_that_fills_the_buffer_is_read_later():
    """Reads end with a line, in less than a page, wherever the last one would not fit; nothing is lost."""
    mm = mm_alloc()
    for n in range(100):
        prot = PROT_READ if n % 2 else PROT_READ | PROT_WRITE
        mmap(mm, BASE + n * PAGE, PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
    reads = list(proc_maps_reads(mm))
    line = len(b"1000000000-1000001000 rw-p 00000000 00:00 0 \n")
    assert [len(data) for data in reads] == [4095 // line * line, 100 * line - 4095 // line * line]
    assert b"".join(reads).count(b"\n") == 100


def test_a_vma_that_grew_is_shown_again():
    """T1: what was printed has merged with what comes next; the merged line begins before the other's end."""

    def grow_after_first_line(mm):
        m = proc_maps_open(mm)
        first = proc_maps_read(m, 40)  # the first line, and the place of the second is known
        mmap(mm, BASE + 4 * PAGE, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
        rest = b""
        while data := proc_maps_read(m, 4096):
            rest += data
        proc_map_release(m)
        return (first + rest).decode()

    assert grow_after_first_line(two_neighbours()) == (
        "1000000000-1000004000 r--p 00000000 00:00 0 \n1000000000-1000008000 r--p 00000000 00:00 0 \n"
    )


def test_an_unknown_variant_is_named():
    """ValueError lists those there are."""
    with pytest.raises(ValueError, match="vma-lock, mmap-lock, snapshot"):
        proc_maps(mm_alloc(), "none")
