"""Readers of files under the explorer: every interleaving, nothing forced; no guard may go."""

from typing import Any

import pytest

from kmodel.core import Struct, boot, guards, kernel_struct, ptr, rcu_assign_pointer, rcu_dereference
from kmodel.explore import Verdict, explore
from kmodel.fs import backing_file_open, file_ref_read, fput, get_file_active, iget_path, open_file
from kmodel.rcu import rcu_read_lock, rcu_read_unlock

pytestmark = pytest.mark.explore


@kernel_struct
class Holder(Struct):
    """One published pointer to a file, and the file its writer ends up with."""

    file: Any = None
    mine: Any = None


def setup() -> Holder:
    boot()
    iget_path("/second", size=1)
    return Holder(file=open_file("/first", size=1))


def reader(holder: Holder) -> None:
    file = get_file_active(holder, "file")
    assert file is None or file.f_path == "/first", "a stranger's file"


def close_and_reuse(holder: Holder) -> None:
    file = holder.file
    rcu_assign_pointer(holder, "file", None)
    fput(file)
    holder.mine = open_file("/second", size=1)


def final(holder: Holder) -> None:
    assert file_ref_read(holder.mine, "f_ref") == 1


@pytest.mark.parametrize("memory", ["sc", "lkmm"])
def test_get_file_active_is_right_in_every_execution(memory: Any) -> None:
    """H74, exhausted."""
    result = explore(setup, reader, close_and_reuse, final=final, memory=memory)
    assert result.verdict is Verdict.PASS


@pytest.mark.parametrize("guard", ["file-reload-check", "file-alloc-without-memset"])
def test_each_guard_of_get_file_is_needed(guard: str) -> None:
    """H74's broken twins are found."""
    with guards.without(guard):
        result = explore(setup, reader, close_and_reuse, final=final, memory="sc")
    assert result.verdict is Verdict.FAIL


def setup_backing() -> Holder:
    boot()
    return Holder(file=backing_file_open("/merged/a", "/upper/a", size=1))


def speculative_reader(holder: Holder) -> None:
    rcu_read_lock()
    file = rcu_dereference(holder, "file")
    if file is not None:
        ptr(file.f_inode)
    rcu_read_unlock()


def unmapper(holder: Holder) -> None:
    file = holder.file
    rcu_assign_pointer(holder, "file", None)
    fput(file)


@pytest.mark.parametrize(
    ("removed", "verdict"), [((), Verdict.PASS), (("backing-files-typesafe",), Verdict.FAIL)]
)
def test_backing_files_need_their_cache(removed: Any, verdict: Verdict) -> None:
    """H13: freed without RCU, a backing file is read after it was freed."""
    with guards.without(*removed):
        result = explore(setup_backing, speculative_reader, unmapper, memory="sc")
    assert result.verdict is verdict
