"""The model's side: the same program on the model's processor, address spaces and uprobes."""

from collections.abc import Callable
from typing import Any, Final

import attrs

from kmodel.core import TaskStruct, boot, kernel_struct, kernel_warnings, untraced
from kmodel.core.task import bind_thread, current, next_pid
from kmodel.fs import open_file
from kmodel.mm import (
    MmStruct,
    Signal,
    flags,
    fork,
    mm_alloc,
    mmap,
    mmap_read_lock,
    mmap_read_unlock,
    mmput,
    mprotect,
    munmap,
    user_fetch,
    user_store,
    vma_lookup,
)
from kmodel.uprobes import (
    UPROBE_HANDLER_REMOVE,
    UPROBE_SWBP_INSN,
    PtRegs,
    Uprobe,
    UprobeConsumer,
    exc_int3,
    forced_signals,
    uprobe_apply,
    uprobe_free_utask,
    uprobe_get_trampoline_vaddr,
    uprobe_register,
    uprobe_unregister,
)
from kmodel.uprobes.pages import read_page
from kmodel.uprobes.usermode import finish_step
from stress.uprobe_live.program import ARENA, PAGE, address_of
from stress.uprobe_live.sides import SEEN, Hit, State, Step, counter_at, place_of, slots

STACK_TOP: Final = 0x7FFF_0000_0000
DRIVER: Final = 0x5555_0000_0000
"""Return addresses of the driver's and the functions' calls: numbers, nothing is executed there."""


@kernel_struct
class TraceUprobe(UprobeConsumer):
    """What a trace event or a perf event does as consumer (struct trace_uprobe)."""

    side: Any = untraced(default=None)
    name: str = untraced(default="")
    # of one process: a perf event; counts there, and wants its breakpoints nowhere else
    target: Any = untraced(default=None)
    opened: bool = untraced(default=False)
    count: int = untraced(default=0)


def uprobe_dispatcher(uc: Any, regs: PtRegs, _data: Any) -> int:
    """An entry probe was hit."""
    if uc.target is not None and not uprobe_perf_filter(uc, current().mm):
        return UPROBE_HANDLER_REMOVE
    if uc.ret_handler is None:
        uc.side.hit(uc, regs.ip)
    return 0


def uretprobe_dispatcher(uc: Any, func: int, _regs: PtRegs, _data: Any) -> int:
    """A function that was hit returns."""
    uc.side.hit(uc, func)
    return 0


def uprobe_perf_filter(uc: Any, mm: Any) -> bool:
    """Whether the event of one process wants breakpoints in this address space."""
    return bool(uc.opened and uc.target.task.mm is mm)


@attrs.define(eq=False)
class ModelProcess:
    """One process: its task and address space."""

    task: TaskStruct
    mm: MmStruct


class Ended(Exception):
    """A signal ended the calls."""

    def __init__(self, signo: int) -> None:
        super().__init__(signo)
        self.signo = signo


