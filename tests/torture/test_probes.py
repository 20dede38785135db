"""Probe specifications, and the choice of probes when nobody said which."""

import random
from pathlib import Path

import pytest

from kmodel.torture.probes import (
    CLUSTER_SIZE,
    BadProbe,
    Choice,
    Probe,
    ProbeSpec,
    choose,
    parse_probe,
    resolve,
)
from tests.torture.tiny_elf import TEXT_OFFSET, tiny_elf


@pytest.mark.parametrize(
    ("text", "path", "symbol", "offset", "event"),
    [
        ("/lib/libc.so.6:fopen", "/lib/libc.so.6", "fopen", 0, None),
        ("/lib/libc.so.6:fopen+0x4", "/lib/libc.so.6", "fopen", 4, None),
        ("/bin/bash:0x4245c0", "/bin/bash", None, 0x4245C0, None),
        ("/a:b:0x10", "/a:b", None, 0x10, None),
        ("p:zfree /bin/zsh:0x46420", "/bin/zsh", None, 0x46420, "zfree"),
        ("p:group/zfree /bin/zsh:0x46420", "/bin/zsh", None, 0x46420, "group/zfree"),
        ("p /bin/bash:4096", "/bin/bash", None, 4096, None),
    ],
)
def test_specifications_that_are_understood(
    text: str, path: str, symbol: str | None, offset: int, event: str | None
) -> None:
    """PATH:SYMBOL, PATH:OFFSET and tracefs's own lines."""
    assert parse_probe(text) == ProbeSpec(text, path, symbol, offset, event)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("/bin/ls", "expected PATH:SYMBOL"),
        (":main", "expected PATH:SYMBOL"),
        ("/bin/ls:", "expected PATH:SYMBOL"),
        ("/bin/ls:12x", "'12x' is not an offset"),
        ("/bin/ls:main+x", "'x' is not an offset"),
        ("r:name /bin/ls:0x10", "return probes are not supported"),
        ("p:name /bin/ls:0x10%return", "return probes are not supported"),
        ("p:na-me /bin/ls:0x10", "'na-me' is not an event name"),
        ("p:name /bin/ls:0x10 %ax", "fetch arguments (%ax) are not supported"),
        ("/bin/ls:0x10(0x20)", "reference counter offsets are not supported"),
        ("p:name /bin/ls:main", "/bin/ls:main would do"),
    ],
)
def test_specifications_that_are_refused(text: str, complaint: str) -> None:
    """The complaint names the specification and what is wrong with it."""
    with pytest.raises(BadProbe) as refused:
        parse_probe(text)

    assert repr(text) in str(refused.value)
    assert complaint in str(refused.value)


def test_a_symbol_resolves_to_its_offset(tmp_path: Path) -> None:
    """PATH:SYMBOL+N is N bytes behind where the symbol's bytes are in the file."""
    path = tiny_elf(tmp_path / "e", {"main": (16, 2)}, b"\x90" * 64)

    probe = resolve(parse_probe(f"{path}:main+2"))

    assert (probe.path, probe.offset, str(probe)) == (str(path), TEXT_OFFSET + 18, "e:main+0x2")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("missing:main", "there is no file"),
        ("e:nosuch", "has no function 'nosuch'"),
        ("text:main", "not an ELF file"),
    ],
)
def test_what_does_not_resolve(tmp_path: Path, name: str, complaint: str) -> None:
    """A file that is not there, has no such function or is no program is named."""
    tiny_elf(tmp_path / "e", {"main": (16, 2)}, b"\x90" * 64)
    (tmp_path / "text").write_text("hello")

    with pytest.raises(BadProbe, match=complaint):
        resolve(parse_probe(f"{tmp_path}/{name}"))


# ----------------------------------------------------------------------------------------- the default choice


def two_files(folder: Path) -> list[str]:
    """A "C library" and a program with functions every 64 bytes over 16 pages."""
    places = {f"f{n}": (64 * n, 2) for n in range(1024)}
    return [
        str(tiny_elf(folder / "libc.so.6", places, b"\x55" * 65536)),
        str(tiny_elf(folder / "program", places, b"\x55" * 65536)),
    ]


def choice(paths: list[str], seed: int, explicit: tuple[Probe, ...] = ()) -> Choice:
    return choose(
        paths, random.Random(seed), permanent=16, slots=4, per_slot=3, clusters=2, explicit=explicit
    )


def test_equal_seeds_choose_equal_probes(tmp_path: Path) -> None:
    """A seed fixes the probes of a run; another seed gives others."""
    paths = two_files(tmp_path)

    assert choice(paths, 1) == choice(paths, 1)
    assert choice(paths, 1) != choice(paths, 2)


def test_permanent_probes_are_half_libc_and_spread(tmp_path: Path) -> None:
    """Half are in the C library, one in each eighth of its text; the rest in other files."""
    paths = two_files(tmp_path)

    libc = [p for p in choice(paths, 1).permanent if p.path == paths[0]]

    assert (len(choice(paths, 1).permanent), len(libc)) == (16, 8)
    assert sorted((p.offset - TEXT_OFFSET) // 8192 for p in libc) == list(range(8))


def test_a_contested_slot_has_probes_at_one_offset_in_the_page(tmp_path: Path) -> None:
    """One address can be any of them: same offset in the page, different pages, both files."""
    for group in choice(two_files(tmp_path), 1).contested:
        assert len({p.in_page for p in group}) == 1
        assert len({(p.path, p.offset) for p in group}) == 3
        assert len({p.path for p in group}) == 2


def test_churned_probes_are_next_to_permanent_ones(tmp_path: Path) -> None:
    """They are neighbours in the tree, so that rotations pass over probes that must never be missed."""
    clusters = choice(two_files(tmp_path), 1).clusters

    assert len(clusters) == 2
    for cluster in clusters:
        assert len(cluster.churned) > len(cluster.permanent) > 0
        for probe in cluster.churned:
            assert any(
                abs(probe.offset - p.offset) <= 256 and p.path == probe.path for p in cluster.permanent
            )


def test_no_place_is_chosen_twice(tmp_path: Path) -> None:
    """Permanent, contested and churned probes are different places, explicit ones among the permanent."""
    paths = two_files(tmp_path)
    mine = Probe(paths[0], TEXT_OFFSET + 128, "mine", explicit=True)
    chosen = choice(paths, 1, (mine,))
    probes = [*chosen.permanent, *sum(chosen.contested, ())]
    for cluster in chosen.clusters:
        probes += (*cluster.permanent, *cluster.churned)
    places = [(p.path, p.offset) for p in probes]

    assert mine in chosen.permanent
    assert len(places) == len(set(places)) == len(chosen.all) > 16 + 12 + 2 * CLUSTER_SIZE // 2


def test_functions_that_begin_with_a_breakpoint_are_not_chosen(tmp_path: Path) -> None:
    """The kernel would refuse them."""
    path = str(tiny_elf(tmp_path / "e", {"trap": (0, 2), "fine": (16, 2)}, b"\xcc" * 16 + b"\x90" * 16))

    assert [p.name for p in choice([path], 1).all] == ["fine"]


def test_no_readable_program_is_an_error(tmp_path: Path) -> None:
    """There must be something to probe."""
    (tmp_path / "text").write_text("hello")

    with pytest.raises(ValueError, match="none of the mapped files"):
        choice([str(tmp_path / "text")], 1)
