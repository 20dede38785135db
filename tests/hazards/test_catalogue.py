"""Scenarios: finding them by name, in files, and exploring them with and without their guard."""

import sys
from pathlib import Path
from typing import Any

import pytest

from kmodel.core import READ_ONCE, WRITE_ONCE, guards, variables, xchg
from kmodel.explore import Verdict
from kmodel.hazards import (
    CatalogueError,
    Scenario,
    catalogue,
    find_scenario,
    load_scenario,
    register,
    scenario,
    scenarios,
)

GUARD = guards.register("test-catalogue-atomic", "a lost update, for tests/hazards")


def _setup() -> Any:
    return variables(taken=0, entered=0)


def _enter(v: Any) -> None:
    if GUARD in guards.removed:
        free = READ_ONCE(v, "taken") == 0
        WRITE_ONCE(v, "taken", 1)
    else:
        free = xchg(v, "taken", 1) == 0
    if free:
        assert xchg(v, "entered", 1) == 0, "two tasks inside"


def _make(name: str = "test-door", **more: Any) -> Scenario:
    return Scenario(
        **{
            "name": name,
            "summary": "Two tasks, one door.",
            "setup": _setup,
            "threads": [_enter, _enter],
            **more,
        }
    )


@pytest.fixture(autouse=True)
def _own_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers, and where it imports from, is forgotten after it."""
    scenarios()
    monkeypatch.setattr(catalogue, "_registered", dict(catalogue._registered))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_the_guard_makes_the_difference() -> None:
    """The scenario passes, its broken twin fails, and the guard is back afterwards."""
    door = _make(without=GUARD)

    assert door.explore(memory="sc").verdict is Verdict.PASS
    assert door.explore(memory="sc", broken=True).verdict is Verdict.FAIL
    assert guards.removed == frozenset()


def test_a_twin_with_other_threads() -> None:
    """A twin may have threads of its own instead of a removed guard."""

    def barge(v: Any) -> None:
        assert xchg(v, "entered", 1) == 0, "two tasks inside"

    door = _make(broken_threads=[_enter, barge])

    assert door.tasks() == (_enter, _enter)
    assert door.explore(memory="sc", broken=True).verdict is Verdict.FAIL


def test_without_a_twin_there_is_nothing_to_break() -> None:
    """A scenario without guard or twin says so when its twin is asked for."""
    with pytest.raises(CatalogueError, match="test-door has no broken twin"):
        _make().explore(broken=True)


def test_other_guards_can_be_removed_too() -> None:
    """A guard that the scenario does not name can be removed by the caller."""
    assert _make().explore(memory="sc", also_without=(GUARD,)).verdict is Verdict.FAIL


def test_options_of_the_caller_win() -> None:
    """The scenario's own bound is a default."""
    door = _make(options={"max_executions": 1}, memory="sc")

    assert door.explore().verdict is Verdict.BOUNDED
    assert door.explore(max_executions=None).verdict is Verdict.PASS


def test_found_by_name_and_by_hazard() -> None:
    """A scenario is found by its name, and by its hazard in either case if that has only one."""
    door = register(_make(hazards="H901"))

    assert find_scenario("test-door") is door
    assert find_scenario("h901") is door
    assert "test-door" in scenarios()


def test_several_scenarios_of_a_hazard() -> None:
    """A hazard with more than one scenario is not guessed at."""
    register(_make("test-a", hazards=("H901",)))
    register(_make("test-b", hazards=("H901", "H902")))

    with pytest.raises(CatalogueError, match="H901 has several scenarios: test-a, test-b"):
        find_scenario("H901")


def test_an_unknown_name_gets_a_hint() -> None:
    """A misspelt name is answered with the nearest one."""
    register(_make())

    with pytest.raises(CatalogueError, match="did you mean test-door"):
        find_scenario("test-dor")


def test_a_name_is_registered_once() -> None:
    """The decorator registers what its function returns, and a second scenario of that name is an error."""

    @scenario
    def door() -> Scenario:
        return _make()

    assert find_scenario("test-door").name == door().name
    with pytest.raises(ValueError, match="registered twice"):
        register(_make())


def test_an_unknown_memory_model_is_refused() -> None:
    """A scenario names a memory model that exists."""
    with pytest.raises(ValueError, match="memory"):
        _make(memory="alpha")


FILE = '''
from kmodel.core import variables
import beside

def setup():
    return variables(x=0)

def body(v):
    v.x = beside.VALUE

def as_dict():
    """One task stores."""
    return {"setup": setup, "threads": [body], "memory": "sc", "max_executions": 5}

def not_one():
    return 7

def raises():
    return undefined

def no_threads():
    return {"setup": setup}

def no_function():
    return {"setup": 3, "threads": [body]}

def odd_key():
    return {"setup": setup, "threads": [body], "colour": "red"}
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("VALUE = 1\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_function_of_a_file(file: Path) -> None:
    """FILE.py:FUNCTION runs the function; a dict becomes a scenario with the function's doc string."""
    found = load_scenario(f"{file}:as_dict")

    assert (found.name, found.summary, found.memory) == ("as_dict", "One task stores.", "sc")
    assert found.options == {"max_executions": 5}
    assert found.explore().verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("as_dit", "has no function 'as_dit'; did you mean as_dict?"),
        ("not_one", "returned int, not a Scenario"),
        ("raises", "failed: NameError: name 'undefined' is not defined (line 19)"),
        ("no_threads", "its dict needs 'setup', a function, and 'threads'"),
        ("no_function", "'setup' and each of 'threads' must be a function"),
        ("odd_key", "explore() has no 'colour'"),
    ],
)
def test_an_unusable_function(file: Path, function: str, told: str) -> None:
    """Whatever is wrong with the function is one line that names it."""
    with pytest.raises(CatalogueError) as caught:
        load_scenario(f"{file}:{function}")

    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "content", "told"),
    [
        ("gone.py:f", None, "there is no file"),
        ("mine.py", "", "say which function"),
        ("mine.txt:f", "", "neither a scenario's name nor FILE.py:FUNCTION"),
        ("mine.py:f", "def f(:", "cannot be loaded: SyntaxError"),
        ("mine.py:f", "\n\n1 / 0", "cannot be loaded: ZeroDivisionError: division by zero (line 3)"),
    ],
)
def test_an_unusable_file(target: str, content: str | None, told: str, tmp_path: Path) -> None:
    """A file that is missing or cannot be loaded is one line that says why, and where in it."""
    if content is not None:
        (tmp_path / target.partition(":")[0]).write_text(content)

    with pytest.raises(CatalogueError) as caught:
        load_scenario(f"{tmp_path}/{target}")

    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_scenario_of_the_catalogue_is_complete() -> None:
    """Each scenario has a summary, names hazards that are numbers of the list, and guards that exist."""
    for found in scenarios().values():
        assert found.summary, found.name
        assert all(h[0] == "H" and h[1:].isdigit() for h in found.hazards), found.name
        assert set(found.without) <= set(guards.known_guards()), found.name
