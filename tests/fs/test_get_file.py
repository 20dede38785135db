"""References taken from a pointer that goes stale meanwhile (H74), in the worst interleavings on purpose."""

from typing import Any

import pytest

from kmodel.core import (
    WRITE_ONCE,
    CoopEngine,
    Struct,
    boot,
    engine,
    guards,
    is_freed,
    kernel_struct,
    kernel_warnings,
    kthread_run,
    rcu_assign_pointer,
    smp_cond_load_acquire,
    smp_store_release,
)
from kmodel.fs import (
    File,
    file_get,
    file_ref_get,
    file_ref_read,
    file_table,
    fput,
    get_file_active,
    get_file_rcu,
    init_file,
    open_file,
)
from kmodel.rcu import rcu_read_lock, rcu_read_unlock


@kernel_struct
class Holder(Struct):
    """What a descriptor table entry is to a reader: one published pointer."""

    file: Any = None
    turn: int = 0
    got: Any = None
    mine: Any = None


def reached(n: int) -> Any:
    return lambda turn: turn >= n


def setup() -> Holder:
    boot()
    return Holder(file=open_file("/first", size=1))


def close_and_reuse(holder: Holder) -> None:
    """When the reader has loaded its pointer: close that file and open another in its memory, published
    elsewhere.
    """
    smp_cond_load_acquire(holder, "turn", reached(1))
    file = holder.file
    rcu_assign_pointer(holder, "file", None)
    fput(file)
    holder.mine = open_file("/second", size=1)
    assert holder.mine is file
    smp_store_release(holder, "turn", 2)


def reopen_in_place(holder: Holder) -> None:
    """The same, but the new file is published where the old one was."""
    smp_cond_load_acquire(holder, "turn", reached(1))
    file = holder.file
    rcu_assign_pointer(holder, "file", None)
    fput(file)
    rcu_assign_pointer(holder, "file", open_file("/second", size=1))
    smp_store_release(holder, "turn", 2)


def reader_active(holder: Holder) -> None:
    holder.got = get_file_active(holder, "file")


def reader_rcu(holder: Holder) -> None:
    rcu_read_lock()
    holder.got = get_file_rcu(holder, "file")
    rcu_read_unlock()


@pytest.fixture
def pause_before_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the reader's first load of the pointer and its file_ref_get the writer does all it wants."""
    holders: list[Holder] = []

    def paused_get(file: File, field: str) -> bool:
        holder = holders[-1]
        if holder.turn == 0:
            WRITE_ONCE(holder, "turn", 1)
            smp_cond_load_acquire(holder, "turn", reached(2))
        return file_ref_get(file, field)

    def remember(obj: Any, field: str) -> Any:
        holders.append(obj)
        return real(obj, field)

    real = file_get.rcu_dereference
    monkeypatch.setattr(file_get, "rcu_dereference", remember)
    monkeypatch.setattr(file_get, "file_ref_get", paused_get)


@pytest.mark.usefixtures("pause_before_get")
@pytest.mark.parametrize("reader", [reader_active, reader_rcu])
def test_reload_refuses_a_file_that_was_reused_elsewhere(reader: Any) -> None:
    """The reference was to a stranger: it is dropped, and the stranger's count is right again."""
    for seed in range(5):
        holder = CoopEngine(seed).run(setup, [reader, close_and_reuse])
        assert holder.got is None
        assert file_ref_read(holder.mine, "f_ref") == 1


@pytest.mark.usefixtures("pause_before_get")
@pytest.mark.parametrize("reader", [reader_active, reader_rcu])
def test_without_reload_the_reader_gets_a_stranger(reader: Any) -> None:
    """H74's broken twin: a reference to /second for a pointer that never led there."""
    with guards.without("file-reload-check"):
        holder = CoopEngine(0).run(setup, [reader, close_and_reuse])
    assert (holder.got is holder.mine, holder.got.f_path) == (True, "/second")


