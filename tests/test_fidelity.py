"""docs/fidelity.md names functions that exist, and leaves none of the modules it is about out."""

import ast
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "fidelity.md").read_text()
HOW = {"copied", "changed", "stubbed"}


def rows():
    """The cells of every table row but heads and rules."""
    found = []
    for line in TEXT.splitlines():
        if line.startswith("|") and not re.match(r"\|[-|]+$", line):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[0].startswith("`"):
                found.append(cells)
    return found


def listed():
    """module.name of everything the document lists; module.* where it lists all of a module."""
    names = set()
    for cells in rows():
        quoted = re.findall(r"`([^`]+)`", cells[2] if len(cells) == 5 else cells[1])
        if len(cells) == 5:
            names.update(quoted)
        elif cells[1] == "all":
            names.add(cells[0].strip("`") + ".*")
        else:
            names.update(f"{cells[0].strip('`')}.{name}" for name in quoted)
    return names


def test_every_name_in_the_tables_exists():
    """A renamed function is renamed in the document too."""
    missing = []
    for name in sorted(listed()):
        module, _, function = name.rpartition(".")
        loaded = importlib.import_module(f"kmodel.mm.{module}")
        if function != "*" and not hasattr(loaded, function):
            missing.append(name)
    assert missing == []


def test_every_row_says_how():
    """Each kernel function has its file, and is copied, changed or stubbed."""
    wrong = [cells for cells in rows() if len(cells) == 5 and (cells[3] not in HOW or "/" not in cells[1])]
    assert wrong == []


def test_no_function_is_missing():
    """Functions and classes of kmodel/mm, but for helpers (_x): new ones go into docs/fidelity.md."""
    names = listed()
    missing = []
    for path in sorted((ROOT / "kmodel" / "mm").glob("*.py")):
        if path.stem == "__init__" or f"{path.stem}.*" in names:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not re.match(r"_[a-zA-Z]", node.name):
                if f"{path.stem}.{node.name}" not in names:
                    missing.append(f"{path.stem}.{node.name}")
    assert missing == []
