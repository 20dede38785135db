"""The hazards: races of the modelled code as scenarios, each with the guard that prevents it and without."""

from kmodel.hazards.catalogue import (
    CatalogueError,
    Scenario,
    find_scenario,
    load_scenario,
    register,
    scenario,
    scenarios,
)

__all__ = [
    "CatalogueError",
    "Scenario",
    "find_scenario",
    "load_scenario",
    "register",
    "scenario",
    "scenarios",
]
