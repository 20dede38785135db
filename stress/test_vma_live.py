"""The model beside the running kernel for a while. Longer: python -m stress.vma_live --seconds 3600"""

import pytest

from stress.vma_live import main
from stress.vma_live_sides import why_not_here


@pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here()))
def test_no_difference(seconds: float, seed: int) -> None:
    """Random system calls leave the same mappings and the same errno on both sides."""
    assert main(["--seconds", str(seconds), "--seed", str(seed), "--smaps-every", "2"]) == 0
