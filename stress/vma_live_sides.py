"""Two address spaces that the same system calls go to: the running kernel's and the model's.

The real one is an arena inside this very process, far below everything else: addresses are numbers, nothing
there is ever dereferenced by the program itself. "touch" and "peek" let the kernel write or read one byte
for us (read(2) from /dev/zero, access(2)), which answers EFAULT where a program would get a signal.
"""

import ctypes
import os
import platform
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Protocol

import attrs

from kmodel.core import boot, current, kernel_warnings
from kmodel.fs import FMODE_READ, open_file
from kmodel.mm import (
    VM_MAYSHARE,
    MmStruct,
    Signal,
    brk,
    flags,
    for_each_vma,
    madvise,
    mm_alloc,
    mmap,
    mmap_read_lock,
    mmap_read_unlock,
    mmput,
    mprotect,
    mremap,
    munmap,
    older_dontunmap,
    prctl_set_vma_anon_name,
    user_load,
    user_store,
)
from kmodel.mm.maple_tree import check_invariants
from kmodel.rcu import rcu_barrier

PAGE: Final = 4096
ARENA: Final = 0x10_0000_0000
ARENA_PAGES: Final = 64
END: Final = ARENA + 2 * ARENA_PAGES * PAGE
"""Calls name pages up to ARENA_PAGES; what grows may reach beyond them."""
FILE_PAGES: Final = 512

EFAULT: Final = 14
OUTSIDE: Final = "outside"

type Call = tuple[str, *tuple[Any, ...]]
"""A system call: its name and its arguments, a file by its name."""
type Line = tuple[int, int, str, int, str]
"""A mapping: first page, end page, permissions, page offset in the file, the file's name."""
type Answer = tuple[int, int | str]
"""errno (0: none), and the address that came back: an address in the arena, OUTSIDE or 0."""

FLAG_LETTERS: Final = {
    "rd": "VM_READ", "wr": "VM_WRITE", "ex": "VM_EXEC", "sh": "VM_SHARED", "mr": "VM_MAYREAD",
    "mw": "VM_MAYWRITE", "me": "VM_MAYEXEC", "ms": "VM_MAYSHARE", "gd": "VM_GROWSDOWN", "lo": "VM_LOCKED",
    "io": "VM_IO", "sr": "VM_SEQ_READ", "rr": "VM_RAND_READ", "dc": "VM_DONTCOPY", "de": "VM_DONTEXPAND",
    "ac": "VM_ACCOUNT", "nr": "VM_NORESERVE", "wf": "VM_WIPEONFORK", "dd": "VM_DONTDUMP",
    "hg": "VM_HUGEPAGE", "nh": "VM_NOHUGEPAGE", "mg": "VM_MERGEABLE", "dp": "VM_DROPPABLE", "sl": "VM_SEALED",
}  # fmt: skip
"""The two letters that /proc/PID/smaps shows for a flag."""


class Side(Protocol):
    """One of the two."""

    def reset(self) -> None:
        """Nothing is mapped in the arena."""

    def do(self, call: Call) -> Answer:
        """One system call. What was put outside of the arena is taken away again."""

    def maps(self) -> list[Line]:
        """What is mapped in the arena."""

    def vm_flags(self) -> list[tuple[int, frozenset[str]]]:
        """First page and flags, as smaps shows them, of every mapping in the arena."""


