"""A short uprobetorture; longer by KMODEL_STRESS_SECONDS, or python -m stress.uprobetorture --seconds 600."""

import os

import pytest

from kmodel.core import boot
from kmodel.mm import mmap_write_lock, mmap_write_unlock, vma_lookup
from kmodel.uprobes.pages import write_page
from stress import uprobetorture
from stress.uprobetorture_roles import DATA, World, counter_of

pytestmark = pytest.mark.stress


def test_uprobetorture(capsys: pytest.CaptureFixture[str]) -> None:
    """All at once for a while: clean, and everything that was to happen has happened."""
    seconds = os.environ.get("KMODEL_STRESS_SECONDS", "3")

    status = uprobetorture.main(["--seconds", seconds, "--seed", "1"])

    printed = capsys.readouterr().out
    assert (status, printed.splitlines()[-1]) == (0, "clean"), printed
    assert printed.startswith("seed 1: ")


def test_the_judges_tell() -> None:
    """P9, P12: a counter that is one too high, and a probe whose breakpoint is not wanted, are told."""
    boot()
    world = World(seed=1)
    mm = world.still
    mmap_write_lock(mm)
    assert write_page(vma_lookup(mm, DATA[0]), DATA[0] + counter_of(0x10), b"\2\0") == 0
    mmap_write_unlock(mm)
    del world.permanent[1, 0x50]

    uprobetorture.settle(world)

    told = " ".join(world.wrong)
    assert "P12: still, program 0, 0x10: counter 2" in told
    assert "P9: still, program 1, 0x50: breakpoint left" in told
    assert "the tree holds 8 probes" in told
    assert "slab has 8 of Uprobe" in told


def test_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer threads than roles are refused, with status 2."""
    with pytest.raises(SystemExit) as caught:
        uprobetorture.main(["--threads", "2"])

    assert caught.value.code == 2
    assert "one for each role" in capsys.readouterr().err
