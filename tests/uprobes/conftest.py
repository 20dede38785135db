"""Every test here ends without a kernel warning that it did not ask for."""

from collections.abc import Iterator

import pytest

from kmodel.core import boot, clear_warnings, kernel_warnings


@pytest.fixture(autouse=True)
def quiet_kernel() -> Iterator[None]:
    """Boot before the test; no warning may be left after it."""
    boot()
    yield
    left = kernel_warnings()
    clear_warnings()
    assert left == ()