@pytest.mark.usefixtures("pause_before_get")
@pytest.mark.parametrize("reader", [reader_active, reader_rcu])
def test_file_reused_in_place_is_taken(reader: Any) -> None:
    """The pointer leads to the new file now, so the reference is to the right one."""
    for seed in range(5):
        holder = CoopEngine(seed).run(setup, [reader, reopen_in_place])
        assert (holder.got is holder.file, holder.got.f_path) == (True, "/second")
        assert file_ref_read(holder.got, "f_ref") == 2


# ------------------------------------------------------------------------------------------------ no memset


@pytest.fixture
def pause_in_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader gets between the allocation and init_file, and goes on after init_file."""
    holders: list[Holder] = []

    def remember(obj: Any, field: str) -> Any:
        holders.append(obj)
        return real(obj, field)

    def paused_get(file: File, field: str) -> bool:
        holder = holders[-1]
        WRITE_ONCE(holder, "turn", 1)
        smp_cond_load_acquire(holder, "turn", reached(2))
        got = file_ref_get(file, field)
        WRITE_ONCE(holder, "turn", 3)
        smp_cond_load_acquire(holder, "turn", reached(4))
        return got

    def paused_init(file: File, flags: int) -> None:
        if not holders:
            init_file(file, flags)
            return
        holder = holders[-1]
        WRITE_ONCE(holder, "turn", 2)
        smp_cond_load_acquire(holder, "turn", reached(3))
        init_file(file, flags)
        WRITE_ONCE(holder, "turn", 4)

    real = file_get.rcu_dereference
    monkeypatch.setattr(file_get, "rcu_dereference", remember)
    monkeypatch.setattr(file_get, "file_ref_get", paused_get)
    monkeypatch.setattr(file_table, "init_file", paused_init)


def close_and_open(holder: Holder) -> None:
    smp_cond_load_acquire(holder, "turn", reached(1))
    file = holder.file
    rcu_assign_pointer(holder, "file", None)
    fput(file)
    holder.mine = open_file("/second", size=1)


@pytest.mark.usefixtures("pause_in_init")
def test_a_file_being_initialised_refuses_references() -> None:
    """Until init_file is through, f_ref says dead."""
    holder = CoopEngine(0).run(setup, [reader_active, close_and_open])
    assert (holder.got, is_freed(holder.mine), file_ref_read(holder.mine, "f_ref")) == (None, False, 1)
    assert kernel_warnings() == ()


@pytest.mark.usefixtures("pause_in_init")
def test_a_file_zeroed_at_allocation_is_closed_under_its_owner() -> None:
    """Broken twin: zero means one reference; the late reader takes one, init_file forgets it, its fput is
    one too many.
    """
    with guards.without("file-alloc-without-memset"):
        holder = CoopEngine(0).run(setup, [reader_active, close_and_open])
    assert is_freed(holder.mine)


# ----------------------------------------------------------------------------------------------- both engines


def take_and_put(holder: Holder) -> None:
    for _ in range(3):
        file = get_file_active(holder, "file")
        if file is not None:
            assert file.f_path == "/first"
            assert file.f_inode is not None
            fput(file)


def swap(holder: Holder) -> None:
    for _ in range(3):
        old = holder.file
        rcu_assign_pointer(holder, "file", None)
        fput(old)
        other = open_file("/second", size=1)
        rcu_assign_pointer(holder, "file", open_file("/first", size=1))
        fput(other)


def test_readers_and_a_swapper_interleaved() -> None:
    """Whatever reader wins, it holds /first."""
    for seed in range(25):
        holder = CoopEngine(seed).run(setup, [take_and_put, swap])
        assert file_ref_read(holder.file, "f_ref") == 1
        assert kernel_warnings() == ()


def test_readers_and_a_swapper_on_real_threads() -> None:
    """The same on real threads."""
    holder = setup()
    tasks = [kthread_run(take_and_put, holder, daemon=False) for _ in range(3)]
    tasks.append(kthread_run(swap, holder, daemon=False))
    for task in tasks:
        engine().join(task)
    assert file_ref_read(holder.file, "f_ref") == 1
    assert kernel_warnings() == ()
