"""Uprobe events of our own in tracefs, and perf events: made, switched and, whatever happens, removed.

Every name begins with kmodel_live_ and our pid; what a run that was killed left behind is removed by the
next. Nothing of tracefs that belongs to others is read or written: records go to an instance of our own,
which takes them from the pids that it is told, and their children.
"""

import ctypes
import errno
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

TRACEFS: Final = Path("/sys/kernel/tracing")
UPROBE_PMU: Final = Path("/sys/bus/event_source/devices/uprobe")
PREFIX: Final = "kmodel_live_"

_SYS_PERF_EVENT_OPEN: Final = 298
_PERF_FLAG_FD_CLOEXEC: Final = 8
_RECORD = re.compile(
    r"^\s*.+-(?P<tid>\d+)\s+\[\d+\]\s+\S+\s+[\d.]+: (?P<event>\w+): \((?P<at>\w+)(?: <- (?P<func>\w+))?\)"
)


@attrs.frozen
class Record:
    """One line of the trace: which task, which event, where; for a return probe also which function."""

    tid: int
    event: str
    at: int
    func: int | None = None


def why_not_here() -> str | None:
    """Why uprobes cannot be tried on this machine; None if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    if os.geteuid() != 0:
        return "uprobe events need root"
    if shutil.which("gcc") is None:
        return "needs gcc to build the probed program"
    if not TRACEFS.is_dir():
        return f"{TRACEFS} is not there: this kernel has no tracefs"
    if not (TRACEFS / "uprobe_events").exists():
        mounted = subprocess.run(
            ["mount", "-t", "tracefs", "tracefs", str(TRACEFS)], capture_output=True, check=False
        )
        if mounted.returncode or not (TRACEFS / "uprobe_events").exists():
            return f"no uprobe_events in {TRACEFS}, and tracefs cannot be mounted there"
    try:
        os.close(os.open(TRACEFS / "uprobe_events", os.O_WRONLY | os.O_APPEND))
    except OSError as error:
        return f"uprobe_events: {error.strerror}"
    if not os.access(TRACEFS / "instances", os.W_OK):
        return "tracefs instances cannot be made"
    return None


def write(path: Path, text: str) -> int:
    """One write(2) to a control file: 0 or the errno. Without O_TRUNC, which empties uprobe_events."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        return error.errno or -1
    try:
        os.write(fd, text.encode())
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(fd)
    return 0


def _pid_of(name: str) -> int | None:
    found = re.match(PREFIX + r"(\d+)$", name)
    return int(found[1]) if found else None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove(group: str) -> None:
    """Remove the instance and the events of this group: switched off first, or they are busy."""
    instance = TRACEFS / "instances" / group
    if instance.is_dir():
        write(instance / "events" / group / "enable", "0")
        instance.rmdir()
    for line in (TRACEFS / "uprobe_events").read_text().splitlines():
        event = line.split()[0].partition(":")[2]
        if event.startswith(group + "/"):
            write(TRACEFS / "uprobe_events", f"-:{event}\n")


def remove_leftovers() -> list[str]:
    """Remove what runs of this program left that are no more; the groups."""
    groups = {line.split()[0].partition(":")[2].partition("/")[0] for line in definitions()}
    groups |= {path.name for path in (TRACEFS / "instances").iterdir()}
    left = []
    for group in sorted(groups):
        pid = _pid_of(group)
        if pid is not None and not _alive(pid):
            remove(group)
            left.append(group)
    return left


def definitions() -> list[str]:
    """Every line of uprobe_events."""
    return (TRACEFS / "uprobe_events").read_text().splitlines()


class Tracefs:
    """A group of events and an instance that records them. A context manager: nothing is left behind."""

    def __init__(self) -> None:
        self.group = f"{PREFIX}{os.getpid()}"
        self.instance = TRACEFS / "instances" / self.group
        self._fds: list[int] = []
        type_file = UPROBE_PMU / "type"
        self.pmu = int(type_file.read_text()) if type_file.exists() else None
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long

    def __enter__(self) -> "Tracefs":
        remove_leftovers()
        remove(self.group)  # a process of this number that is no more
        self.instance.mkdir()
        try:
            write(self.instance / "buffer_size_kb", "1024")
            write(self.instance / "options" / "event-fork", "1")
        except BaseException:
            remove(self.group)
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            for fd in self._fds:
                os.close(fd)
            self._fds.clear()
        finally:
            remove(self.group)

    # events -------------------------------------------------------------------------------------------

    def define(self, name: str, what: str) -> int:
        """Define event `name`: "p PATH:0xOFFSET" or "r ..."; 0 or the errno."""
        kind, _, place = what.partition(" ")
        return write(TRACEFS / "uprobe_events", f"{kind}:{self.group}/{name} {place}\n")

    def undefine(self, name: str) -> int:
        """Remove the definition; EBUSY while it is enabled."""
        return write(TRACEFS / "uprobe_events", f"-:{self.group}/{name}\n")

    def enable(self, name: str, on: bool = True) -> int:
        """Switch the event on (uprobe_register) or off (uprobe_unregister): 0 or the errno."""
        return write(self.instance / "events" / self.group / name / "enable", str(int(on)))

    def follow(self, *pids: int) -> None:
        """Record these tasks and the children that they will have; nobody else."""
        path = self.instance / "set_event_pid"
        path.write_text(" ".join(map(str, pids)))
        text = path.read_text().split()
        assert {str(pid) for pid in pids} <= set(text), text

    def records(self) -> list[Record]:
        """What was recorded since the last call, oldest first."""
        path = self.instance / "trace"
        found = list(self._parse(path.read_text().splitlines()))
        path.write_text("")
        return found

    def _parse(self, lines: list[str]) -> Iterator[Record]:
        for line in lines:
            if line.startswith("#") or not line.strip():
                assert "lost" not in line.lower(), line
                continue
            match = _RECORD.match(line)
            assert match is not None, line
            func = int(match["func"], 16) if match["func"] else None
            yield Record(int(match["tid"]), match["event"], int(match["at"], 16), func)

    # perf ---------------------------------------------------------------------------------------------

    def perf_open(self, path: str, offset: int, pid: int, *, ref_ctr: int = 0, ret: bool = False) -> int:
        """A counter of hits by one task: its descriptor, or minus errno."""
        assert self.pmu is not None
        name = ctypes.create_string_buffer(path.encode())
        attr = ctypes.create_string_buffer(128)
        struct.pack_into("<IIQQQQ", attr, 0, self.pmu, 128, ref_ctr << 32 | ret, 0, 0, 0)
        struct.pack_into("<QQ", attr, 56, ctypes.addressof(name), offset)
        fd = self._syscall(
            ctypes.c_long(_SYS_PERF_EVENT_OPEN),
            ctypes.c_void_p(ctypes.addressof(attr)),
            *(ctypes.c_long(value) for value in (pid, -1, -1, _PERF_FLAG_FD_CLOEXEC)),
        )
        if fd < 0:
            return -ctypes.get_errno()
        self._fds.append(fd)
        return int(fd)

    def perf_count(self, fd: int) -> int:
        """How many hits it has counted."""
        return int(struct.unpack("<Q", os.read(fd, 8))[0])

    def perf_close(self, fd: int) -> None:
        """Stop counting."""
        self._fds.remove(fd)
        os.close(fd)


def errno_name(number: int) -> str:
    """EINVAL and the like; 524 has no name outside of the kernel."""
    return "ENOTSUPP" if number == 524 else errno.errorcode.get(number, str(number))
