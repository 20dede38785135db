"""Opening, reading and closing files; backing files; deferred fput."""

import os
from pathlib import Path
from typing import Any

import pytest

from kmodel.core import (
    WRITE_ONCE,
    CoopEngine,
    LockingBug,
    Struct,
    UseAfterFree,
    boot,
    engine,
    guards,
    is_freed,
    kernel_struct,
    kernel_warnings,
    kthread_run,
    ptr,
    rcu_dereference,
    smp_cond_load_acquire,
    smp_store_release,
)
from kmodel.fs import (
    FILE_REF_DEAD,
    FMODE_BACKING,
    FMODE_OPENED,
    FMODE_READ,
    FMODE_WRITE,
    O_RDONLY,
    O_WRONLY,
    BackingFile,
    alloc_empty_file,
    backing_file_open,
    file_ref_read,
    file_table,
    filp_close,
    flush_delayed_fput,
    fput,
    fput_close,
    fput_sync,
    get_file,
    kernel_read,
    open_file,
    prune_icache,
    task_work_pending,
    task_work_run,
)
from kmodel.rcu import rcu_barrier, rcu_read_lock, rcu_read_unlock
from kmodel.slab import fail_nth, leak_report
from kmodel.sync import SpinLock, spin_lock, spin_unlock


def test_open_gives_identity_and_one_reference() -> None:
    """A file names its inode and mapping, and is counted once."""
    file = open_file("/lib/a", size=8192)
    inode = file.f_inode
    assert inode is not None

    assert (file.f_path, inode.path, inode.i_size, inode.i_count) == ("/lib/a", "/lib/a", 8192, 1)
    assert file.f_mapping is inode.i_mapping
    assert inode.i_mapping.host is inode
    assert file.f_mode == FMODE_READ | FMODE_WRITE | FMODE_OPENED
    assert file_ref_read(file, "f_ref") == 1


def test_same_path_same_inode_another_file() -> None:
    """Two opens share the inode only."""
    a, b = open_file("/lib/a", size=1), open_file("/lib/a", size=2, writable=False)

    assert a is not b
    assert a.f_inode is b.f_inode
    assert (b.f_mode & FMODE_WRITE, b.f_inode.i_size if b.f_inode else None) == (0, 1)


def test_closed_file_is_reused_at_once_and_keeps_its_inode_until_then() -> None:
    """Type-safe: the next open gets the same struct; before that f_inode is stale, not NULL."""
    file = open_file("/lib/a", size=1)
    inode = file.f_inode
    fput(file)

    assert is_freed(file)
    assert (file.f_inode is inode, file.f_ref) == (True, FILE_REF_DEAD)
    again = open_file("/lib/b", size=1)
    assert again is file
    assert again.f_inode is not inode


def test_get_file_and_fput_balance() -> None:
    """Only the last fput closes."""
    file = get_file(open_file("/lib/a", size=1))
    fput(file)
    assert not is_freed(file)
    fput_close(file)
    assert is_freed(file)
    prune_icache()
    rcu_barrier()
    assert leak_report() == ""


def test_one_fput_too_many_warns() -> None:
    """The count goes back to dead and nothing is freed twice."""
    file = open_file("/lib/a", size=1)
    fput(file)
    fput(file)

    assert [w.message for w in kernel_warnings()] == ["imbalanced put on file reference count"]
    assert file.f_ref == FILE_REF_DEAD


def test_contents_come_from_bytes_disk_or_zeroes(tmp_path: Path) -> None:
    """kernel_read reads what open_file was given, up to the end of the file."""
    real = tmp_path / "real"
    real.write_bytes(b"0123456789")
    cases = [
        (open_file("/a", contents=b"abcdef"), b"cde", b"ef"),
        (open_file("/b", on_disk=str(real)), b"234", b"456789"),
        (open_file("/c", size=6), b"\0\0\0", b"\0\0"),
        (open_file("/d", size=6, contents=b"abc"), b"c\0\0", b"\0\0"),
    ]
    got = [(kernel_read(file, 2, 3), kernel_read(file, 4, 100)) for file, _, _ in cases]
    assert got == [(middle, end) for _, middle, end in cases]
    assert kernel_read(cases[0][0], 6, 1) == b""


def test_kernel_read_needs_a_readable_file() -> None:
    """-EINVAL and a warning for a file open for writing only."""
    file = alloc_empty_file(O_WRONLY)
    assert not isinstance(file, int)
    assert kernel_read(file, 0, 1) == -22
    assert len(kernel_warnings()) == 1
    fput(file)


def test_open_without_memory_raises_enomem_and_leaks_nothing() -> None:
    """Each allocation of an open may fail."""
    for n, cache in enumerate(["inode_cache", "filp"]):
        with fail_nth(1, cache=cache), pytest.raises(OSError, match="memory") as error:
            open_file(f"/lib/{n}", size=1)
        assert error.value.errno == 12
    prune_icache()
    rcu_barrier()
    assert leak_report() == ""


def test_empty_file_has_no_inode_and_is_freed_at_once() -> None:
    """Between init_file and file_init_path f_inode is NULL (H12)."""
    file = alloc_empty_file(O_RDONLY)
    assert not isinstance(file, int)
    assert (file.f_inode, file.f_mode) == (None, FMODE_READ)
    lock = SpinLock()
    spin_lock(lock)
    fput(file)  # nothing in it could sleep
    spin_unlock(lock)
    assert is_freed(file)


