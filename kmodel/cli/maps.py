"""`kmodel maps`: a process's address space, loaded into the model, as the model's /proc/PID/maps says it.

Models:      nothing in Linux
Guards:      none
Invariants:  exit status 0 printed, or no difference found; 1 the kernel says something else; 2 bad usage, or
             a
             process that cannot be read
Leaves out:  what the text does not say: see docs/limits.md
Read next:   mm/from_proc_maps.py, proc/maps.py
"""

import argparse
import ctypes
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from typing import Any, Final

import attrs

from kmodel.mm import MmStruct, mmput, vma_lookup
from kmodel.mm.from_proc_maps import parse_maps
from kmodel.proc import (
    PROCMAP_QUERY,
    PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
    PROCMAP_QUERY_FILE_BACKED_VMA,
    ProcmapQuery,
    maps_variants,
    proc_maps,
    proc_maps_reads,
    procmap_ioctl,
)
from kmodel.torture import BadUsage

__all__ = ["Checked", "NotReadable", "add_parser", "check", "run"]

ATTEMPTS: Final = 20
READ_SIZES: Final = (1 << 16, 1000)
NAME_SIZE: Final = 4096
BUILD_ID_SIZE: Final = 20
FLAGS: Final = (
    0x01,
    0x02,
    0x04,
    0x08,
    PROCMAP_QUERY_FILE_BACKED_VMA,
    PROCMAP_QUERY_FILE_BACKED_VMA | 0x05,
)

EPILOG = """\
--check reads the text, loads it into the model, and compares byte for byte what the model's readers say (each
variant, and where each read(2) ends) and what its PROCMAP_QUERY answers for every mapping and every hole with
what the running kernel says. A process that changed meanwhile is tried again.

exit status: 0 printed, or no difference; 1 a difference; 2 bad usage, or a process that cannot be read.
"""


class NotReadable(Exception):
    """The process is gone, or not ours to read."""


@attrs.define
class Checked:
    """What came of comparing one process."""

    pid: int
    mappings: int = 0
    queries: int = 0
    changing: bool = False
    differences: list[str] = attrs.field(factory=list)


