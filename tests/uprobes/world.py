"""A small world for the tests: files with code in them, address spaces that map them, consumers that
remember.
"""

import mmap as prot
from typing import Any

from kmodel.core import current, kernel_struct, untraced
from kmodel.fs import PAGE_SIZE, File, open_file
from kmodel.mm import MmStruct, mmap
from kmodel.uprobes import PtRegs, Uprobe, UprobeConsumer, fetch_opcode, handle_swbp, uprobe_register
from kmodel.uprobes.usermode import finish_step

TEXT = 0x400000
CODE = bytes([0x55, 0x90]) * (2 * PAGE_SIZE // 2)
"""Two pages of `push %rbp; nop`."""


def new_file(name: str = "/bin/prog", code: bytes = CODE) -> File:
    return open_file(name, contents=code)


def map_text(mm: MmStruct, file: File, addr: int = TEXT, pages: int = 2, pgoff: int = 0) -> int:
    """Map the file's code as a program loader would, over whatever is there."""
    return mmap(
        mm,
        addr,
        pages * PAGE_SIZE,
        prot.PROT_READ | prot.PROT_EXEC,
        prot.MAP_PRIVATE | MAP_FIXED,
        file,
        pgoff,
    )


MAP_FIXED = 0x10


def map_data(mm: MmStruct, file: File, addr: int, pages: int = 1, pgoff: int = 0) -> int:
    """Map part of the file writable and private, where a reference counter may live."""
    return mmap(
        mm,
        addr,
        pages * PAGE_SIZE,
        prot.PROT_READ | prot.PROT_WRITE,
        prot.MAP_PRIVATE | MAP_FIXED,
        file,
        pgoff,
    )


@kernel_struct
class Recorder(UprobeConsumer):
    """A consumer that remembers where it was called, returns `rc` and may do something first."""

    rc: int = untraced(default=0)
    calls: list[int] = untraced(factory=list, init=False)
    then: Any = untraced(default=None)
    not_in: Any = untraced(default=None)


def record(uc: Any, regs: PtRegs, data: Any) -> int:
    uc.calls.append(regs.ip)
    if uc.then is not None:
        uc.then(uc, regs)
    return int(uc.rc)


def not_in(uc: Any, mm: MmStruct) -> bool:
    return uc.not_in is not mm


def recorder(rc: int = 0, **kwargs: Any) -> Recorder:
    return Recorder(handler=record, rc=rc, **kwargs)


def registered(file: File, offset: int, uc: UprobeConsumer | None = None, ref_ctr_offset: int = 0) -> Uprobe:
    """uprobe_register() that must succeed."""
    uprobe = uprobe_register(file.f_inode, offset, ref_ctr_offset, uc if uc is not None else recorder())
    assert isinstance(uprobe, Uprobe), uprobe
    return uprobe


def hit(mm: MmStruct, addr: int) -> PtRegs:
    """Execute the breakpoint at `addr`, whatever is there now; return the registers afterwards."""
    current().mm = mm
    regs = PtRegs(ip=addr + 1)
    handle_swbp(regs)
    finish_step(regs)
    return regs


def opcode(mm: MmStruct, addr: int) -> int:
    """What a CPU would execute there."""
    return fetch_opcode(mm, addr)