# ------------------------------------------------------------------------------------------------ deferral


def test_last_fput_under_a_lock_waits_for_the_way_out() -> None:
    """The inode is put only when the task holds nothing any more."""
    file = open_file("/lib/a", size=1)
    lock = SpinLock()
    spin_lock(lock)
    fput(file)
    assert (is_freed(file), task_work_pending()) == (False, 1)
    with pytest.raises(LockingBug):
        task_work_run()
    spin_unlock(lock)
    task_work_run()

    assert (is_freed(file), task_work_pending()) == (True, 0)


def test_last_fput_in_an_rcu_reader_waits() -> None:
    """__fput may sleep, a reader may not."""
    file = open_file("/lib/a", size=1)
    rcu_read_lock()
    fput(file)
    assert not is_freed(file)
    rcu_read_unlock()
    filp_close(open_file("/lib/b", size=1))
    assert is_freed(file)


def test_fput_sync_in_an_rcu_reader_is_a_bug() -> None:
    """__fput_sync may sleep."""
    file = open_file("/lib/a", size=1)
    rcu_read_lock()
    try:
        with pytest.raises(LockingBug):
            fput_sync(file)
    finally:
        rcu_read_unlock()


def test_work_of_an_ended_task_is_not_lost() -> None:
    """A task that ends right after an fput in a reader leaves the rest to flush_delayed_fput."""
    file = open_file("/lib/a", size=1)

    def put_in_reader() -> None:
        rcu_read_lock()
        fput(file)
        rcu_read_unlock()

    task = kthread_run(put_in_reader, daemon=False)
    engine().join(task)
    assert not is_freed(file)
    flush_delayed_fput()
    assert is_freed(file)


def test_boot_forgets_queued_work() -> None:
    """Work of the last boot must not touch files of this one."""
    lock = SpinLock()
    spin_lock(lock)
    fput(open_file("/lib/a", size=1))
    spin_unlock(lock)
    boot()
    assert task_work_pending() == 0


def test_kernel_threads_leave_the_last_fput_to_a_worker() -> None:
    """A kthread never returns to user mode."""
    files = [open_file(f"/lib/{n}", size=1) for n in range(3)]

    def put_all() -> None:
        for file in files:
            fput(file)

    task = kthread_run(put_all)
    assert task.is_kthread
    engine().join(task)
    flush_delayed_fput()
    deadline = engine().now() + 5
    while not all(is_freed(file) for file in files) and engine().now() < deadline:
        os.sched_yield()
    assert all(is_freed(file) for file in files)


# ---------------------------------------------------------------------------------------------- backing files


def test_backing_file_has_two_paths_and_its_own_cache() -> None:
    """FMODE_BACKING files come from bfilp, also type-safe."""
    file = backing_file_open("/merged/a", "/upper/a", size=1)
    inode = file.f_inode
    assert inode is not None

    assert (file.user_path, file.f_path, inode.path) == ("/merged/a", "/upper/a", "/upper/a")
    assert file.f_mode & FMODE_BACKING
    assert file_table.bfilp_cachep.statistics().live == 1
    fput(file)
    assert is_freed(file)
    assert file.f_inode is inode


@kernel_struct
class Vma(Struct):
    """A pointer to a file, and whose turn it is."""

    vm_file: Any = None
    turn: int = 0


def is_one(turn: int) -> bool:
    return turn == 1


def is_two(turn: int) -> bool:
    return turn == 2


def setup_backing() -> Vma:
    boot()
    return Vma(vm_file=backing_file_open("/merged/a", "/upper/a", size=1))


def speculative_reader(vma: Vma) -> None:
    rcu_read_lock()
    file = rcu_dereference(vma, "vm_file")
    WRITE_ONCE(vma, "turn", 1)
    smp_cond_load_acquire(vma, "turn", is_two)
    assert ptr(file.f_inode)
    rcu_read_unlock()


def unmapper(vma: Vma) -> None:
    smp_cond_load_acquire(vma, "turn", is_one)
    file = vma.vm_file
    vma.vm_file = None
    fput(file)
    smp_store_release(vma, "turn", 2)


def test_lockless_reader_of_a_backing_file_finds_a_file() -> None:
    """H13: since 6.13 the memory stays a file, with a stale inode to compare."""
    for seed in range(5):
        CoopEngine(seed).run(setup_backing, [speculative_reader, unmapper])


def test_backing_files_from_kzalloc_are_caught() -> None:
    """H13's broken twin: the reader meets freed memory."""
    with guards.without("backing-files-typesafe"), pytest.raises(UseAfterFree):
        CoopEngine(0).run(setup_backing, [speculative_reader, unmapper])


def test_old_backing_files_are_freed_for_good() -> None:
    """Before 6.13: poison right after the last fput."""
    with guards.without("backing-files-typesafe"):
        file = backing_file_open("/merged/a", "/upper/a", size=1)
        assert isinstance(file, BackingFile)
        fput(file)
    with pytest.raises(UseAfterFree):
        ptr(file.f_inode)
