"""The inode table: one inode per path, references, the LRU list, eviction after a grace period."""

from typing import Any

import pytest

from kmodel.core import POISON, CoopEngine, KernelBug, boot, engine, kernel_warnings, kthread_run
from kmodel.fs import PAGE_SIZE, iget_path, igrab, ihold, iput, prune_icache, read_mapping_page, unlink
from kmodel.fs import inode as inode_module
from kmodel.rcu import rcu_barrier


def iget(path: str, **kw: Any) -> Any:
    return iget_path(path, size=kw.pop("size", 1), **kw)


def test_number_follows_from_the_path() -> None:
    """Without a number given, the same path has the same one at every boot."""
    first = iget("/lib/a").i_ino
    boot()
    assert (iget("/lib/a").i_ino, iget("/lib/b").i_ino == first) == (first, False)


def test_given_number_and_device_are_taken() -> None:
    """As /proc/PID/maps has them."""
    inode = iget("/lib/a", ino=4711, dev=(253, 2))
    assert (inode.i_ino, inode.i_dev) == (4711, (253, 2))


def test_numbers_of_one_device_do_not_collide() -> None:
    """A path whose number is taken gets another."""
    taken = iget("/lib/a").i_ino
    boot()
    other = iget("/lib/x", ino=taken)
    inode = iget("/lib/a")
    assert (other.i_ino, inode.i_ino != taken) == (taken, True)


def test_unused_inode_stays_for_the_next_open() -> None:
    """N2: the last iput puts it on the LRU list; opening takes it off."""
    inode = iget("/lib/a")
    iput(inode)
    inode_module.check_invariants()
    assert list(inode_module.table.lru) == [inode]
    assert iget("/lib/a") is inode
    assert not inode_module.table.lru


def test_unlinked_inode_goes_with_its_last_reference() -> None:
    """The path leads elsewhere at once; the memory is free after a grace period."""
    old = iget("/lib/a")
    assert unlink("/lib/a")
    new = iget("/lib/a")
    assert new is not old
    assert igrab(old) is old
    iput(old)
    iput(old)
    rcu_barrier()
    assert old.i_size is POISON
    assert new.i_size == 1
    assert not unlink("/lib/none")


def test_pruned_inodes_are_freed() -> None:
    """prune_icache drops the unused ones only."""
    used, unused = iget("/lib/a"), iget("/lib/b")
    iput(unused)
    assert prune_icache() == 1
    rcu_barrier()
    assert (used.i_size, unused.i_size is POISON) == (1, True)
    assert igrab(used) is used


def test_lru_list_is_bounded() -> None:
    """The longest unused inodes go first."""
    inode_module.table.lru_max = 2
    for n in range(4):
        iput(iget(f"/lib/{n}"))
    assert sorted(inode_module.table.by_path) == ["/lib/2", "/lib/3"]


def test_ihold_needs_a_reference() -> None:
    """ihold of an unused inode warns."""
    inode = iget("/lib/a")
    ihold(inode)
    iput(inode)
    iput(inode)
    assert kernel_warnings() == ()
    ihold(inode)
    assert len(kernel_warnings()) == 1


def test_mapped_inode_must_not_be_evicted() -> None:
    """A VMA in i_mmap means that its file was put too early."""
    inode = iget("/lib/a")
    inode.i_mapping.i_mmap.add(type("V", (), {"vm_pgoff": 0})())
    iput(inode)
    with pytest.raises(KernelBug, match="while VMAs map it"):
        prune_icache()


def test_pages_are_zero_filled_past_the_end() -> None:
    """read_mapping_page gives whole pages."""
    data = bytes(range(256)) * 17
    inode = iget("/lib/a", size=len(data), contents=lambda offset, n: data[offset : offset + n])
    pages = [read_mapping_page(inode.i_mapping, n) for n in range(3)]

    assert [len(page) for page in pages] == [PAGE_SIZE] * 3
    assert b"".join(pages) == data + bytes(3 * PAGE_SIZE - len(data))


def open_and_close(paths: Any) -> None:
    for path in paths:
        inode = iget(path)
        assert inode.path == path
        ihold(inode)
        iput(inode)
        iput(inode)


def remover(paths: Any) -> None:
    unlink(paths[0])
    prune_icache()


def final(_paths: Any) -> None:
    inode_module.check_invariants()
    assert all(inode.i_count == 0 for inode in inode_module.table.by_path.values())


def setup() -> Any:
    boot()
    return ["/lib/a", "/lib/b"]


def test_opens_closes_and_unlinks_interleaved() -> None:
    """N1, N2 on the cooperative engine, over seeds."""
    for seed in range(25):
        CoopEngine(seed).run(setup, [open_and_close, open_and_close, remover], final)
        assert kernel_warnings() == ()


def test_opens_closes_and_unlinks_on_real_threads() -> None:
    """The same on real threads."""
    paths = setup()
    tasks = [kthread_run(open_and_close, paths * 20, daemon=False) for _ in range(3)]
    tasks.append(kthread_run(remover, paths, daemon=False))
    for task in tasks:
        engine().join(task)
    final(paths)
    assert kernel_warnings() == ()
