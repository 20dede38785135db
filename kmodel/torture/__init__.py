"""Torture: real address spaces, many tasks, and an oracle that checks every answer."""

from kmodel.torture.aims import AIMED_AT
from kmodel.torture.report import HARD_PATHS, SHORT_RUN_SECONDS, Report, check_writable
from kmodel.torture.run import BadUsage, Progress, Torture, default_threads
from kmodel.torture.world import Config

__all__ = [
    "AIMED_AT",
    "HARD_PATHS",
    "SHORT_RUN_SECONDS",
    "BadUsage",
    "Config",
    "Progress",
    "Report",
    "Torture",
    "check_writable",
    "default_threads",
]
