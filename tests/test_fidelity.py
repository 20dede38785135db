"""docs/fidelity.md names functions that exist, and leaves none of the modules it is about out."""

import ast
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "fidelity.md").read_text()
HOW = {"copied", "changed", "stubbed"}


def rows():
    """The cells of every table row but heads and rules; names with the package that the head says."""
    found = []
    package = ""
    for line in TEXT.splitlines():
        head = re.search(r"\(kmodel\.(\w+)\.\)", line)
        if head:
            package = head.group(1)
        if line.startswith("|") and not re.match(r"\|[-|]+$", line):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[0].startswith("`"):
                at = 2 if len(cells) == 5 else 0
                cells[at] = (
                    cells[at].replace("`", f"`{package}.", 1) if at == 0 else qualified(cells[at], package)
                )
                found.append(cells)
    return found


def qualified(cell, package):
    """`a.b`, `c.d` with the package before each name."""
    return re.sub(r"`([^`]+)`", rf"`{package}.\1`", cell)


def listed():
    """package.module.name of everything the document lists; package.module.* where it lists all of a
    module.
    """
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
        loaded = importlib.import_module(f"kmodel.{module}")
        if function != "*" and not hasattr(loaded, function):
            missing.append(name)
    assert missing == []


def test_every_row_says_how():
    """Each kernel function has its file, and is copied, changed or stubbed."""
    wrong = [cells for cells in rows() if len(cells) == 5 and (cells[3] not in HOW or "/" not in cells[1])]
    assert wrong == []


def test_no_function_is_missing():
    """Functions and classes of kmodel/mm, and of the modules of kmodel/uprobes that are listed, but for
    helpers (_x): new ones go into docs/fidelity.md.
    """
    names = listed()
    modules = {name.rpartition(".")[0] for name in names}
    missing = []
    for package in ("mm", "uprobes"):
        for path in sorted((ROOT / "kmodel" / package).glob("*.py")):
            module = f"{package}.{path.stem}"
            if (
                path.stem == "__init__"
                or f"{module}.*" in names
                or (package != "mm" and module not in modules)
            ):
                continue
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not re.match(r"_[a-zA-Z]", node.name):
                    if f"{module}.{node.name}" not in names:
                        missing.append(f"{module}.{node.name}")
    assert missing == []
    assert {"uprobes.register", "uprobes.tree", "uprobes.lifetime", "uprobes.mm_hooks"} <= modules
