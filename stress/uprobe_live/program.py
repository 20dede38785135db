"""The probed program: built once, started, and told what to do. Each process of it serves a socket."""

import contextlib
import os
import socket
import subprocess
from pathlib import Path
from typing import Final

from elftools.elf.elffile import ELFFile

PAGE: Final = 4096
ARENA: Final = 0x20_0000_0000
SLOTS: Final = 4
FUNC_SIZE: Final = 64
FUNCTIONS: Final = "abcdefghijkl"
MOST_PROCESSES: Final = 3
ANSWER_SECONDS: Final = 20.0
SOURCES: Final = Path(__file__).parent

FILE_PAGES: Final = 3
"""A page of code, a page of counters, the page of code again."""


def offset_of(function: str, page: int = 0) -> int:
    """Where the function is in a file of code."""
    return page * PAGE + (ord(function) - ord("a")) * FUNC_SIZE


def address_of(function: str, slot: int) -> int:
    """Where it is in memory if that slot of the arena holds a page of code."""
    return ARENA + slot * PAGE + offset_of(function)


def build(folder: Path) -> Path:
    """Compile the program into `folder`, and make the code files A and B there; the program's path."""
    program, code = folder / "target", folder / "code.o"
    subprocess.run(["gcc", "-O2", "-w", "-o", program, SOURCES / "target.c", "-lpthread"], check=True)
    subprocess.run(["gcc", "-c", "-o", code, SOURCES / "code.S"], check=True)
    text = code_of(code)
    for name in "AB":
        (folder / name).write_bytes(text + bytes(PAGE) + text)
    return program


def code_of(path: Path) -> bytes:
    """One page of code: the .text of an object file without relocations."""
    with open(path, "rb") as stream:
        elf = ELFFile(stream)
        section = elf.get_section_by_name(".text")
        assert section is not None
        assert elf.get_section_by_name(".rela.text") is None
        text = bytes(section.data())
    assert len(text) == PAGE
    return text


class Process:
    """One process of the program."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self._sock = sock
        self._sock.settimeout(ANSWER_SECONDS)
        self._reader = sock.makefile("r")

    def ask(self, *words: object) -> int:
        """One command; its answer."""
        self._sock.sendall((" ".join(map(str, words)) + "\n").encode())
        try:
            line = self._reader.readline()
        except TimeoutError:
            line = ""  # its end of the socket is its relatives' too, so that its end closes nothing
        if not line:
            raise RuntimeError(f"process {self.pid} of the probed program does not answer to {words}")
        return int(line)

    def leave(self) -> None:
        """Tell the process to exit; it has when its end of the socket is closed."""
        self._sock.sendall(b"x\n")
        while Path(f"/proc/{self.pid}").exists() and not _zombie(self.pid):
            os.sched_yield()

    def memory(self, address: int, n: int) -> bytes | None:
        """Bytes of its memory as it is, breakpoints included; None where nothing is mapped."""
        try:
            with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as mem:
                mem.seek(address)
                return mem.read(n)
        except OSError:
            return None

    def maps(self) -> str:
        """The text of /proc/PID/maps."""
        return Path(f"/proc/{self.pid}/maps").read_text()


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Program:
    """The program, running; a context manager that ends it and its children."""

    def __init__(self, path: Path, files: dict[str, Path]) -> None:
        self.files = {name: os.open(file, os.O_RDWR) for name, file in files.items()}
        self._pairs = [socket.socketpair() for _ in range(MOST_PROCESSES)]
        theirs = [pair[1].fileno() for pair in self._pairs]
        # The children's descriptors follow each other, so that an index names one.
        self._base = 200
        for n, fd in enumerate(theirs):
            os.dup2(fd, self._base + n)
        passed = [*range(self._base, self._base + len(theirs)), *self.files.values()]
        self._popen = subprocess.Popen([path, str(self._base)], pass_fds=passed, stdin=subprocess.DEVNULL)
        for n in range(len(theirs)):
            os.close(self._base + n)
        # One CPU: records of one process are in the order of its steps.
        os.sched_setaffinity(self._popen.pid, {min(os.sched_getaffinity(0))})
        self.processes: dict[int, Process] = {0: Process(self._popen.pid, self._pairs[0][0])}

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            for process in self.processes.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, 9)
            self._popen.wait()
        finally:
            for pair in self._pairs:
                for sock in pair:
                    sock.close()
            for process in self.processes.values():
                process._reader.close()
            for fd in self.files.values():
                os.close(fd)

    def fork(self, parent: int, child: int) -> int:
        """Process `parent` forks a child that is called `child` from here on; its pid."""
        pid = self.processes[parent].ask("f", child)
        self.processes[child] = Process(pid, self._pairs[child][0])
        return pid

    def leave(self, index: int) -> None:
        """That child exits."""
        process = self.processes.pop(index)
        process.leave()
        process._reader.close()
