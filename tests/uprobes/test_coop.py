"""The whole slice on the seeded engine: register, hit, remap and unregister, in one thread at a time."""

from typing import Any

from kmodel.core import CoopEngine, boot, current
from kmodel.fs import File, open_file
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_EXEC,
    PROT_READ,
    MmStruct,
    mmap,
    mprotect,
    munmap,
)
from kmodel.uprobes import (
    PtRegs,
    Uprobe,
    UprobeConsumer,
    handle_swbp,
    uprobe_register,
    uprobe_unregister_nosync,
    uprobe_unregister_sync,
)

TEXT = 0x400000
type State = tuple[MmStruct, File]


def setup() -> State:
    boot()
    mm, file = MmStruct(), open_file("/bin/prog", contents=b"\x90" * 2 * PAGE_SIZE)
    mmap(mm, TEXT, 2 * PAGE_SIZE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, file, 0)
    return mm, file


def registers(state: State) -> None:
    _mm, file = state
    consumer = UprobeConsumer(handler=lambda _uc, _regs, _data: 0)
    uprobe = uprobe_register(file.f_inode, 0x10, 0, consumer)
    assert isinstance(uprobe, Uprobe)
    uprobe_unregister_nosync(uprobe, consumer)
    uprobe_unregister_sync()


def hits(state: State) -> None:
    current().mm = state[0]
    for _ in range(2):
        regs = PtRegs()
        regs.ip = TEXT + 0x10 + 1
        handle_swbp(regs)


def remaps(state: State) -> None:
    mm, _file = state
    mprotect(mm, TEXT + PAGE_SIZE, PAGE_SIZE, PROT_READ)
    munmap(mm, mmap(mm, 0, PAGE_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS), PAGE_SIZE)


def trace_of(seed: int) -> list[Any]:
    engine = CoopEngine(seed)
    engine.run(setup, [registers, hits, remaps])
    return list(engine.trace)


def test_equal_seed_gives_an_equal_trace_of_everything() -> None:
    """Same task, access, object and value at every step, through all the rooms; another seed differs."""
    first, again, other = trace_of(1), trace_of(1), trace_of(2)

    assert len(first) > 500
    assert again == first
    assert other != first
