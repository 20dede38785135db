"""The benchmarks of uprobe schemes and unregisters run, measure what they say, and refuse bad arguments."""

from typing import Any

import pytest

from benchmarks import unregister, uprobe_schemes
from benchmarks.uprobe_lookup import FLOOR
from kmodel.core import boot
from kmodel.uprobes import ALL_SCHEMES, ref_epoch, references, tree


def test_a_scheme_is_measured_beside_the_floor(capsys: Any) -> None:
    """One pass over the epoch schemes: a row for each, and one for the floor."""
    boot()
    arguments = [
        "--threads",
        "1",
        "--passes",
        "1",
        "--milliseconds",
        "0.2",
        "--probes",
        "3",
        "--only",
        "epoch",
    ]
    assert uprobe_schemes.main(arguments) == 0
    printed = capsys.readouterr().out
    named = [name for name in ALL_SCHEMES if "epoch" in name]
    assert len(named) == 3
    assert all(name in printed for name in [FLOOR, *named])


def test_samples_are_taken_inside_the_scheme() -> None:
    """Around a run the scheme's references are in place, and the model's own afterwards."""
    scheme = ALL_SCHEMES["rwlock tree + epoch + mmap_lock"]
    before = references.implementation
    with uprobe_schemes.around(scheme):
        assert references.implementation is ref_epoch
    assert references.implementation is before


def test_every_way_unregisters_everything() -> None:
    """Each way leaves no uprobe in the tree; there is a time for each pass."""
    found = unregister.measure(2, 1)
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys(unregister.WAYS, 1)
    assert all(times[0] > 0 for times in found.values())
    assert tree.uprobes() == []


def test_ratios_are_formed_within_a_pass(capsys: Any) -> None:
    """The base has no ratio; the others' are medians over passes."""
    seconds = {name: [2.0, 30.0, 4.0] for name in unregister.WAYS} | {unregister.BASE: [1.0, 10.0, 1.0]}
    from rich.console import Console

    unregister.show(Console(width=130), seconds, 10)
    assert capsys.readouterr().out.count("x3.00 (2.00-4.00)") == len(unregister.WAYS) - 1


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (uprobe_schemes.main, ["--threads", "x"], "--threads takes numbers"),
        (uprobe_schemes.main, ["--threads", "9999"], "each thread needs its own"),
        (uprobe_schemes.main, ["--passes", "0"], "--passes must be above 0"),
        (uprobe_schemes.main, ["--only", "seqlock"], "no such scheme"),
        (uprobe_schemes.main, ["--png", "/nowhere/x.png"], "no such folder"),
        (unregister.main, ["--consumers", "0"], "--consumers must be above 0"),
    ],
)
def test_bad_arguments(main: Any, arguments: list[str], said: str, capsys: Any) -> None:
    """One line that says what is wrong, and status 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
