"""The rooms of the package import each other in one direction only."""

import ast
from pathlib import Path

import pytest

import kmodel

PACKAGE = Path(kmodel.__file__).parent

# From the bottom up: a room may import itself and any room before it.
ROOMS = [
    "core",
    "sync",
    "rcu",
    "slab",
    "fs",
    "mm",
    "uprobes",
    "proc",
    "torture",
    "explore",
    "simulate",
    "hazards",
    "cli",
]

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
REPOSITORY = PACKAGE.parent
OUTSIDE = [
    path
    for folder in ("stress", "benchmarks", "tests")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]


def imports_of(source: str) -> set[str]:
    """Every module a source file imports, anywhere in it, under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: this check, and a reader, want the full name"
            names.add(node.module or "")
    return names


def layering_errors(room: str, source: str) -> list[str]:
    """What a module of `room` imports that it may not."""
    errors = []
    for name in sorted(imports_of(source)):
        parts = name.split(".")
        if parts[0] == "kmodel" and len(parts) > 1:
            if parts[1] not in ROOMS:
                errors.append(f"{name} is in no known room")
            elif ROOMS.index(parts[1]) > ROOMS.index(room):
                errors.append(f"{room} is below {parts[1]} and imports {name}")
        elif parts[0] in ("stress", "tests", "benchmarks"):
            errors.append(f"the package imports {name}")
        elif parts[0] == "threading" and room not in ("core", "explore", "simulate"):
            errors.append(f"{room} imports threading; only engines may")
    return errors


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    """No module imports a room above its own, threading outside the engines, or anything outside the
    package."""
    room = path.relative_to(PACKAGE).parts[0]
    if room.endswith(".py"):
        room = "core"  # kmodel/__init__.py: imports nothing but what core may

    assert layering_errors(room, path.read_text()) == []


def test_the_check_can_fail() -> None:
    """The layering check reports an upward import, a stray threading and an import of the tests."""
    bad = "import threading\nfrom kmodel.uprobes.lookup import x\nimport tests.core\n"

    assert sorted(layering_errors("mm", bad)) == [
        "mm imports threading; only engines may",
        "mm is below uprobes and imports kmodel.uprobes.lookup",
        "the package imports tests.core",
    ]


def test_every_room_is_listed() -> None:
    """Each folder of the package is a room of the list, so that none escapes the check."""
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE}

    assert folders - set(ROOMS) == set()


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_relative_imports_outside(path: Path) -> None:
    """Tests, stress programs and benchmarks use full module names too."""
    imports_of(path.read_text())
