"""The stress suites: real threads against each other, for seconds under pytest, for hours if a person likes.

    KMODEL_STRESS_SECONDS=600 KMODEL_STRESS_SEED=7 python -m pytest stress -p no:xdist

They run alone (no xdist): they want the processors to themselves.
"""

import os
import random
import sys

import pytest

from kmodel.core import gil_was_reenabled

DEFAULT_SECONDS = 2.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here is a stress test."""
    for item in items:
        item.add_marker(pytest.mark.stress)


@pytest.fixture
def seconds() -> float:
    """How long one stress program runs."""
    return float(os.environ.get("KMODEL_STRESS_SECONDS", DEFAULT_SECONDS))


@pytest.fixture
def seed() -> int:
    """The seed of this test's decisions, printed so that a failure can be tried again.

    How the system schedules the threads it does not repeat.
    """
    chosen = int(os.environ.get("KMODEL_STRESS_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"KMODEL_STRESS_SEED={chosen}")
    return chosen


@pytest.fixture(autouse=True)
def gil_stays_off() -> None:
    """A stress on threads that take turns would prove little: say so instead of passing."""
    if gil_was_reenabled():
        pytest.exit(f"{sys.executable} was built without a GIL but runs with one", returncode=2)
