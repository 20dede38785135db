"""The catalogue: what a scenario is, and how one is found by name or in a file.

Models:      nothing in Linux; H01, H02, ... are the races of docs/hazards.md
Guards:      none; scenarios are registered while modules are imported
Invariants:  C1 a name is registered once, C2 a scenario breaks without its guards
Leaves out:  the scenarios themselves: each is a module beside this one
Read next:   explore/api.py, which runs them

A module of this room that has a scenario says

    LOOKUP = register(Scenario(
        name="uprobe-resurrection", hazards=("H01",),
        summary="A lookup takes a reference that is already gone.",
        setup=setup, threads=(unregister, lookup), final=final,
        without=("uprobe-inc-not-zero",), breaks="use-after-free",
    ))

and a file of yours that `kmodel explore FILE.py:FUNCTION` names has a function that returns a Scenario, or a
dict of what explore() takes: {"setup": ..., "threads": [...], "final": ..., "memory": "tso"}.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import attrs

from kmodel.core import guards
from kmodel.explore import Result, Verdict, explore

MEMORY_MODELS = ("sc", "tso", "lkmm")

Setup = Callable[[], Any]
Body = Callable[[Any], Any]


class CatalogueError(ValueError):
    """There is no such scenario, or it cannot be used; the text is one line for the user."""


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _bodies(value: Iterable[Body]) -> tuple[Body, ...]:
    return tuple(value)


@attrs.frozen(kw_only=True)
class Scenario:
    """A state, tasks that act on it, and what must hold; with what protects it, and how it breaks without."""

    name: str
    summary: str
    setup: Setup
    threads: tuple[Body, ...] = attrs.field(converter=_bodies)
    hazards: tuple[str, ...] = attrs.field(default=(), converter=_names)
    """Numbers in the list of hazards, such as "H01"."""
    final: Body | None = None
    outcome: Body | None = None

    # the broken twin: guards of the model removed, or other threads (if the guard is the scenario's own line)
    without: tuple[str, ...] = attrs.field(default=(), converter=_names)
    broken_threads: tuple[Body, ...] = attrs.field(default=(), converter=_bodies)
    breaks: str = ""
    """The kind of violation the broken twin ends in (docs/trace-format.md lists them); empty: any."""

    memory: str = attrs.field(default="lkmm", validator=attrs.validators.in_(MEMORY_MODELS))
    options: Mapping[str, Any] = attrs.field(factory=dict)
    """More arguments for explore(), such as {"preemptions": 2}: the bound within which it is known to end."""
    expected: Verdict | None = Verdict.PASS
    """What exploring it is known to say, and its twin; None: nobody has said."""
    expected_broken: Verdict | None = Verdict.FAIL

    @property
    def can_break(self) -> bool:
        """Whether it has a broken twin."""
        return bool(self.without or self.broken_threads)

    def tasks(self, *, broken: bool = False) -> tuple[Body, ...]:
        """The threads of the scenario, or of its broken twin."""
        return self.broken_threads if broken and self.broken_threads else self.threads

    def removed(self, *, broken: bool = False) -> tuple[str, ...]:
        """The guards its broken twin goes without."""
        return self.without if broken else ()

    def guarded(
        self, *, broken: bool = False, also_without: tuple[str, ...] = ()
    ) -> AbstractContextManager[None]:
        """A block in which those guards are removed."""
        return guards.without(*self.removed(broken=broken), *also_without)

    def explore(self, *, broken: bool = False, also_without: tuple[str, ...] = (), **options: Any) -> Result:
        """Explore it, or its broken twin; `options` go to explore() and win over the scenario's own."""
        if broken and not self.can_break:
            raise CatalogueError(f"{self.name} has no broken twin")
        with self.guarded(broken=broken, also_without=also_without):
            return explore(
                self.setup,
                *self.tasks(broken=broken),
                final=self.final,
                outcome=self.outcome,
                **{"memory": self.memory, **self.options, **options},
            )


_registered: dict[str, Scenario] = {}


def register(new: Scenario) -> Scenario:
    """Put a scenario into the catalogue, and return it."""
    if new.name in _registered:
        raise ValueError(f"scenario {new.name!r} is registered twice")
    _registered[new.name] = new
    return new


