"""What is wrong with an execution, besides failed assertions: races, dead objects, deadlocks, lock order,
leaks.

Models:      KCSAN, KASAN, lockdep and kmemleak as far as their verdicts go
Guards:      the engine's baton
Invariants:  W1 a violation names the event at which it shows and those that belong to it
Leaves out:  lock classes: two locks of one class are two locks here
Read next:   explore/timeline.py, which prints them
"""

from typing import Any

from kmodel.core.report import KernelBug, LockingBug, UseAfterFree
from kmodel.core.struct import KernelObject
from kmodel.explore.events import COND, JOIN, LOCK, RELAX, Loc, Related, Runner, Violation, Wait


def classify(error: BaseException, runner: Runner | None, event: int | None) -> Violation:
    """The violation that an exception of a task or of final() amounts to."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    kind = "error"
    if isinstance(error, UseAfterFree):
        kind = "use-after-free"
    elif isinstance(error, LockingBug):
        kind = "locking"
    elif isinstance(error, KernelBug):
        kind = "double-free" if "double free" in text else "refcount" if "refcount" in text else "assertion"
    elif isinstance(error, AssertionError):
        kind = "assertion"
    elif isinstance(error, AttributeError) and error.obj is None:
        text = f"NULL pointer dereference: .{error.name} of nothing"
    else:
        text = f"{type(error).__name__}: {text}"
    return Violation(kind, text, None if runner is None else runner.idx, event, error=error)


class Oracles:
    """The oracles of one exploration."""

    def __init__(self, engine: Any, *, leaks: bool) -> None:
        self.e = engine
        self.leaks = leaks
        # lock -> locks taken while it was held, and their names, over all executions
        self.order: dict[int, set[int]] = {}
        self.lock_names: dict[int, str] = {}

    def name(self, obj: Any) -> str:
        """An object in words, the same in every execution."""
        e = self.e
        return e.names.of(obj)  # type: ignore[no-any-return]

    def where(self, loc: Loc) -> str:
        """A location in words."""
        return self.e.names.field(loc.obj, loc.field)  # type: ignore[no-any-return]

    # -- memory

    def data_race(self, me: Runner, d: int, loc: Loc, others: int, kind: str, order: str) -> None:
        """An access of `me` is not ordered with the earlier events `others`, and one of them is plain."""
        if loc.field in getattr(type(loc.obj), "__k_data_racy__", ()):
            return  # declared __data_racy: the code judges what it got by other means
        e = self.e
        other = others.bit_length() - 1
        theirs = e.runners[e.evt[other]]
        how = "plain" if loc.plainw >> other & 1 or loc.plainr >> other & 1 else "marked"
        what = "store" if loc.allw >> other & 1 else "load"
        mine = "plain" if order == "plain" else "marked"
        site = ""
        if e.recorder is not None:
            site = f" ({e.recorder.here(me)} and {e.recorder.site(other)})"
        message = (
            f"the {mine} {kind} of {self.where(loc)} by {me.task.comm} and the {how} {what} by "
            f"{theirs.task.comm} are not ordered{site}"
        )
        violation = Violation(
            "data-race",
            message,
            me.idx,
            d,
            (Related(other, f"the {how} {what} of {theirs.task.comm}"),),
        )
        self._stop_after(me, d, loc, kind, order, violation)

    def use_after_free(self, me: Runner, d: int, loc: Loc, how: str) -> None:
        """An access of `me` meets an object that was freed at loc.freed."""
        e = self.e
        freer = e.runners[e.evt[loc.freed]]
        violation = Violation(
            "use-after-free",
            f"{self.where(loc)} is {how} by {me.task.comm} after {freer.task.comm} freed the object",
            me.idx,
            d,
            (Related(loc.freed, f"freed by {freer.task.comm}"),),
        )
        self._stop_after(me, d, loc, how, "", violation)

    def _stop_after(self, me: Runner, d: int, loc: Loc, how: str, order: str, violation: Violation) -> None:
        e = self.e
        if e.recorder is not None:
            e.recorder.offending(me, loc, how, order)
        e.commit(me, d, me.clock | 1 << d, me.kind, loc, True)
        e.broke(violation)

    def note_free(self, me: Runner, d: int, obj: Any) -> None:
        """`obj` was freed at event d."""
        self.e.allocated_now.pop(obj._k_id, None)

    def note_alloc(self, me: Runner | None, obj: Any) -> None:
        """`obj` was allocated."""
        self.e.allocated_now[obj._k_id] = obj

    # -- the end of an execution

    def at_end(self) -> Violation | None:
        """What is wrong although every task has ended."""
        if self.leaks and self.e.allocated_now:
            names = ", ".join(self.name(obj) for obj in self.e.allocated_now.values())
            return Violation("leak", f"still allocated at the end: {names}")
        return None

    def deadlock(self) -> Violation:
        """Nobody can go on: the table of who waits for what."""
        e = self.e
        stuck = [r for r in e.runners if r.started and not r.finished and r.owner is None]
        waits = []
        for runner in stuck:
            waits.append(
                Wait(runner.idx, self._waits_for(runner), self._holder(runner), tuple(self._held(runner)))
            )
        texts = []
        for w in waits:
            text = f"{e.runners[w.task].task.comm} {w.what}"
            if w.held_by is not None:
                text += f" (held by {e.runners[w.held_by].task.comm})"
            if w.holds:
                text += f", holding {', '.join(w.holds)}"
            texts.append(text)
        must_end = [r for r in stuck if not r.daemon]
        sleeping = must_end and all(r.doing.startswith("sleeps") for r in must_end)
        kind = "lost-wakeup" if sleeping else "deadlock"
        message = ("nobody will wake the sleepers: " if sleeping else "no task can go on: ") + "; ".join(
            texts
        )
        return Violation(kind, message, None, None, waits=tuple(waits))

    def _waits_for(self, runner: Runner) -> str:
        if runner.kind in (LOCK, COND) and runner.loc is not None:
            verb = "sleeps on" if runner.doing.startswith("sleeps") else "waits for"
            return f"{verb} {self.where(runner.loc)}"
        return runner.doing or "waits"

    def _holder(self, runner: Runner) -> int | None:
        loc = runner.loc
        if runner.kind == JOIN:
            return next((o.idx for o in runner.what if not o.finished), None)
        if runner.kind == RELAX or loc is None:
            return None
        wanted = self.e.root_of(loc.obj)
        for other in self.e.runners:
            if other is not runner and not other.finished:
                for lock, _mode in other.task.held_locks:
                    if isinstance(lock, KernelObject) and self.e.root_of(lock) == wanted:
                        return other.idx  # type: ignore[no-any-return]
        if runner.kind == LOCK and loc.lastacq >= 0:
            holder: int = self.e.evt[loc.lastacq]
            return holder if holder != runner.idx else None
        return None

    def _held(self, runner: Runner) -> list[str]:
        return [f"{self.name(lock)} ({mode})" for lock, mode in runner.task.held_locks]

    # -- lock order

    def acquired(self, me: Runner | None, lock: Any, mode: str) -> None:
        """`me` took a lock: note what it held."""
        if me is None or not isinstance(lock, KernelObject):
            return
        new = lock._k_id
        for held, how in me.task.held_locks:
            if held is lock or not isinstance(held, KernelObject) or (mode == "read" == how):
                continue
            before = held._k_id
            if before not in self.order:
                self.order[before] = set()
            if new not in self.order[before]:
                self.order[before].add(new)
                self.lock_names[before], self.lock_names[new] = self.name(held), self.name(lock)

    def lock_cycles(self) -> list[list[str]]:
        """Circles of locks that were each taken while the one before was held, in whatever executions."""
        found: dict[frozenset[int], list[str]] = {}

        def follow(path: list[int]) -> None:
            for after in sorted(self.order.get(path[-1], ())):
                if after == path[0] and len(path) > 1:
                    found.setdefault(frozenset(path), [self.lock_names[lock] for lock in path])
                elif after not in path and after > path[0]:
                    follow([*path, after])

        for lock in sorted(self.order):
            follow([lock])
        return list(found.values())
