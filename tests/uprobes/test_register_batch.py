"""The batch API: all or none, in reverse, with one wait."""

import errno
from typing import Any

import pytest

from kmodel.core import guards, is_freed
from kmodel.mm import MmStruct
from kmodel.slab import fail_nth
from kmodel.uprobes import (
    BatchConsumer,
    lifetime,
    ref_tree,
    references,
    register,
    register_batch,
    tree,
    uprobe_register_batch,
    uprobe_unregister,
    uprobe_unregister_batch,
)
from kmodel.uprobes.arch import ENOTSUPP
from tests.uprobes.world import CODE, TEXT, hit, map_text, new_file, opcode, recorder, registered

OFFSETS = (0x11, 0x21, 0x31, 0x21)


class Batch:
    """Consumers for OFFSETS, two of them at one place, of a program that is mapped at TEXT."""

    def __init__(self, code: bytes = CODE) -> None:
        self.mm = MmStruct()
        self.file = new_file(code=code)
        map_text(self.mm, self.file)
        self.hits: list[int] = []
        self.consumers = [self.consumer(offset) for offset in OFFSETS]

    def consumer(self, offset: int) -> BatchConsumer:
        def handler(uc: Any, regs: Any, data: Any) -> int:
            self.hits.append(uc.offset)
            return 0

        return BatchConsumer(handler=handler, offset=offset)

    def register(self) -> int:
        return uprobe_register_batch(self.file.f_inode, len(self.consumers), get_consumer, self.consumers)

    def unregister(self) -> None:
        uprobe_unregister_batch(self.file.f_inode, len(self.consumers), get_consumer, self.consumers)


def get_consumer(i: int, ctx: Any) -> Any:
    return ctx[i]


def count(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """The list grows with every call of module.name()."""
    calls: list[str] = []
    original = getattr(module, name)

    def counting(*args: Any) -> Any:
        calls.append(name)
        return original(*args)

    monkeypatch.setattr(module, name, counting)
    return calls


def test_all_are_registered_and_unregistered() -> None:
    """Each consumer is called at its place; afterwards nothing is left, in the tree or in the code."""
    batch = Batch()
    assert batch.register() == 0
    assert [u.offset for u in tree.uprobes()] == [0x11, 0x21, 0x31]
    assert batch.consumers[1].uprobe is batch.consumers[3].uprobe

    for offset in (0x11, 0x21, 0x31):
        hit(batch.mm, TEXT + offset)
    assert sorted(batch.hits) == [0x11, 0x21, 0x21, 0x31]

    uprobes = {id(uc.uprobe): uc.uprobe for uc in batch.consumers}.values()
    batch.unregister()
    lifetime.wait_for_frees()
    assert all(is_freed(uprobe) for uprobe in uprobes)
    assert tree.uprobes() == []
    assert opcode(batch.mm, TEXT + 0x21) == 0x90
    assert [uc.uprobe for uc in batch.consumers] == [None] * 4


def test_one_hold_of_the_treelock_and_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """All insertions are one hold of the treelock; all unregisters one wait for readers."""
    batch = Batch()
    holds = count(monkeypatch, tree, "write_seqcount_begin")
    assert batch.register() == 0
    assert len(holds) == 1

    waits = count(monkeypatch, register_batch, "uprobe_unregister_sync")
    batch.unregister()
    assert len(waits) == 1


@pytest.mark.parametrize("bad", range(4))
def test_what_is_refused_before_anything_is_done(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer without handler, a place past the end, a missing or a registered one: -EINVAL, no uprobe."""
    batch = Batch()
    if bad == 0:
        batch.consumers[3].handler = None
    elif bad == 1:
        batch.consumers[3].offset = 1 << 30
    elif bad == 2:
        batch.consumers[3] = None  # type: ignore[call-overload]
    else:
        batch.consumers[3].uprobe = registered(batch.file, 0x41)
        batch.consumers[3].offset = 0x41
    before = tree.uprobes()
    inserts = count(monkeypatch, register_batch, "insert_uprobes")

    assert batch.register() == -errno.EINVAL
    assert tree.uprobes() == before
    assert inserts == []
    batch.consumers = batch.consumers[:0]
    assert batch.register() == -errno.EINVAL


def test_without_memory_nothing_is_inserted() -> None:
    """-ENOMEM for the third uprobe: the first two are given back."""
    batch = Batch()
    with fail_nth(3):
        assert batch.register() == -errno.ENOMEM
    assert tree.uprobes() == []
    assert all(uc.uprobe is None for uc in batch.consumers)


def test_another_reference_counter_undoes_the_insertions() -> None:
    """-EINVAL if a place is known with another ref_ctr_offset: only what was there stays."""
    batch = Batch()
    there = registered(batch.file, 0x31, recorder(), ref_ctr_offset=0x1000)

    assert batch.register() == -errno.EINVAL
    lifetime.wait_for_frees()
    assert tree.uprobes() == [there]
    assert references.implementation.users(there) == 1


def broken_code() -> bytes:
    """A trap of the program's own where the third consumer wants to be."""
    return CODE[:0x31] + b"\xcc" + CODE[0x32:]


def test_a_failure_halfway_undoes_all_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third registration fails: the others are undone, last first, with one wait (A1)."""
    batch = Batch(broken_code())
    undone: list[int] = []
    original = register.uprobe_unregister_nosync

    def noting(uprobe: Any, uc: Any) -> None:
        undone.append(uc.offset)
        original(uprobe, uc)

    monkeypatch.setattr(register_batch, "uprobe_unregister_nosync", noting)
    waits = count(monkeypatch, register_batch, "uprobe_unregister_sync")

    assert batch.register() == -ENOTSUPP
    assert undone == [0x31, 0x21, 0x11]
    assert len(waits) == 1
    lifetime.wait_for_frees()
    assert tree.uprobes() == []
    assert opcode(batch.mm, TEXT + 0x11) == 0x90


def test_without_the_rollback_consumers_stay() -> None:
    """no-batch-rollback: a batch that failed goes on calling its first consumers (A1)."""
    batch = Batch(broken_code())
    with guards.without("no-batch-rollback"):
        assert batch.register() == -ENOTSUPP
    hit(batch.mm, TEXT + 0x11)
    assert batch.hits == [0x11]


def test_a_uprobe_that_leaves_the_tree_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """ref_tree: the old uprobe is deleted after the batch found it; the consumer gets a new one (T2)."""
    monkeypatch.setattr(references, "implementation", ref_tree)
    batch = Batch()
    uc = recorder()
    old = registered(batch.file, 0x31, uc)
    original = register_batch.insert_uprobes

    def insert_then_unregister(new: Any) -> Any:
        found = original(new)
        uprobe_unregister(old, uc)
        return found

    monkeypatch.setattr(register_batch, "insert_uprobes", insert_then_unregister)
    assert batch.register() == 0
    assert batch.consumers[2].uprobe is not old
    hit(batch.mm, TEXT + 0x31)
    assert batch.hits == [0x31]
    batch.unregister()
    lifetime.wait_for_frees()
    assert tree.uprobes() == []
    assert is_freed(old)
