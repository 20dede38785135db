"""The running kernel's side: a program that is probed through tracefs and perf_event_open(2)."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from kmodel.mm import flags
from stress.uprobe_live.program import ARENA, FUNCTIONS, PAGE, SLOTS, Program, address_of, build, code_of
from stress.uprobe_live.sides import SEEN, Hit, State, Step, contents, counter_at, place_of, slots
from stress.uprobe_live.tracefs import Tracefs


class Workshop:
    """The built program and its files, for many runs. A context manager."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kmodel-uprobe-")
        self.folder = Path(self._directory.name)
        try:
            self.program = build(self.folder)
            self.contents = contents(code_of(self.folder / "code.o"))
            for name in "AB":
                (self.folder / name).write_bytes(self.contents)
        except BaseException:
            self._directory.cleanup()
            raise

    def __enter__(self) -> "Workshop":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._directory.cleanup()


class RunningKernel:
    """One run. A context manager: no event, instance or process is left behind."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self._stack = contextlib.ExitStack()
        try:
            self.tracefs = self._stack.enter_context(Tracefs())
            files = {name: workshop.folder / name for name in "AB"}
            self.program = self._stack.enter_context(Program(workshop.program, files))
            self.tracefs.follow(self.program.processes[0].pid)
        except BaseException:
            self._stack.close()
            raise
        self._tids: dict[int, int] = {self.program.processes[0].pid: 0}
        self._traced: set[str] = set()
        self._perf: dict[str, int] = {}

    def __enter__(self) -> "RunningKernel":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def reset(self) -> None:
        """Nothing is mapped or probed, and there is one process: another run may begin."""
        for name in [*self._perf, *self._traced]:
            self._do_drop(name)
        for index in list(self.program.processes):
            if index:
                self._do_leave(index)
        self._do_unmap(0, 0, SLOTS)
        self.tracefs.records()
        self._tids = {self.program.processes[0].pid: 0}

    def rewritten(self) -> str:
        """The functions whose breakpoint this kernel replaces by a call once it was hit, or does not write at
        all: the long nops.
        """
        found = ""
        self._do_map(0, 0, 1, 5, "A", 0)
        for letter in FUNCTIONS:
            if self._do_probe("try", "p", "A", letter, 0, None):
                found += letter
                continue
            self._do_call(0, f"{letter}0.{letter}0.")
            first = self.program.processes[0].memory(address_of(letter, 0), 1)
            found += letter if first != b"\xcc" else ""
            self._do_drop("try")
        self.reset()
        return found

    def path(self, file: str) -> str:
        """Where file A or B is."""
        return str(self._workshop.folder / file)

    def do(self, step: Step) -> State:
        name, *args = step
        action: Any = getattr(self, f"_do_{name}")
        answer = action(*args)
        return State(
            answer,
            self._hits(sort=name == "threads", at=args[0]) if name in ("threads", "call") else (),
            {name: self.tracefs.perf_count(fd) for name, fd in self._perf.items()},
            {
                (index, slot): process.memory(address, SEEN)
                for index, process in self.program.processes.items()
                for slot, address in slots()
            },
        )

    def _hits(self, *, sort: bool, at: int) -> tuple[Hit, ...]:
        hits = [
            # A task that is not known is one of the threads that just ran.
            Hit(self._tids.get(record.tid, at), record.event, (record.func or record.at) - ARENA)
            for record in self.tracefs.records()
        ]
        return tuple(sorted(hits, key=repr) if sort else hits)

    # steps --------------------------------------------------------------------------------------------

    def _ask(self, process: int, *words: object) -> int:
        return self.program.processes[process].ask(*words)

    def _do_map(self, process: int, slot: int, pages: int, prot: int, file: str, pgoff: int) -> int:
        bits = flags.MAP_PRIVATE | flags.MAP_FIXED
        return self._ask(process, "m", slot, pages, prot, bits, self.program.files[file], pgoff)

    def _do_unmap(self, process: int, slot: int, pages: int) -> int:
        return self._ask(process, "u", slot, pages)

    def _do_protect(self, process: int, slot: int, pages: int, prot: int) -> int:
        return self._ask(process, "p", slot, pages, prot)

    def _do_call(self, process: int, calls: str) -> int:
        return self._ask(process, "c", calls)

    def _do_threads(self, process: int, n: int, calls: str) -> int:
        return self._ask(process, "t", n, calls)

    def _do_fork(self, process: int, child: int) -> int:
        self._tids[self.program.fork(process, child)] = child
        return 0

    def _do_leave(self, process: int) -> int:
        self.program.leave(process)
        return 0

    def _do_write(self, process: int, slot: int, counter: int, value: int) -> int:
        return self._ask(process, "w", slot * PAGE + counter_at(counter) % PAGE, value)

    def _do_probe(
        self, name: str, kind: str, file: str, place: str | int, page: int, counter: int | None
    ) -> int:
        ref_ctr = f"({counter_at(counter):#x})" if counter is not None else ""
        what = f"{kind} {self.path(file)}:{place_of(place, page):#x}{ref_ctr}"
        error = self.tracefs.define(name, what)
        if not error:
            error = self.tracefs.enable(name)
            if error:
                self.tracefs.undefine(name)
            else:
                self._traced.add(name)
        return error

    def _do_perf(
        self, name: str, kind: str, file: str, place: str | int, page: int, counter: int | None, process: int
    ) -> int:
        fd = self.tracefs.perf_open(
            self.path(file),
            place_of(place, page),
            self.program.processes[process].pid,
            ref_ctr=counter_at(counter),
            ret=kind == "r",
        )
        if fd < 0:
            return -fd
        self._perf[name] = fd
        return 0

    def _do_drop(self, name: str) -> int:
        if name in self._perf:
            self.tracefs.perf_close(self._perf.pop(name))
            return 0
        self._traced.remove(name)
        return self.tracefs.enable(name, False) or self.tracefs.undefine(name)
