"""The explorer: every interleaving of a scenario, under the kernel's memory model."""

from kmodel.explore.api import Result, explore
from kmodel.explore.events import Verdict, Violation

__all__ = ["Result", "Verdict", "Violation", "explore"]
