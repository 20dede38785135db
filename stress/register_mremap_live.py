"""Does the running kernel miss mappings that mremap(2) moves beside a registration?

docs/findings/register-mremap.md says why it may. Two processes of this program's own map a page of code
and move it to and fro. A probe of that page is enabled and disabled through tracefs; after each, they are
stopped and the probed byte is read. Then the same with both stopped all the time. With --run they also call
the code, and may be killed by SIGTRAP.

    python -m stress.register_mremap_live --seconds 20

Needs root, tracefs and a C compiler. Only the file it makes is probed, and the probe is removed at the end.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
INT3, RET = 0xCC, 0xC3
OFFSET = 0x10
MOVER = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#define MOVE(from, to) if (mremap(from, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, to) != (to)) return 4
int main(int argc, char **argv) {
  char *area = mmap(0, 1 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char *a = area + 0x10000, *b = area + 0x80000;
  int fd = open(argv[1], O_RDONLY);
  if (mmap(a, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, fd, 0) != a) return 3;
  puts("ready");
  fflush(stdout);
  for (;;) {
    MOVE(a, b);
    MOVE(b, a);
    if (argc > 2) ((void (*)(void))(a + 0x10))();
  }
}
"""


def define(line: str) -> None:
    """One line for uprobe_events."""
    fd = os.open(TRACING / "uprobe_events", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def stopped(pid: int) -> bool:
    """Whether the process is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def probed_byte(pid: int, code: Path) -> int:
    """The byte at the probed place, in a process that is stopped."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith(str(code)):
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                memory.seek(int(line.split("-")[0], 16) + OFFSET)
                return memory.read(1)[0]
    raise RuntimeError(f"{code} is not mapped")


def look(pids: Sequence[int], code: Path) -> list[int]:
    """The probed byte of each, all of them stopped meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        while not stopped(pid):
            time.sleep(0.0005)
    return [probed_byte(pid, code) for pid in pids]


def rounds(pids: Sequence[int], code: Path, enable: Path, seconds: float, moving: bool) -> Counter[str]:
    """Enable, look, disable, look, and again."""
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for value, wrong, name in (
            ("1", RET, "without it after enabling"),
            ("0", INT3, "with it after disabling"),
        ):
            if moving:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
            enable.write_text(value)
            seen[name] += look(pids, code).count(wrong)
            seen["looks"] += len(pids)
    return seen


def main(argv: Sequence[str] | None = None) -> int:
    """The program: 0 if every mapping was right, 1 if some were not, 2 if it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m stress.register_mremap_live")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--run", action="store_true", help="the processes call the code, too")
    given = parser.parse_args(argv)
    if os.geteuid() or not (TRACING / "uprobe_events").exists():
        print("needs root, and tracefs at /sys/kernel/tracing", file=sys.stderr)
        return 2
    group = f"kmodel_mremap_{os.getpid()}"
    enable = TRACING / "events" / group / "moved" / "enable"
    movers: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as name:
        code, program = Path(name) / "code", Path(name) / "mover"
        code.write_bytes(bytes([RET]) * 4096)
        subprocess.run(["cc", "-O2", "-xc", "-o", program, "-"], input=MOVER.encode(), check=True)
        define(f"p:{group}/moved {code}:{OFFSET:#x}\n")
        try:
            for _ in range(2):
                arguments = [str(program), str(code), *(["run"] if given.run else [])]
                movers.append(subprocess.Popen(arguments, stdout=subprocess.PIPE))
                assert movers[-1].stdout is not None
                movers[-1].stdout.readline()
            if given.run:
                return run(movers, enable, given.seconds)
            pids = [mover.pid for mover in movers]
            moving = rounds(pids, code, enable, given.seconds, moving=True)
            still = rounds(pids, code, enable, given.seconds / 4, moving=False)
        finally:
            for mover in movers:
                mover.kill()
                mover.wait()
            enable.write_text("0")
            define(f"-:{group}/moved\n")
    print(f"Linux {os.uname().release}")
    for what, seen in (("moving", moving), ("still", still)):
        wrong = ", ".join(f"{seen[key]} {key}" for key in seen if key != "looks")
        print(f"{what}: of {seen['looks'] // 2} mappings each: {wrong}")
    return int(any(seen[key] for seen in (moving, still) for key in seen if key != "looks"))


def run(movers: Sequence["subprocess.Popen[bytes]"], enable: Path, seconds: float) -> int:
    """Enable and disable while they call the code; who is killed by SIGTRAP?"""
    began = time.monotonic()
    times = 0
    while time.monotonic() < began + seconds and all(mover.poll() is None for mover in movers):
        enable.write_text("1")
        enable.write_text("0")
        times += 1
    killed = [mover.returncode for mover in movers if mover.poll() is not None]
    took = time.monotonic() - began
    print(f"Linux {os.uname().release}: {times} times enabled and disabled, in {took:.1f} s;", end=" ")
    print(f"killed by SIGTRAP: {killed.count(-signal.SIGTRAP)} of {len(movers)}")
    return int(bool(killed))


if __name__ == "__main__":
    sys.exit(main())
