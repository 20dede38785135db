"""Every test of this room starts from boot and leaves nothing behind."""

from collections.abc import Iterator

import pytest

from kmodel.core import boot


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    boot()
    yield
    boot()
