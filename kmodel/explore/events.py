"""The small records of an exploration: tasks, locations, violations.

Models:      nothing in Linux
Guards:      one task of a run executes at a time, so nothing here needs a lock
Invariants:  V1 a location's key names the same field in every execution
Read next:   explore/scheduler.py

Sets of events are integers: bit n stands for event n of the execution. Happens-before clocks, views and the
bookkeeping of the race oracle are all such sets, so that a join is one `|`.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

import attrs

from kmodel.core.report import KernelBug

START, LOAD, STORE, RMW, FENCE, COND, LOCK, UNLOCK, RELAX, FREE = range(10)
RCU_LOCK, RCU_UNLOCK, GP_START, GP_END, SLEEP, JOIN, FLUSH, ALLOC, BARRIER, RMW_FAILED = range(10, 20)

KIND_NAMES = (
    "start",
    "load",
    "store",
    "rmw",
    "fence",
    "wait",
    "lock",
    "unlock",
    "relax",
    "free",
    "rcu-lock",
    "rcu-unlock",
    "gp-start",
    "gp-end",
    "sleep",
    "join",
    "flush",
    "alloc",
    "barrier",
    "rmw",
)


class Verdict(Enum):
    """What an exploration can say."""

    PASS = "PASS"
    """Every execution was looked at, and none breaks anything."""
    BOUNDED = "BOUNDED"
    """None that was looked at breaks anything; a bound kept others from being looked at."""
    FAIL = "FAIL"
    """An execution that breaks something was found."""
    INCONCLUSIVE = "INCONCLUSIVE"
    """The model cannot be explored as it is: it leaks nondeterminism, or a task never comes back."""


class Aborted(BaseException):
    """Unwinds a task of an execution that is over."""


class DataRace(KernelBug):
    """Two unordered accesses to one location, one of them plain and one of them a store."""


@attrs.frozen
class Related:
    """Another step that belongs to a violation."""

    event: int
    text: str


@attrs.frozen
class Wait:
    """A line of the table that explains a deadlock."""

    task: int
    what: str
    held_by: int | None
    holds: tuple[str, ...]


@attrs.define
class Violation:
    """A property that does not hold; str() is its one sentence."""

    kind: str
    message: str
    task: int | None = None
    event: int | None = None
    related: tuple[Related, ...] = ()
    waits: tuple[Wait, ...] = ()
    error: BaseException | None = attrs.field(default=None, repr=False, eq=False)

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class Loc:
    """A watched field of one object in one execution."""

    __slots__ = (
        "allr",
        "allw",
        "fclk",
        "field",
        "freed",
        "get",
        "hist",
        "key",
        "kid",
        "lastacq",
        "lastw",
        "obj",
        "plainr",
        "plainw",
        "rclk",
        "readers",
        "reads",
        "set",
        "sync",
        "version",
        "wclk",
        "writes",
    )

    def __init__(self, obj: Any, field: str, key: tuple[int, str], slot: Any) -> None:
        self.obj = obj
        self.field = field
        self.key = key
        self.kid = key[0]
        self.get = slot.__get__ if slot is not None else None
        self.set = slot.__set__ if slot is not None else None
        # happens-before of the search: the last store and the loads since
        self.lastw = -1
        self.wclk = 0
        self.rclk = 0
        self.reads: list[int] = []
        self.lastacq = -1
        self.version = 0
        self.writes: list[tuple[int, Any]] = []  # (event, value before it)
        # the race oracle: who loaded and stored here, and what a marked access synchronises with
        self.allr = self.allw = self.plainr = self.plainw = 0
        self.sync = 0
        # lkmm: the stores in coherence order, and the events that read
        self.hist: list[Any] = []
        self.readers: list[Any] = []
        self.freed = -1
        self.fclk = 0

    def __repr__(self) -> str:
        return f"{type(self.obj).__name__}#{self.kid}.{self.field}"


class Runner:
    """One task of one execution, and the access it is about to make."""

    __slots__ = (
        "F",
        "K",
        "O",
        "R",
        "W",
        "arg",
        "args",
        "baton",
        "bit",
        "children",
        "clock",
        "created",
        "daemon",
        "dirty",
        "doing",
        "finished",
        "flusher",
        "func",
        "idx",
        "kind",
        "label",
        "loc",
        "nocheck",
        "order",
        "own",
        "owner",
        "pid",
        "pointers",
        "ready",
        "sections",
        "started",
        "task",
        "turn",
        "unwinding",
        "what",
    )

    def __init__(self, idx: int, pid: int, task: Any, func: Callable[..., Any] | None, args: Any) -> None:
        self.idx = idx
        self.bit = 1 << idx
        self.pid = pid
        self.task = task
        self.func = func
        self.args = args
        self.daemon = False
        self.baton: Any = None
        self.started = False
        self.finished = False
        self.unwinding = False
        self.kind = START
        self.loc: Loc | None = None
        self.order = ""
        self.arg: Any = None
        self.what: Any = None
        self.label: Any = None
        self.ready: Callable[[Runner], bool] | None = None
        self.doing = ""
        self.clock = 0
        self.children = 0
        self.created = 0
        self.nocheck = False
        self.dirty = False
        self.turn: list[tuple[Loc, Any]] = []
        self.sections: dict[Any, Any] = {}
        self.owner: Runner | None = None  # tso: whose store buffer this pseudo-task drains
        self.flusher: Runner | None = None
        self.R = self.W = self.F = self.O = self.K = 0
        self.own = 0
        self.pointers: dict[int, int] = {}
