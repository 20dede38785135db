"""Whose address space is loaded: /proc/PID/maps of a live process, or a file that looks like it.

Models:      fs/proc/task_mmu.c, show_map_vma: the line format that is read here
Guards:      none; runs before any task does
Invariants:  W1 what is read is checked line by line, W2 a mapped file is used only if it is still the file
             that was mapped
Leaves out:  smaps, namespaces of --maps FILE (its paths are taken as this machine's)
Read next:   torture/probes.py
"""

import os
import re
from pathlib import Path

import attrs

from kmodel.mm.flags import PAGE_SIZE, TASK_SIZE
from kmodel.torture.elf import is_elf

GATE = "[vsyscall]"
"""The one mapping above user space that a process has."""

LONGEST_FILE = 64 << 20
"""Ten times what 65,530 mappings (vm.max_map_count) with ordinary paths make."""

_LINE = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<perms>[r-][w-][x-][ps]) (?P<offset>[0-9a-f]+) "
    r"(?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+) *(?P<path>.*)$"
)


class BadSource(ValueError):
    """The address space cannot be loaded; the text says why."""


@attrs.frozen
class Mapping:
    """One line of a maps file."""

    start: int
    end: int
    perms: str
    offset: int
    dev: tuple[int, int]
    inode: int
    path: str

    @property
    def executable_file(self) -> bool:
        """Whether uprobes may live here: private, executable, backed by a file (valid_vma)."""
        return self.perms[2] == "x" and self.perms[3] == "p" and self.path.startswith("/")


@attrs.frozen
class Source:
    """An address space as text, and how to find its files."""

    title: str
    text: str
    mappings: tuple[Mapping, ...]
    root: str = ""
    check_inodes: bool = True

    def readable_elf_files(self) -> list[str]:
        """The paths of executable mapped files that can be read here as ELF files and are still what was
        mapped.
        """
        wanted = {m.path: m for m in self.mappings if m.executable_file}
        return [path for path, mapping in wanted.items() if self._usable(path, mapping)]

    def _usable(self, path: str, mapping: Mapping) -> bool:
        here = self.root + path
        if path.endswith(" (deleted)") or not is_elf(here):
            return False
        return not self.check_inodes or Path(here).stat().st_ino == mapping.inode


def parse_maps(text: str, name: str, *, torn: bool = False) -> tuple[Mapping, ...]:
    """Read the text of a maps file; BadSource names the first line that is not one.

    `torn`: the text was read while mappings changed, so that a line may begin before the end of the one above
    it, which was another mapping then. Ends only grow even so, because the end is where reading goes on.
    """
    mappings: list[Mapping] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = _LINE.match(line)
        if match is None:
            raise BadSource(f"{name} line {number} is not a line of /proc/PID/maps: {line[:60]!r}")
        mapping = Mapping(
            int(match["start"], 16),
            int(match["end"], 16),
            match["perms"],
            int(match["offset"], 16),
            (int(match["major"], 16), int(match["minor"], 16)),
            int(match["inode"]),
            match["path"].strip(),
        )
        before = mappings[-1].end if mappings else 0
        if mapping.start >= mapping.end or mapping.end <= before or (mapping.start < before and not torn):
            raise BadSource(f"{name} line {number}: {line.split()[0]} is empty or not in order")
        if (mapping.start | mapping.end | mapping.offset) % PAGE_SIZE:
            raise BadSource(f"{name} line {number}: {line[:60]!r} does not lie on pages of {PAGE_SIZE} bytes")
        if mapping.end > TASK_SIZE and mapping.path != GATE:
            raise BadSource(
                f"{name} line {number}: {line.split()[0]} is not in user space, below {TASK_SIZE:#x}"
            )
        mappings.append(mapping)
    if not mappings:
        raise BadSource(f"{name} has no mappings")
    return tuple(mappings)


def read_process(pid: int | None) -> Source:
    """The address space of a live process, this one by default."""
    path = Path("/proc") / ("self" if pid is None else str(pid)) / "maps"
    try:
        text = path.read_text(errors="surrogateescape", newline="")
    except FileNotFoundError:
        raise BadSource(
            f"there is no process {pid}" if pid is not None else "there is no /proc/self/maps here"
        ) from None
    except OSError as error:
        raise BadSource(f"{path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise BadSource(f"process {pid} has no user address space (a kernel thread, or ending)")
    title = f"own process ({os.getpid()})" if pid is None else f"process {pid} ({_comm(pid)})"
    root = "" if pid is None or _same_root(pid) else f"/proc/{pid}/root"
    return Source(title, text, parse_maps(text, str(path)), root)


def _comm(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "comm").read_text().strip()
    except OSError:
        return "?"


def _same_root(pid: int) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/root", "/proc/self/root")
    except OSError:
        return True


def read_file(path: str) -> Source:
    """A saved maps file. Its paths are looked up on this machine; those that are not here get no probes."""
    try:
        with open(path, errors="surrogateescape", newline="") as stream:
            text = stream.read(LONGEST_FILE + 1)
    except OSError as error:
        raise BadSource(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > LONGEST_FILE:
        raise BadSource(f"{path} is longer than any maps file ({LONGEST_FILE >> 20} MiB)")
    return Source(f"maps file {path}", text, parse_maps(text, path), check_inodes=False)
