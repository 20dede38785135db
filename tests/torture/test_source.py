"""Reading address spaces."""

import os
from pathlib import Path

import pytest

from kmodel.torture.source import BadSource, parse_maps, read_file, read_process
from tests.torture.tiny_elf import tiny_elf


def line(path: Path, inode: int, start: int = 0x1000) -> str:
    return f"{start:08x}-{start + 0x1000:08x} r-xp 00002000 fe:00 {inode}                     {path}\n"


def test_a_line_is_read_field_by_field() -> None:
    """Start, end, permissions, offset, inode and path, which may contain spaces."""
    (mapping,) = parse_maps(
        "7f0000001000-7f0000003000 r-xp 00002000 fe:01 77      /a b/lib.so (deleted)\n", "x"
    )

    assert (mapping.start, mapping.end, mapping.perms) == (0x7F0000001000, 0x7F0000003000, "r-xp")
    assert (mapping.offset, mapping.inode, mapping.path) == (0x2000, 77, "/a b/lib.so (deleted)")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("hello\n", "x line 1 is not a line of /proc/PID/maps: 'hello'"),
        ("00001000-00001000 r-xp 0 0:0 0\n", "x line 1: 00001000-00001000 is empty or not in order"),
        (
            "00002000-00003000 r-xp 0 0:0 0\n00001000-00002000 r-xp 0 0:0 0\n",
            "x line 2: 00001000-00002000 is",
        ),
        (
            "00001800-00003000 r-xp 0 0:0 0\n",
            "x line 1: '00001800-00003000 r-xp 0 0:0 0' does not lie on pages",
        ),
        ("00001000-00003000 r-xp 10 0:0 0\n", "does not lie on pages of 4096 bytes"),
        ("ffffffff81000000-ffffffff82000000 r-xp 0 0:0 0 /vmlinux\n", "is not in user space, below 0x7ffff"),
        ("\n", "x has no mappings"),
    ],
)
def test_what_is_no_maps_file_is_refused_by_line(text: str, complaint: str) -> None:
    """The first bad line is named."""
    with pytest.raises(BadSource) as refused:
        parse_maps(text, "x")

    assert complaint in str(refused.value)


def test_a_name_may_hold_any_character_but_a_newline(tmp_path: Path) -> None:
    """The kernel escapes newlines and nothing else, so a carriage return or a page break ends no line."""
    text = "00001000-00002000 r-xp 00000000 08:01 7 /odd\rname\x0cof\x85a\u2028file\n"
    (tmp_path / "maps").write_text(text, encoding="utf-8", newline="")

    (mapping,) = read_file(str(tmp_path / "maps")).mappings

    assert mapping.path == "/odd\rname\x0cof\x85a\u2028file"


def test_the_gate_page_may_lie_above_user_space() -> None:
    """[vsyscall] is part of every x86-64 process's maps file."""
    (gate,) = parse_maps("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\n", "x")

    assert gate.path == "[vsyscall]"


def test_what_never_ends_is_refused() -> None:
    """A file is read up to a bound, not until memory runs out."""
    with pytest.raises(BadSource, match="longer than any maps file"):
        read_file("/dev/zero")


def test_own_process_has_readable_programs() -> None:
    """The interpreter that runs this test is mapped and can be read."""
    source = read_process(None)

    assert len(source.mappings) > 10
    assert os.path.realpath("/proc/self/exe") in source.readable_elf_files()


def test_a_process_that_is_not_there() -> None:
    """A pid nobody has."""
    with pytest.raises(BadSource, match="there is no process 4194999"):
        read_process(4194999)


def test_a_file_changed_since_it_was_mapped_gets_no_probes(tmp_path: Path) -> None:
    """A live process's file counts only if the path still leads to the inode that is mapped; a saved maps
    file is taken on
    trust, but only for what is an ELF file here."""
    program = tiny_elf(tmp_path / "program", {"main": (0, 2)}, b"\x90" * 64)
    (tmp_path / "maps").write_text(line(program, 1) + line(tmp_path / "missing", 2, 0x3000))

    saved = read_file(str(tmp_path / "maps"))
    live = type(saved)(saved.title, saved.text, saved.mappings, check_inodes=True)

    assert saved.readable_elf_files() == [str(program)]
    assert live.readable_elf_files() == []