def why_not_here() -> str | None:
    """Why the running kernel cannot be asked on this machine; None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    if os.sysconf("SC_PAGE_SIZE") != PAGE:
        return "needs pages of 4096 bytes"
    try:
        text = Path("/proc/self/maps").read_text()
    except OSError as error:
        return f"/proc/self/maps: {error.strerror}"
    if any(
        line
        and int(line.split("-")[1].split()[0], 16) > ARENA - (1 << 30)
        and int(line.split("-")[0], 16) < END + (1 << 30)
        for line in text.splitlines()
    ):
        return "something is mapped where the arena would be"
    return None


# ------------------------------------------------------------------------------------- the running kernel

_MMAP, _MPROTECT, _MUNMAP, _BRK, _MREMAP, _MADVISE, _PRCTL = 9, 10, 11, 12, 25, 28, 157
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_PR_SET_VMA, _PR_SET_VMA_ANON_NAME = 0x53564D41, 0


class RunningKernel:
    """The arena of this process. Use it as a context manager: it leaves nothing mapped."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._syscall = libc.syscall
        self._syscall.restype = ctypes.c_long
        self._read = libc.read
        self._access = libc.access
        self._directory = tempfile.TemporaryDirectory(prefix="kmodel-arena-")
        self.files: dict[str, int] = {}
        self._names: dict[tuple[str, str], str] = {}
        for name in "AB":
            path = Path(self._directory.name, name)
            path.touch()
            os.truncate(path, FILE_PAGES * PAGE)
            self.files[name] = os.open(path, os.O_RDWR)
        path = Path(self._directory.name, "A")
        self.files["A2"] = os.open(path, os.O_RDWR)
        self.files["Ar"] = os.open(path, os.O_RDONLY)
        self.files["Aw"] = os.open(path, os.O_WRONLY)
        for name in "AB":
            status = os.fstat(self.files[name])
            key = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino)
            self._names[key] = name
        self._zero = os.open("/dev/zero", os.O_RDONLY)
        self._maps = os.open("/proc/self/maps", os.O_RDONLY)
        self._smaps = os.open("/proc/self/smaps", os.O_RDONLY)
        self._shm: dict[str, str] = {}
        self._heap: tuple[int, int] | None = None
        self._stat: list[int] = []
        self.has_names = self._try_name()

    def __enter__(self) -> "RunningKernel":
        self.reset()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._raw(_MUNMAP, ARENA, END - ARENA)
        self.give_heap_back()
        for fd in (*self.files.values(), self._zero, self._maps, self._smaps):
            os.close(fd)
        self._directory.cleanup()

    def _raw(self, number: int, *args: int) -> int:
        """The system call's result, or minus errno."""
        result: int = self._syscall(ctypes.c_long(number), *(ctypes.c_long(arg) for arg in args))
        return -ctypes.get_errno() if result == -1 else result

    def _try_name(self) -> bool:
        at = self._raw(
            _MMAP, ARENA, PAGE, 3, flags.MAP_FIXED | flags.MAP_PRIVATE | flags.MAP_ANONYMOUS, -1, 0
        )
        assert at == ARENA, at
        error = self._name(ARENA, PAGE, "x")
        self._raw(_MUNMAP, ARENA, PAGE)
        return not error

    def leaves_account_behind(self) -> bool:
        """Whether what MREMAP_DONTUNMAP leaves behind keeps VM_ACCOUNT, as in 7.2."""
        bits = flags.MAP_FIXED | flags.MAP_PRIVATE | flags.MAP_ANONYMOUS
        self._raw(_MMAP, ARENA, PAGE, 3, bits, -1, 0)
        self._raw(_MREMAP, ARENA, PAGE, PAGE, 7, ARENA + 8 * PAGE)
        kept = "ac" in self.vm_flags()[0][1]
        self.reset()
        return kept

    def _name(self, addr: int, length: int, name: str | None) -> int:
        text = ctypes.create_string_buffer(name.encode()) if name is not None else None
        pointer = ctypes.addressof(text) if text is not None else 0
        return self._raw(_PRCTL, _PR_SET_VMA, _PR_SET_VMA_ANON_NAME, addr, length, pointer)

    # the heap -----------------------------------------------------------------------------------------

    def move_heap(self, start: int) -> bool:
        """Let brk(2) work in the arena from here on; False if that is not permitted. The C library, whose
        brk(2) fails from now on, takes memory by mmap(2) instead.
        """
        if self._heap is None:
            with open("/proc/self/stat") as stat:
                self._stat = [int(field) for field in stat.read().rpartition(")")[2].split()[1:]]
            self._heap = self._stat[43], self._raw(_BRK, 0)
        return self._set_heap(start, start)

    def _set_heap(self, start_brk: int, brk: int) -> bool:
        """prctl(PR_SET_MM_MAP), which needs no capability, with all but the heap as it is."""
        stat = self._stat
        values = [*stat[22:24], *stat[41:43], start_brk, brk, stat[24], *stat[44:48]]
        table = struct.pack("<11QQIi", *values, 0, 0, -1)
        buffer = ctypes.create_string_buffer(table)
        address = ctypes.addressof(buffer)
        return self._raw(_PRCTL, _PR_SET_MM, _PR_SET_MM_MAP, address, len(table), 0) == 0

    def give_heap_back(self) -> None:
        """Undo move_heap()."""
        if self._heap is not None:
            self._set_heap(*self._heap)
            self._heap = None

    # Side ---------------------------------------------------------------------------------------------

    def reset(self) -> None:
        error = self._raw(_MUNMAP, ARENA, END - ARENA)
        assert not error
        self._shm.clear()
        if self._heap is not None:
            self._set_heap(END, END)  # no mapping there is called [heap]

    def do(self, call: Call) -> Answer:
        name, *args = call
        match name:
            case "mmap":
                addr, length, prot, bits, file, page = args
                fd = self.files[file] if file is not None else -1
                result = self._raw(_MMAP, addr, length, prot, bits, fd, page * PAGE)
                return self._place(result, length)
            case "mremap":
                return self._place(self._raw(_MREMAP, *args), args[2])
            case "munmap":
                return -self._raw(_MUNMAP, *args), 0
            case "mprotect":
                return -self._raw(_MPROTECT, *args), 0
            case "madvise":
                return -self._raw(_MADVISE, *args), 0
            case "brk":
                return 0, self._raw(_BRK, *args)
            case "heap":
                return int(not self.move_heap(*args)), 0
            case "name":
                return -self._name(*args), 0
            case "touch":
                done = self._read(self._zero, ctypes.c_void_p(args[0]), 1)
                return (0 if done == 1 else ctypes.get_errno()), 0
            case "peek":
                self._access(ctypes.c_void_p(args[0]), 0)  # ENOENT: it read an empty path there
                return (EFAULT if ctypes.get_errno() == EFAULT else 0), 0
        raise ValueError(name)

    def _place(self, result: int, length: int) -> Answer:
        if result < 0:
            return -result, 0
        if ARENA <= result < END:
            return 0, result
        self._raw(_MUNMAP, result, length)
        return 0, OUTSIDE

    def _lines(self, fd: int) -> Iterator[str]:
        at, rest = 0, ""
        while True:
            text = os.pread(fd, 1 << 16, at).decode()
            if not text:
                return
            at += len(text)
            *lines, rest = (rest + text).split("\n")
            yield from lines

    def maps(self) -> list[Line]:
        found = []
        for line in self._lines(self._maps):
            range_, perms, offset, device, ino, *name = line.split(None, 5)
            start, end = (int(bound, 16) for bound in range_.split("-"))
            if start >= END:
                break
            if end > ARENA:
                label = self._label(device, ino, name[0] if name else "")
                found.append(
                    ((start - ARENA) // PAGE, (end - ARENA) // PAGE, perms, int(offset, 16) // PAGE, label)
                )
        return found

    def _label(self, device: str, ino: str, name: str) -> str:
        if ino == "0":
            return name
        if name.startswith("/dev/zero"):
            return self._shm.setdefault(ino, f"shm{len(self._shm)}")
        return self._names[device, ino]

    def vm_flags(self) -> list[tuple[int, frozenset[str]]]:
        found = []
        start = 0
        for line in self._lines(self._smaps):
            if line.startswith("VmFlags:"):
                if start >= ARENA:
                    letters = frozenset(line.split()[1:])
                    found.append(((start - ARENA) // PAGE, letters & FLAG_LETTERS.keys()))
            elif line[0] in "0123456789abcdef":
                start = int(line.split("-")[0], 16)
                if start >= END:
                    break
        return found


# -------------------------------------------------------------------------------------------- the model


class Model:
    """A model address space with the same files."""

    def __init__(self, like: "RunningKernel | None" = None) -> None:
        self._older = ExitStack()
        if like is not None and not like.leaves_account_behind():
            self._older.enter_context(older_dontunmap())
        current().held_locks.clear()
        boot()
        self.files = {name: open_file(f"/{name}", size=FILE_PAGES * PAGE) for name in "AB"}
        self.files["A2"] = open_file("/A", size=FILE_PAGES * PAGE)
        self.files["Ar"] = open_file("/A", size=FILE_PAGES * PAGE, writable=False)
        self.files["Aw"] = open_file("/A", size=FILE_PAGES * PAGE)
        self.files["Aw"].f_mode &= ~FMODE_READ
        self._inodes = {id(self.files[name].f_inode): name for name in "AB"}
        self._shm: dict[int, str] = {}
        self.mm: MmStruct | None = None
        self._resets = 0

    def close(self) -> None:
        """Nothing of this run is left for the next one."""
        if self.mm is not None:
            mmput(self.mm)
            self.mm = None
        self._older.close()

    def reset(self) -> None:
        if self.mm is not None:
            mmput(self.mm)
        self._resets += 1
        if self._resets % 64 == 0:
            rcu_barrier()
        mm = mm_alloc()
        assert mm is not None
        mm.start_brk = mm.brk = END
        self.mm = mm
        self._shm.clear()

    def do(self, call: Call) -> Answer:
        assert self.mm is not None
        try:
            return 0, self._do(self.mm, *call)
        except OSError as error:
            return error.errno or -1, 0

    def _do(self, mm: MmStruct, name: str, *args: Any) -> int | str:
        match name:
            case "mmap":
                addr, length, prot, bits, file, page = args
                opened = self.files[file] if file is not None else None
                return self._place(mm, mmap(mm, addr, length, prot, bits, opened, page), length)
            case "mremap":
                return self._place(mm, mremap(mm, *args), args[2])
            case "munmap":
                munmap(mm, *args)
            case "mprotect":
                mprotect(mm, *args)
            case "madvise":
                madvise(mm, *args)
            case "brk":
                return brk(mm, *args)
            case "heap":
                mm.start_brk = mm.brk = args[0]
            case "name":
                prctl_set_vma_anon_name(mm, *args)
            case "touch":
                self._fault(mm, args[0], write=True)
            case "peek":
                self._fault(mm, args[0], write=False)
            case _:
                raise ValueError(name)
        return 0

    def _place(self, mm: MmStruct, result: int, length: int) -> int | str:
        if ARENA <= result < END:
            return result
        munmap(mm, result, length)
        return OUTSIDE

    def _fault(self, mm: MmStruct, addr: int, *, write: bool) -> None:
        """One byte is written or read; a program would get a signal where the kernel's copy gets EFAULT."""
        try:
            if write:
                user_store(mm, addr, b"\0")
            else:
                user_load(mm, addr)
        except Signal as error:
            raise OSError(EFAULT, "") from error

    def _vmas(self) -> list[Any]:
        mm = self.mm
        assert mm is not None
        mmap_read_lock(mm)
        vmas = list(for_each_vma(mm))
        mmap_read_unlock(mm)
        return vmas

    def maps(self) -> list[Line]:
        found = []
        assert self.mm is not None
        for vma in self._vmas():
            bits = vma.vm_flags
            perms = "".join(
                letter if bits & bit else "-" for letter, bit in zip("rwx", (1, 2, 4), strict=True)
            )
            perms += "s" if bits & VM_MAYSHARE else "p"
            offset, label = 0, ""
            if vma.vm_file is not None:
                offset, label = vma.vm_pgoff, self._label(vma.vm_file.f_inode)
            elif vma.vm_start < self.mm.brk and vma.vm_end > self.mm.start_brk:
                label = "[heap]"
            elif vma.anon_name is not None:
                label = f"[anon:{vma.anon_name}]"
            found.append(((vma.vm_start - ARENA) // PAGE, (vma.vm_end - ARENA) // PAGE, perms, offset, label))
        return found

    def _label(self, inode: Any) -> str:
        name = self._inodes.get(id(inode))
        return name or self._shm.setdefault(id(inode), f"shm{len(self._shm)}")

    def vm_flags(self) -> list[tuple[int, frozenset[str]]]:
        known = [(two, getattr(flags, name)) for two, name in FLAG_LETTERS.items()]
        return [
            (
                (vma.vm_start - ARENA) // PAGE,
                frozenset(letters for letters, bit in known if vma.vm_flags & bit),
            )
            for vma in self._vmas()
        ]

    def check(self) -> None:
        """The model's own invariants."""
        mm = self.mm
        assert mm is not None
        check_invariants(mm.mm_mt)
        assert mm.map_count == len(self._vmas()), "map_count"
        assert mm.total_vm == sum((vma.vm_end - vma.vm_start) // PAGE for vma in self._vmas()), "total_vm"
        assert not kernel_warnings(), kernel_warnings()


# ------------------------------------------------------------------------------------------ comparing


@attrs.frozen
class Difference(Exception):
    """After the last of these calls the two sides differ."""

    calls: Sequence[Call]
    before: list[Line]
    what: str
    kernel: Any
    model: Any

    def __str__(self) -> str:
        lines = [f"after {len(self.calls)} calls the {self.what} differ", *map(show, self.calls)]
        lines += ["before the last call:", *(f"    {line}" for line in self.before)]
        for side, value in (("kernel", self.kernel), ("model", self.model)):
            lines.append(f"{side}:")
            lines += [f"    {line}" for line in (value if isinstance(value, list) else [value])]
        return "\n".join(lines)


def show(call: Call) -> str:
    """A call, with addresses as pages of the arena."""
    return f"    {call[0]}({', '.join(map(_argument, call[1:]))})"


def _argument(value: Any) -> str:
    if isinstance(value, int) and ARENA <= value <= END + (1 << 20):
        page, rest = divmod(value - ARENA, PAGE)
        return f"@{page}" + (f"+{rest}" if rest else "")
    if isinstance(value, int) and value and value % PAGE == 0 and value < 1 << 24:
        return f"{value // PAGE}p"
    return hex(value) if isinstance(value, int) and value > 9 else repr(value)


def compare(kernel: Side, model: Model, calls: Sequence[Call], *, smaps_every: int = 1) -> int:
    """Do the calls on both sides, from nothing; the number of calls. Difference at the first one."""
    kernel.reset()
    model.reset()
    before: list[Line] = []
    for i in range(len(calls)):
        before, _errno = step(kernel, model, calls[: i + 1], before, smaps=i % smaps_every == smaps_every - 1)
    model.check()
    return len(calls)


def step(
    kernel: Side, model: Model, calls: Sequence[Call], before: list[Line], *, smaps: bool
) -> tuple[list[Line], int]:
    """Do the last call on both sides: the maps afterwards, and errno."""
    call = calls[-1]
    real, modelled = kernel.do(call), model.do(call)
    if real != modelled:
        raise Difference(list(calls), before, "answers (errno, address)", real, modelled)
    after, also = kernel.maps(), model.maps()
    if after != also:
        raise Difference(list(calls), before, "maps", after, also)
    if smaps:
        real_flags, model_flags = kernel.vm_flags(), model.vm_flags()
        if real_flags != model_flags:
            differ = [(a, b) for a, b in zip(real_flags, model_flags, strict=True) if a != b]
            raise Difference(
                list(calls),
                before,
                "flags",
                [(a[0], sorted(a[1] - b[1]), "not in the model") for a, b in differ],
                [(b[0], sorted(b[1] - a[1]), "not in the kernel") for a, b in differ],
            )
    return after, real[0]