def scenario(build: Callable[[], Scenario]) -> Callable[[], Scenario]:
    """Decorator: put what this function returns into the catalogue."""
    register(build())
    return build


def scenarios() -> dict[str, Scenario]:
    """The whole catalogue, by name."""
    package = importlib.import_module("kmodel.hazards")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    return dict(sorted(_registered.items()))


def find_scenario(name: str) -> Scenario:
    """The scenario of this name, or the only one for this hazard ("H10"). CatalogueError if there is none."""
    known = scenarios()
    if name in known:
        return known[name]
    of_hazard = [found.name for found in known.values() if name.upper() in found.hazards]
    if len(of_hazard) == 1:
        return known[of_hazard[0]]
    if of_hazard:
        raise CatalogueError(f"{name.upper()} has several scenarios: {', '.join(of_hazard)}")
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; --list names them"
    raise CatalogueError(f"there is no scenario {name!r}{hint}")


def load_scenario(target: str) -> Scenario:
    """The scenario that a command names, in the catalogue or as FILE.py:FUNCTION; or CatalogueError."""
    path, colon, function = target.rpartition(":")
    if not colon:
        if target.endswith(".py"):
            raise CatalogueError(
                f"{target}: say which function of it makes the scenario, as {target}:FUNCTION"
            )
        return find_scenario(target)
    if not path.endswith(".py"):
        raise CatalogueError(f"{target} is neither a scenario's name nor FILE.py:FUNCTION")
    module = _import_file(Path(path))
    build = getattr(module, function, None)
    if isinstance(build, Scenario):
        return build
    if not callable(build):
        near = difflib.get_close_matches(function, [n for n in vars(module) if not n.startswith("_")], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise CatalogueError(f"{path} has no function {function!r}{hint}")
    try:
        made = build()
    except Exception as error:
        raise CatalogueError(f"{target} failed: {_one_line(error, path)}") from error
    return _as_scenario(made, target, function, inspect.getdoc(build))


def _import_file(path: Path) -> Any:
    """Import a file that is no part of a package, as a script is: modules beside it can be imported too."""
    if not path.is_file():
        raise CatalogueError(f"there is no file {path}")
    name = f"kmodel_scenario_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    beside = str(path.resolve().parent)
    if beside not in sys.path:
        sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise CatalogueError(f"{path} cannot be loaded: {_one_line(error, str(path))}") from error
    return module


def _one_line(error: BaseException, path: str) -> str:
    """An error, and the last line of the user's file that it came through."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    if isinstance(error, SyntaxError):
        return text
    line, trace, file = 0, error.__traceback__, str(Path(path).resolve())
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{text} (line {line})" if line else text


def _as_scenario(made: Any, target: str, function: str, doc: str | None) -> Scenario:
    if isinstance(made, Scenario):
        return made
    if not isinstance(made, Mapping):
        raise CatalogueError(
            f"{target} returned {type(made).__name__}, not a Scenario or a dict of what explore() takes"
        )
    rest = dict(made)
    try:
        setup, threads = rest.pop("setup"), tuple(rest.pop("threads"))
    except (KeyError, TypeError):
        raise CatalogueError(
            f"{target}: its dict needs 'setup', a function, and 'threads', a list of functions"
        ) from None
    if not all(map(callable, (setup, *threads))):
        raise CatalogueError(f"{target}: 'setup' and each of 'threads' must be a function")
    known = {field.name for field in attrs.fields(Scenario)} - {"options"}
    options = {name: rest.pop(name) for name in list(rest) if name not in known}
    unknown = sorted(set(options) - set(inspect.signature(explore).parameters))
    if unknown:
        raise CatalogueError(f"{target}: explore() has no {unknown[0]!r}")
    summary = (doc or "").partition("\n")[0]
    unsaid: dict[str, Any] = {"name": function, "summary": summary, "expected": None, "expected_broken": None}
    try:
        return Scenario(setup=setup, threads=threads, options=options, **{**unsaid, **rest})
    except (TypeError, ValueError) as error:
        raise CatalogueError(f"{target}: {' '.join(str(error).split())}") from None
