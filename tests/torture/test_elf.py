"""Functions and bytes of ELF files."""

from pathlib import Path

import pytest

from kmodel.torture.elf import Function, NotElf, bytes_at, find_function, functions, is_elf
from tests.torture.tiny_elf import TEXT_OFFSET, tiny_elf

FUNC, OBJECT, IFUNC = 2, 1, 10


@pytest.mark.parametrize("dynamic", [True, False])
def test_functions_are_found_at_their_file_offsets(tmp_path: Path, dynamic: bool) -> None:
    """A symbol's address becomes the offset of its bytes in the file, from either symbol table."""
    path = tiny_elf(tmp_path / "e", {"b": (32, FUNC), "a": (0, FUNC)}, b"\x90" * 64, dynamic=dynamic)

    assert functions(path) == [Function(TEXT_OFFSET, "a", 16), Function(TEXT_OFFSET + 32, "b", 16)]


def test_only_functions_in_executable_bytes_count(tmp_path: Path) -> None:
    """Data symbols and addresses outside the executable segment are no functions; resolvers (IFUNC) are."""
    path = tiny_elf(
        tmp_path / "e", {"data": (0, OBJECT), "far": (4096, FUNC), "resolver": (16, IFUNC)}, b"\x90" * 64
    )

    assert [f.name for f in functions(path)] == ["resolver"]


def test_of_two_names_for_one_place_the_short_one_is_used(tmp_path: Path) -> None:
    """write and __write are one function, called write."""
    path = tiny_elf(tmp_path / "e", {"__write": (0, FUNC), "write": (0, FUNC)}, b"\x90" * 64)

    assert [f.name for f in functions(path)] == ["write"]
    assert find_function(path, "__write") == Function(TEXT_OFFSET, "__write", 16)
    assert find_function(path, "read") is None


def test_bytes_end_with_the_file(tmp_path: Path) -> None:
    """Bytes at an offset are the file's; past its end there are none."""
    path = tmp_path / "f"
    path.write_bytes(b"abcdef")

    assert bytes_at(path, 4, 16) == b"ef"
    assert bytes_at(path, 6, 16) == b""


def test_what_is_no_elf_file_is_said_to_be_none(tmp_path: Path) -> None:
    """A text file is not ELF, and neither is a file that starts like one and ends there."""
    text, stump = tmp_path / "text", tmp_path / "stump"
    text.write_text("hello")
    stump.write_bytes(b"\x7fELF\x02\x01\x01")

    assert (is_elf(text), is_elf(stump), is_elf(tmp_path / "missing")) == (False, True, False)
    for path in (text, stump):
        with pytest.raises(NotElf):
            functions(path)


def test_a_damaged_file_is_said_to_be_one(tmp_path: Path) -> None:
    """Cut short, or with one byte of its tables gone wrong, a file has functions or is refused."""
    whole = tiny_elf(tmp_path / "e", {"b": (32, FUNC), "a": (0, FUNC)}, b"\x90" * 64).read_bytes()
    tables = range(TEXT_OFFSET + 64, len(whole))
    damaged = [whole[:size] for size in (*range(4, 128, 4), *tables[::4])]
    damaged += [whole[:at] + b"\xff" + whole[at + 1 :] for at in (*range(4, 120, 3), *tables[::5])]
    refused = 0
    for content in damaged:
        (tmp_path / "e").write_bytes(content)
        try:
            functions(tmp_path / "e")
        except NotElf:
            refused += 1

    assert 0 < refused < len(damaged)
