"""The explorer: every interleaving of a scenario, under the kernel's memory model."""

from kmodel.explore.api import explore, replay
from kmodel.explore.events import DataRace, Verdict, Violation
from kmodel.explore.result import Result

__all__ = ["DataRace", "Result", "Verdict", "Violation", "explore", "replay"]
