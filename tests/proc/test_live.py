"""The model's maps and PROCMAP_QUERY beside the running kernel's."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kmodel.cli.maps import NotReadable, check
from kmodel.mm import MmStruct
from kmodel.proc import PROCMAP_QUERY, ProcmapQuery, procmap_ioctl

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/proc/self/maps").exists(), reason="there is no /proc here"
)


def kernel_has_procmap_query():
    """Since 6.11."""
    with open("/proc/self/maps") as file:
        try:
            fcntl.ioctl(file, PROCMAP_QUERY, bytearray(ProcmapQuery(query_flags=0x10).pack()))
        except OSError as error:
            return error.errno != errno.ENOTTY
    return True


needs_procmap_query = pytest.mark.skipif(
    not (sys.platform == "linux" and kernel_has_procmap_query()),
    reason="this kernel has no PROCMAP_QUERY (it came with 6.11)",
)


@pytest.fixture
def odd(tmp_path):
    """A process with mappings of every odd kind, and nothing else going on in it."""
    program = Path(__file__).with_name("odd_mappings.py")
    with subprocess.Popen(
        [sys.executable, str(program), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.stdin.close()
        process.wait()
    # pytest cannot remove paths as long as that
    subprocess.run(["rm", "-rf", str(tmp_path / ("d" * 200))], check=True)


def test_odd_mappings_are_said_byte_for_byte(odd):
    """Every variant, every read, and what the kernel answers to queries."""
    text = Path(f"/proc/{odd}/maps").read_bytes()
    for part in (
        b"new\\012line",
        b"back\\012slash",
        b"gone (deleted)",
        b"/memfd:",
        b"x (deleted)",
        b"trailing \n",
    ):
        assert part in text
    checked = check(odd)
    assert checked.differences == []
    assert checked.mappings == text.count(b"\n")


def test_this_process_is_said_byte_for_byte():
    """While it runs: what changed meanwhile is looked at again."""
    assert check(os.getpid()).differences == []


@pytest.mark.slow
def test_every_process_is_said_byte_for_byte():
    """All that may be read; those that keep changing are left out, and there are always some that do not."""
    compared = 0
    for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
        try:
            checked = check(pid, queries=False)
        except NotReadable:
            continue
        assert checked.differences == [], pid
        compared += not checked.changing
    assert compared > 0


ERRORS = [
    (104, 0x40, b""),
    (104, 0x10, b""),
    (23, 0, b""),
    (24, 0x10, b""),
    (0, 0, b""),
    (4096, 0x10, b""),
    (4097, 0x10, b""),
    (112, 0x10, bytes(8)),
    (112, 0x10, b"\1" * 8),
    (1 << 63, 0, b""),
]


@needs_procmap_query
@pytest.mark.parametrize(("size", "flags", "tail"), ERRORS)
def test_sizes_and_flags_are_judged_as_the_kernel_does(size, flags, tail):
    """The same bytes to both: the same errno, and the same bytes back."""
    theirs = bytearray((ProcmapQuery(size=size, query_flags=flags).pack() + tail).ljust(4096, b"\0"))
    ours = bytearray(theirs)
    fd = os.open("/proc/self/maps", os.O_RDONLY)
    try:
        result = fcntl.ioctl(fd, PROCMAP_QUERY, theirs, True)
    except OSError as error:
        result = -error.errno
    mm = MmStruct.from_proc_maps(os.getpid())
    assert procmap_ioctl(mm, PROCMAP_QUERY, ours, {}) == result
    assert ours == theirs
    os.close(fd)


@needs_procmap_query
@pytest.mark.parametrize("sizes", [(1, 0), (0, 1), (4095, 19), (5, 20)])
def test_names_and_build_ids_that_do_not_fit_are_refused_as_the_kernel_does(odd, sizes):
    """For each mapping: ENAMETOOLONG at the same sizes."""
    assert check(odd, name_size=sizes[0], build_id_size=sizes[1]).differences == []