class Model:
    """One run on the model."""

    def __init__(self, contents: bytes) -> None:
        self._before = current()
        self._before.held_locks.clear()
        boot()
        self.files = {name: open_file(f"/{name}", contents=contents) for name in "AB"}
        mm = mm_alloc()
        assert mm is not None
        self.processes = {0: self._process(mm)}
        self.consumers: dict[str, tuple[Uprobe, TraceUprobe]] = {}
        self._hits: list[Hit] = []
        self._now = 0

    def _process(self, mm: MmStruct) -> ModelProcess:
        task = TaskStruct(pid=next_pid(), comm="target")
        task.mm = mm
        return ModelProcess(task, mm)

    def close(self) -> None:
        for name in list(self.consumers):
            self._do_drop(name)
        for index in list(self.processes):
            self._do_leave(index)
        assert not kernel_warnings(), kernel_warnings()

    def do(self, step: Step) -> State:
        name, *args = step
        action: Callable[..., int] = getattr(self, f"_do_{name}")
        try:
            answer = action(*args)
        except OSError as error:
            answer = error.errno or -1
        hits, self._hits = self._hits, []
        return State(
            answer,
            tuple(sorted(hits, key=repr) if name == "threads" else hits),
            {name: uc.count for name, (_uprobe, uc) in self.consumers.items() if uc.target is not None},
            {
                (index, slot): self._memory(process.mm, address)
                for index, process in self.processes.items()
                for slot, address in slots()
            },
        )

    def _memory(self, mm: MmStruct, address: int) -> bytes | None:
        mmap_read_lock(mm)
        vma = vma_lookup(mm, address)
        page = read_page(vma, address) if vma is not None else None
        mmap_read_unlock(mm)
        return None if page is None else page[:SEEN]

    def hit(self, uc: TraceUprobe, address: int) -> None:
        """A handler of `uc` ran."""
        if uc.target is None:
            self._hits.append(Hit(self._now, uc.name, address - ARENA))
        elif current() is uc.target.task:
            uc.count += 1

    # steps --------------------------------------------------------------------------------------------

    def _do_map(self, process: int, slot: int, pages: int, prot: int, file: str, pgoff: int) -> int:
        bits = flags.MAP_PRIVATE | flags.MAP_FIXED
        mm = self.processes[process].mm
        mmap(mm, ARENA + slot * PAGE, pages * PAGE, prot, bits, self.files[file], pgoff)
        return 0

    def _do_unmap(self, process: int, slot: int, pages: int) -> int:
        munmap(self.processes[process].mm, ARENA + slot * PAGE, pages * PAGE)
        return 0

    def _do_protect(self, process: int, slot: int, pages: int, prot: int) -> int:
        mprotect(self.processes[process].mm, ARENA + slot * PAGE, pages * PAGE, prot)
        return 0

    def _do_write(self, process: int, slot: int, counter: int, value: int) -> int:
        address = ARENA + slot * PAGE + counter_at(counter) % PAGE
        try:
            user_store(self.processes[process].mm, address, value.to_bytes(2, "little"))
        except Signal as error:
            return error.info.si_signo
        return 0

    def _do_fork(self, process: int, child: int) -> int:
        self.processes[child] = self._process(fork(self.processes[process].mm))
        return 0

    def _do_leave(self, process: int) -> int:
        one = self.processes.pop(process)
        before = bind_thread(one.task)
        uprobe_free_utask(one.task)
        bind_thread(before or self._before)
        one.task.mm = None
        mmput(one.mm)
        return 0

    def _do_call(self, process: int, calls: str) -> int:
        one = self.processes[process]
        return self._run(process, one.task, calls)

    def _do_threads(self, process: int, n: int, calls: str) -> int:
        result = 0
        for _ in range(n):
            task = TaskStruct(pid=next_pid(), comm="thread")
            task.mm = self.processes[process].mm
            result |= self._run(process, task, calls)
            uprobe_free_utask(task)
        return result

    def _run(self, process: int, task: TaskStruct, calls: str) -> int:
        before = bind_thread(task)
        self._now = process
        try:
            Cpu(self.processes[process].mm, calls).run()
        except Ended as ended:
            return ended.signo
        finally:
            bind_thread(before or self._before)
        return 0

    def _do_probe(
        self, name: str, kind: str, file: str, place: str | int, page: int, counter: int | None
    ) -> int:
        return self._register(TraceUprobe(side=self, name=name), kind, file, place, page, counter)

    def _do_perf(
        self, name: str, kind: str, file: str, place: str | int, page: int, counter: int | None, process: int
    ) -> int:
        uc = TraceUprobe(side=self, name=name, target=self.processes[process], filter=uprobe_perf_filter)
        error = self._register(uc, kind, file, place, page, counter)
        if error:
            return error
        # perf_event_open() registers before it has a target, and then applies (uprobe_perf_open).
        uc.opened = True
        uprobe, _uc = self.consumers[name]
        error = -uprobe_apply(uprobe, uc, True)
        if error:
            self._do_drop(name)
        return error

    def _register(
        self, uc: TraceUprobe, kind: str, file: str, place: str | int, page: int, counter: int | None
    ) -> int:
        uc.handler = uprobe_dispatcher
        if kind == "r":
            uc.ret_handler = uretprobe_dispatcher
        inode = self.files[file].f_inode
        uprobe = uprobe_register(inode, place_of(place, page), counter_at(counter), uc)
        if isinstance(uprobe, int):
            return -uprobe
        self.consumers[uc.name] = uprobe, uc
        return 0

    def _do_drop(self, name: str) -> int:
        uprobe, uc = self.consumers.pop(name)
        if uc.target is not None and uc.opened:
            uc.opened = False
            uprobe_apply(uprobe, uc, False)
        uprobe_unregister(uprobe, uc)
        return 0


