"""Every test of this room starts from a fresh boot and leaves no callback behind."""

import pytest

from kmodel.core import boot, current
from kmodel.rcu import rcu_barrier


@pytest.fixture(autouse=True)
def fresh_boot():
    current().held_locks.clear()  # of a test elsewhere that ended in the middle
    boot()
    yield
    rcu_barrier()  # a callback of this boot must not free an object of the next
