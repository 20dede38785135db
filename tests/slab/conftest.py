"""Every test of the slab allocator starts at boot and ends with nothing pending."""

from collections.abc import Iterator

import pytest

from kmodel.core import boot
from kmodel.rcu import rcu_barrier


@pytest.fixture(autouse=True)
def fresh_boot() -> Iterator[None]:
    boot()
    yield
    rcu_barrier()
