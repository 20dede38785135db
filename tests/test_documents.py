"""The documents: their links lead somewhere, and the commands in them are commands."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from kmodel.cli.guards import known
from kmodel.cli.main import build_parser, main
from kmodel.hazards.catalogue import CatalogueError, find_scenario

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
QUOTED = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"(?:\$ )?((?:\S*/)?kmodel [a-z].*|make [a-z].*|(?:\S*/)?python -m [a-z].*)")
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z.:]+(?:\.(?:html|json|py))?\b")
SUBCOMMANDS = ("stress", "explore", "replay", "litmus", "maps", "guards")


def headings(text: str) -> set[str]:
    """The anchors of a document's headings, as the usual renderers make them."""
    found = set()
    for line in text.splitlines():
        if line.startswith("#"):
            words = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
            found.add(words.replace(" ", "-"))
    return found


def commands(text: str) -> Iterator[str]:
    """What a document tells its reader to run: in backquotes, or on an indented line of its own."""
    for line in text.splitlines():
        whole = COMMAND.fullmatch(line.strip()) if line.startswith("    ") else None
        if whole is not None:
            yield re.split(r"  +|  # ", whole[1])[0]
        else:
            yield from (found[1] for quoted in QUOTED.findall(line) if (found := COMMAND.fullmatch(quoted)))


def complaint(command: str) -> str | None:
    """What is wrong with a command, if anything."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return None if words[1] in targets else f"there is no make {words[1]}"
    if "-m" in words:
        module = words[words.index("-m") + 1]
        if importlib.util.find_spec(module) is not None:
            return None
        return f"there is no module {module}"
    if words[1] not in SUBCOMMANDS:
        return f"there is no kmodel {words[1]}"
    values = [word for word in words[1:] if not PLACEHOLDER.fullmatch(word)]
    named = [value for option, value in pairwise(words) if option == "--break"]
    unknown = [name for name in named if not PLACEHOLDER.fullmatch(name) and name not in known()]
    if unknown:
        return f"there is no guard {unknown[0]}"
    options = [word.partition("=")[0] for word in values if word.startswith("--")]
    missing = [option for option in options if option not in options_of(words[1])]
    if missing:
        return f"kmodel {words[1]} has no option {missing[0]}"
    if words[1] == "explore" and len(values) > 1 and not values[1].startswith("-"):
        try:
            find_scenario(values[1])
        except CatalogueError as error:
            return str(error)
    return None


def options_of(subcommand: str) -> set[str]:
    """The long options of a subcommand."""
    (chooser,) = (action for action in build_parser()._actions if action.dest == "command")
    assert chooser.choices is not None
    parser = dict(chooser.choices)[subcommand]
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    """Every link goes to a file of this repository, and to a heading that it has."""
    document = ROOT / name
    broken = []
    for link in LINK.findall(document.read_text()):
        path, _hash, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        found = target.is_relative_to(ROOT) and target.exists()
        if not found or (anchor and anchor not in headings(target.read_text())):
            broken.append(link)

    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_commands(name: str) -> None:
    """Every make target, module, subcommand, option, guard and scenario that a reader is told of exists."""
    told = list(commands((ROOT / name).read_text()))

    assert [(command, wrong) for command in told if (wrong := complaint(command)) is not None] == []


@pytest.mark.parametrize("name", NAMES)
def test_imports_are_there(name: str) -> None:
    """What an example imports from kmodel can be imported."""
    for line in re.findall(r"^ {4}(from kmodel[\w.]* import .*)$", (ROOT / name).read_text(), re.MULTILINE):
        exec(line, {})


def test_the_first_lesson_prints_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's first example, run again, differs in nothing but its time."""
    text = (ROOT / "README.md").read_text()
    shown = re.findall(r"^    (?:\$ kmodel explore.*\n)((?:    .*\n|\n)+)", text, re.MULTILINE)[0]

    assert main(["explore", "seqcount-retry", "--broken"]) == 1

    printed = re.sub(r"in [\d.]+ m?s", "in 37 ms", capsys.readouterr().out)
    assert "\n".join(line[4:] for line in shown.rstrip().splitlines()) in printed


def test_the_readme_names_commands() -> None:
    """The search above finds the commands it is for, and finds fault with those that are none."""
    told = list(commands((ROOT / "README.md").read_text()))

    assert {"make stress", "make test", "kmodel explore seqcount-retry --broken"} <= set(told)
    for wrong in ("make love", "kmodel dance", "kmodel stress --gently", "python -m benchmarks.nothing"):
        assert complaint(wrong) is not None
    assert complaint("kmodel stress --break no-such-guard") == "there is no guard no-such-guard"
    assert complaint("kmodel explore no-such-scenario") is not None


@pytest.mark.parametrize("name", NAMES)
def test_no_place_of_one_machine(name: str) -> None:
    """Documents name no folder of somebody's machine and no server."""
    text = (ROOT / name).read_text()

    assert re.findall(r"(?<![\w.<])/(?:home|root|tmp|work|usr/local|mnt)/\S*|https?://\S+", text) == []
