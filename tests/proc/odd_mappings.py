"""A program with mappings of every odd kind, for the live tests to look at. Says when it is ready, waits for
its input to end.

Run as: python odd_mappings.py DIRECTORY
"""

import contextlib
import ctypes
import mmap
import os
import sys

PAGE = 4096
PR_SET_VMA, PR_SET_VMA_ANON_NAME = 0x53564D41, 0

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
RW, PRIVATE, SHARED = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, mmap.MAP_SHARED


def map_(prot, flags, fd=-1, offset=0, pages=2):
    """mmap(2); the address, or None if the kernel will not."""
    addr = libc.mmap(None, pages * PAGE, prot, flags, fd, offset)
    return None if addr in (None, ctypes.c_void_p(-1).value) else addr


def name(addr, text):
    """PR_SET_VMA_ANON_NAME, where the kernel has it."""
    libc.prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, ctypes.c_ulong(addr), ctypes.c_ulong(PAGE), text)


def files(directory):
    """Files with odd names, a deleted and a replaced one, a sparse one mapped far behind."""
    odd = [b"plain", b"with space", b" leading", b"trailing ", b"new\nline", b"tab\t", b"back\\012slash"]
    odd += [
        b"x (deleted)",
        b"\xff\xfe not utf-8",
        "ünï".encode(),
        b"[heap]",
        b"[anon:x]",
        b"a" * 255,
        b"\r\x0b",
    ]
    for text in odd:
        with open(os.path.join(directory, text), "wb") as file:
            file.write(b"x" * 3 * PAGE)
        fd = os.open(os.path.join(directory, text), os.O_RDWR)
        map_(RW, SHARED, fd)
        map_(mmap.PROT_READ, PRIVATE, fd, PAGE)
        os.close(fd)
    gone = os.path.join(directory, b"gone")
    fd = os.open(gone, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, PAGE)
    map_(mmap.PROT_READ, SHARED, fd)
    os.unlink(gone)
    fd = os.open(gone, os.O_RDWR | os.O_CREAT)
    map_(mmap.PROT_READ, SHARED, fd)
    far = 1 << 43
    with contextlib.suppress(OSError):
        os.ftruncate(fd, far + PAGE)
    map_(RW, SHARED, fd, far)


def long_path(directory):
    """A path longer than PATH_MAX."""
    os.chdir(directory)
    for _ in range(22):
        os.mkdir(b"d" * 200)
        os.chdir(b"d" * 200)
    fd = os.open(b"deep", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, PAGE)
    map_(mmap.PROT_READ, SHARED, fd)


def memory():
    """memfd, shared and named anonymous memory, no permissions at all, growing down, the zero device."""
    fd = os.memfd_create("a name with\nnewline")
    os.ftruncate(fd, 4 * PAGE)
    map_(RW, SHARED, fd)
    map_(RW, PRIVATE, fd, PAGE)
    anonymous = mmap.MAP_ANONYMOUS
    map_(RW, SHARED | anonymous)
    map_(0, PRIVATE | anonymous)
    map_(mmap.PROT_EXEC, PRIVATE | anonymous)
    map_(RW, PRIVATE | anonymous | 0x100)
    map_(RW, PRIVATE, os.open("/dev/zero", os.O_RDWR))
    name(map_(RW, PRIVATE | anonymous), b"a name, with {punctuation}")
    name(map_(RW, SHARED | anonymous), b"shared name")


def heap():
    """A heap in three pieces, the middle one read-only."""
    libc.sbrk.restype = ctypes.c_void_p
    end = libc.sbrk(4 * PAGE)
    start = (end + 2 * PAGE - 1) & -PAGE
    libc.mprotect(ctypes.c_void_p(start), PAGE, mmap.PROT_READ)


def main():
    """Make them all, then wait."""
    directory = os.fsencode(sys.argv[1])
    files(directory)
    memory()
    heap()
    long_path(directory)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
