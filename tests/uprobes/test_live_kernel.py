"""The model's uprobes beside the running kernel's: some sequences of stress/uprobe_live, every time."""

import pytest

from stress.uprobe_live.chooser import Chooser, Tally, one_sequence, replay
from stress.uprobe_live.kernel import RunningKernel, Workshop
from stress.uprobe_live.program import PAGE
from stress.uprobe_live.sides import Difference
from stress.uprobe_live.tracefs import definitions, why_not_here
from tests.uprobes.test_arch import REFUSED, analyzed

pytestmark = pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here()))


def test_equal_after_every_step() -> None:
    """Answers, hits in order, counts, bytes in memory: as the kernel has them, and nothing is left behind."""
    tally = Tally()
    before = definitions()
    with Workshop() as workshop, RunningKernel(workshop) as kernel:
        rewritten = kernel.rewritten()
        for seed in range(2):
            one_sequence(kernel, workshop.contents, Chooser(seed, ["p"], rewritten), 40, tally)

    assert tally.steps.total() == 80
    assert tally.hits > 0
    assert definitions() == before


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a model that loses a hit differs."""
    from stress.uprobe_live.model import Model

    monkeypatch.setattr(Model, "hit", lambda self, uc, address: None)
    with Workshop() as workshop, RunningKernel(workshop) as kernel:
        steps = [
            ("map", 0, 0, 1, 5, "A", 0),
            ("probe", "e1", "p", "A", "a", 0, None),
            ("call", 0, "a0."),
        ]
        with pytest.raises(Difference, match="hits differ"):
            replay(kernel, workshop.contents, steps)


def test_the_same_instructions_are_refused() -> None:
    """Enabling a probe says ENOTSUPP for the first bytes that the model refuses, and for no others tried."""
    first = [*bytes.fromhex(REFUSED), 0x00, 0x0F, 0x55, 0x64, 0x67, 0x8B, 0x90, 0xC3, 0xD5, 0xE8, 0xF3, 0xFF]
    with Workshop() as workshop:
        page = b"".join(bytes([byte]).ljust(16, b"\0") for byte in first).ljust(PAGE, b"\x90")
        (workshop.folder / "A").write_bytes(page)
        with RunningKernel(workshop) as kernel:
            kernel.do(("map", 0, 0, 1, 5, "A", 0))
            answers = {}
            for n, byte in enumerate(first):
                answers[byte] = kernel.do(("probe", "e", "p", "A", n * 16, 0, None)).answer
                if not answers[byte]:
                    kernel.do(("drop", "e"))

    model = {byte: -analyzed(bytes([byte]))[0] for byte in first}
    assert answers == model