def add_parser(subparsers: Any) -> None:
    """Add `maps` to the command."""
    parser = subparsers.add_parser(
        "maps",
        help="print a process's mappings as the model says them, or compare with the kernel",
        description="Load a process's address space into the model and print its /proc/PID/maps.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pid", nargs="?", metavar="PID|self", help="the process")
    parser.add_argument("--all", action="store_true", help="compare every process that may be read")
    parser.add_argument("--check", action="store_true", help="compare with the kernel instead of printing")
    parser.add_argument(
        "--variant",
        choices=tuple(maps_variants()),
        default="vma-lock",
        help="how the model reads (default: vma-lock, as since 6.17); --check compares all of them",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print or compare; the exit status."""
    if arguments.all == (arguments.pid is not None):
        raise BadUsage("say PID, self or --all")
    if arguments.all:
        return _check_all()
    pid = _pid(arguments.pid)
    try:
        if arguments.check:
            checked = check(pid)
            _print_differences(checked)
            print(_one_line(checked))
            return 1 if checked.differences else 0
        text = _load_and_print(pid, arguments.variant)
    except NotReadable as error:
        raise BadUsage(str(error)) from error
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(text))
    sys.stdout.buffer.flush()
    return 0


def _pid(text: str) -> int:
    if text == "self":
        return os.getpid()
    if not text.isdecimal():
        raise BadUsage(f"{text!r} is neither a process number nor 'self'")
    return int(text)


def _load_and_print(pid: int, variant: str) -> str:
    mm = _load(b"".join(_reads(pid, 1 << 16)))
    try:
        return proc_maps(mm, variant)
    finally:
        _unload(mm)


def _load(text: bytes) -> MmStruct | None:
    """The address space; None for the empty text of a kernel thread or of a process that has ended."""
    return MmStruct.from_proc_maps(os.fsdecode(text)) if text else None


def _unload(mm: MmStruct | None) -> None:
    if mm is not None:
        mmput(mm)


def _open(pid: int) -> int:
    try:
        return os.open(f"/proc/{pid}/maps", os.O_RDONLY)
    except FileNotFoundError:
        raise NotReadable(f"there is no process {pid}") from None
    except OSError as error:
        raise NotReadable(f"/proc/{pid}/maps cannot be read: {error.strerror}") from error


def _reads(pid: int, size: int) -> list[bytes]:
    fd = _open(pid)
    try:
        reads = []
        while data := os.read(fd, size):
            reads.append(data)
        return reads
    except OSError as error:
        raise NotReadable(f"/proc/{pid}/maps cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


# ------------------------------------------------------------------------------------------------ comparing


def check(
    pid: int, *, queries: bool = True, name_size: int = NAME_SIZE, build_id_size: int = BUILD_ID_SIZE
) -> Checked:
    """Compare one process; NotReadable if it cannot be. The sizes are of the buffers for queries."""
    checked = Checked(pid)
    for _attempt in range(ATTEMPTS):
        before = b"".join(_reads(pid, 1 << 16))
        checked = _check_once(pid, before, (name_size, build_id_size) if queries else None)
        # What differs because the process changed is no difference.
        if not checked.differences or b"".join(_reads(pid, 1 << 16)) == before:
            return checked
    checked.differences.clear()
    checked.changing = True
    return checked


def _check_once(pid: int, text: bytes, sizes: tuple[int, int] | None) -> Checked:
    checked = Checked(pid, mappings=text.count(b"\n"))
    kernel = {size: _reads(pid, size) for size in READ_SIZES}
    mm = _load(text)
    try:
        for name in maps_variants():
            model = os.fsencode(proc_maps(mm, name))
            if model != text:
                checked.differences.append(f"{name}: {_first_difference(model, text)}")
        for size, reads in kernel.items():
            model_reads = list(proc_maps_reads(mm, size))
            if model_reads != reads:
                lengths = [len(data) for data in model_reads], [len(data) for data in reads]
                checked.differences.append(f"reads of {size}: {lengths[0]}, the kernel's {lengths[1]}")
        if sizes is not None:
            fd = _open(pid)
            try:
                _check_queries(checked, mm, fd, text, *sizes)
            finally:
                os.close(fd)
    finally:
        _unload(mm)
    return checked


def _first_difference(model: bytes, kernel: bytes) -> str:
    for ours, theirs in zip(model.split(b"\n"), kernel.split(b"\n"), strict=False):
        if ours != theirs:
            return f"{ours!r}, the kernel's {theirs!r}"
    return f"{model.count(b'\n')} lines, the kernel's {kernel.count(b'\n')}"


def _questions(text: bytes) -> Iterator[tuple[int, int]]:
    """(address, flags): in every mapping, behind it, and from there for the next one of each kind."""
    yield 0, 0
    for line in parse_maps(os.fsdecode(text)):
        for addr in (line.start, line.end - 1, line.end):
            yield addr, 0
            yield addr, PROCMAP_QUERY_COVERING_OR_NEXT_VMA
        for flags in FLAGS:
            yield line.start, flags
            yield line.end, flags | PROCMAP_QUERY_COVERING_OR_NEXT_VMA


def _check_queries(
    checked: Checked, mm: MmStruct | None, fd: int, text: bytes, name_size: int, build_id_size: int
) -> None:
    name, build_id = ctypes.create_string_buffer(NAME_SIZE), ctypes.create_string_buffer(BUILD_ID_SIZE)
    for addr, flags in dict.fromkeys(_questions(text)):
        query = ProcmapQuery(query_flags=flags, query_addr=addr)
        if name_size:
            query.vma_name_size, query.vma_name_addr = name_size, ctypes.addressof(name)
        if build_id_size and _contents_known(mm, addr):
            query.build_id_size, query.build_id_addr = build_id_size, ctypes.addressof(build_id)
        theirs = bytearray(query.pack())
        ours = bytearray(theirs)
        try:
            result = fcntl.ioctl(fd, PROCMAP_QUERY, theirs, True)
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return  # before 6.11
            result = -(error.errno or 0)
        memory = {query.vma_name_addr: bytearray(NAME_SIZE), query.build_id_addr: bytearray(BUILD_ID_SIZE)}
        answer = procmap_ioctl(mm, PROCMAP_QUERY, ours, memory)
        checked.queries += 1
        model: Any = answer or ProcmapQuery.unpack(bytes(ours))
        kernel: Any = result or ProcmapQuery.unpack(bytes(theirs))
        same = model == kernel
        if same and not answer:
            said = (
                (query.vma_name_addr, model.vma_name_size, name.raw),
                (query.build_id_addr, model.build_id_size, build_id.raw),
            )
            same = all(memory[at][:size] == raw[:size] for at, size, raw in said if size)
        if not same:
            checked.differences.append(f"query {addr:#x} flags {flags:#x}: {model}, the kernel's {kernel}")


def _contents_known(mm: MmStruct | None, addr: int) -> bool:
    """Whether the model can read the file there, so that it may be asked for its build ID."""
    vma = None if mm is None else vma_lookup(mm, addr)
    file = None if vma is None else vma.vm_file
    return file is not None and file.f_inode.contents is not None


# ------------------------------------------------------------------------------------------------ reports


def _check_all() -> int:
    results: list[Checked] = []
    unreadable = 0
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            results.append(check(pid))
        except NotReadable:
            unreadable += 1
            continue
        _print_differences(results[-1])
    differing = sum(bool(checked.differences) for checked in results)
    text = (
        f"{len(results):,} processes, {sum(checked.mappings for checked in results):,} mappings, "
        f"{sum(checked.queries for checked in results):,} queries, {_kernel()}: "
        f"{differing:,} processes differ"
    )
    changing = sum(checked.changing for checked in results)
    if changing:
        text += f"; {changing:,} kept changing"
    if unreadable:
        text += f"; {unreadable:,} could not be read"
    print(text)
    return 1 if differing else 0


def _kernel() -> str:
    uname = os.uname()
    return f"{uname.sysname} {uname.release}"


def _one_line(checked: Checked) -> str:
    if checked.changing:
        return f"process {checked.pid} kept changing while it was read: not compared"
    said = f"{len(checked.differences):,} differences" if checked.differences else "no difference"
    counts = f"{checked.mappings:,} mappings, {checked.queries:,} queries"
    return f"process {checked.pid}, {counts}, {_kernel()}: {said}"


def _print_differences(checked: Checked, most: int = 10) -> None:
    for text in checked.differences[:most]:
        print(f"process {checked.pid}: {text}")