# ------------------------------------------------------------------------------------------ the processor


class Cpu:
    """target.c and code.S: the same calls, with a stack, where breakpoints are met."""

    def __init__(self, mm: MmStruct, calls: str) -> None:
        self.mm = mm
        self.calls = calls
        self.at = 0
        self.regs = PtRegs()
        self.marks: list[int] = []

    def run(self) -> None:
        """The driver's loop."""
        while self.at < len(self.calls):
            letter = self._token()
            if letter.islower():
                self.regs.sp = STACK_TOP
                self._function(letter, int(self._token()))

    def _token(self) -> str:
        token = self.calls[self.at]
        self.at += 1
        return token

    def _push(self, value: int) -> None:
        self.regs.sp -= 8
        self.regs.stack[self.regs.sp] = value

    def _function(self, letter: str, slot: int) -> None:
        """From a call to its return."""
        # Frames as (sp in the body); the bottom one is what the caller waits for.
        frames: list[int] = []
        bottom = self.regs.sp
        self._call(letter, slot, frames)
        while self.regs.sp < bottom:
            self._body(frames)

    def _call(self, letter: str, slot: int, frames: list[int]) -> None:
        self._push(DRIVER + self.regs.sp)
        self._enter(letter, slot, frames)

    def _enter(self, letter: str, slot: int, frames: list[int]) -> None:
        """The first instructions of a function, up to its body."""
        self._first_instruction(address_of(letter, slot))
        if letter == "j":
            self._return()
            return
        self._push(0)  # rbp
        if letter == "l":
            self.marks.append(self.regs.sp)
        frames.append(self.regs.sp)

    def _body(self, frames: list[int]) -> None:
        """One turn of the loop of BODY in the function whose frame is at sp."""
        while self.at < len(self.calls) and self.calls[self.at] == "!":
            self.at += 1
            if self.marks:
                self.regs.sp = self.marks[-1]
        letter = self._token() if self.at < len(self.calls) else ""
        if letter.islower():
            self._call(letter, int(self._token()), frames)
            return
        if self.marks and self.marks[-1] == self.regs.sp:
            self.marks.pop()
        self.regs.sp += 8  # pop %rbp
        if letter.isupper():
            self._enter(letter.lower(), int(self._token()), frames)
        else:
            self._return()

    def _return(self) -> None:
        regs = self.regs
        address = regs.stack.pop(regs.sp)
        regs.sp += 8
        if address == uprobe_get_trampoline_vaddr():
            regs.ip = address + 1
            self._trap()

    def _trap(self) -> None:
        sent = len(forced_signals())
        exc_int3(self.regs)
        if len(forced_signals()) > sent:
            raise Ended(forced_signals()[-1])

    def _first_instruction(self, address: int) -> None:
        """Execute what is at the address until the task is past it."""
        regs = self.regs
        for _ in range(10):
            try:
                opcode = user_fetch(self.mm, address)[0]
            except Signal as error:
                raise Ended(error.info.si_signo) from error
            if opcode != UPROBE_SWBP_INSN:
                return
            regs.ip = address + 1
            sp = regs.sp
            self._trap()
            return_address = regs.stack[sp]  # perhaps the trampoline's by now
            finish_step(regs)
            # What the instruction does to the stack is done by who called us.
            regs.sp = sp
            regs.stack[sp] = return_address
            if regs.ip != address:
                return
        raise AssertionError(f"the task stays at {address:#x}")
