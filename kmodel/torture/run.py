"""A run from beginning to end: build the scene, start the tasks, watch them, stop them, and balance the
books.

Models:      nothing in Linux
Guards:      the main thread runs everything here except task_body
Invariants:  B1 what was allocated during a run is free after it, B2 a task that makes no progress is a
             violation
Leaves out:  nothing
Read next:   torture/report.py

The guards named in `removed_guards` are away from before the first task starts until after the last has
ended.
"""

import contextlib
import faulthandler
import os
import platform
import random
import shlex
import sys
import tempfile
import time

import attrs

from kmodel.core import (
    KernelBug,
    TaskStruct,
    UseAfterFree,
    current,
    engine,
    gil_enabled,
    guards,
    kernel_warnings,
    kthread_run,
)
from kmodel.torture import build
from kmodel.torture.oracle import Oracle, TaskLog, Violated
from kmodel.torture.report import HARD_PATHS, OVERTIME_SECONDS, SHORT_RUN_SECONDS, Report
from kmodel.torture.roles import DEFAULT_TASKS, roles_of
from kmodel.torture.tasks import pause_in_handler
from kmodel.torture.world import Config, Member, World

SWITCH_INTERVAL = 1e-4
WARNING_SECONDS = 0.5
STALL_SECONDS = 20.0
STOP_SECONDS = 20.0
TURNS = (0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.002)
"""How long a task computes before it gives way, in seconds; now and then long enough to be interrupted."""
STOP_SECONDS_AFTER_VIOLATION = 1.0


class BadUsage(ValueError):
    """The run cannot be made as asked; the text is one line for the user."""


@attrs.frozen
class Progress:
    """The state of a run at one moment, for showing."""

    seed: int
    threads: int
    seconds: float
    elapsed: float
    stage: str
    counts: dict[str, int]
    violations: int


def default_threads() -> int:
    """Enough for every kind of task, or one per processor if there are more of those."""
    return max(DEFAULT_TASKS, os.cpu_count() or 1)


class Torture:
    """One run."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.started = False
        self.source = ""
        self._oracle = Oracle()
        self._world: World | None = None
        self._tasks: list[TaskStruct] = []
        self._beats: dict[str, tuple[int, float]] = {}
        self._stack = contextlib.ExitStack()
        self._began = 0.0
        self._ended = 0.0
        self._stage = "starting"
        self._warned_at = 0.0
        self._over = False
        self._ledger: dict[str, int] = {}
        self._facts: list[str] = []

    @property
    def world(self) -> World:
        """The scene; only after prepare()."""
        assert self._world is not None
        return self._world

    # -- before

    def prepare(self) -> None:
        """Load the address space, choose probes and register those that stay. BadUsage if that cannot be
        done.
        """
        try:
            self._stack.enter_context(guards.without(*self.config.removed_guards))
            scene = build.build(self.config, self._oracle, self._stack)
        except BaseException as error:
            self._stack.close()
            if isinstance(error, build.Unusable):
                raise BadUsage(str(error)) from error
            raise
        self._world, self.source, self._facts = scene.world, scene.title, scene.facts

    def describe(self) -> list[str]:
        """What was prepared, as lines for people."""
        return list(self._facts)

    def again(self) -> str:
        """The command line that repeats this run."""
        c = self.config
        words = [
            "kmodel",
            "stress",
            "--seed",
            str(c.seed),
            "--threads",
            str(c.threads),
            "--seconds",
            f"{c.seconds:g}",
        ]
        words += ["--pid", str(c.pid)] if c.pid is not None else []
        words += ["--maps", c.maps] if c.maps is not None else []
        for probe in c.probes:
            words += ["--probe", probe]
        for name in c.removed_guards:
            words += ["--break", name]
        return shlex.join(words)

    # -- during

    def start(self) -> None:
        """Start every task, then let them all go at once."""
        self._oracle.started = self._oracle.now()
        count = self.config.threads
        self._tasks = [
            kthread_run(task_body, self, n, count, comm=f"torture/{n}", daemon=False) for n in range(count)
        ]
        deadline = time.monotonic() + STOP_SECONDS
        while len(self._oracle.logs) < count and time.monotonic() < deadline:
            time.sleep(0.001)
        self._began = self._ended = time.monotonic()
        self._oracle.started = self._oracle.now()
        self.started = True
        self._stage = "running"
        if gil_enabled():
            # Under a GIL tasks only meet in each other's middle if they are interrupted there.
            self._stack.callback(sys.setswitchinterval, sys.getswitchinterval())
            sys.setswitchinterval(SWITCH_INTERVAL)
        for log in list(self._oracle.logs):
            log.go = True

    def running(self) -> bool:
        """Whether the time is not up and nothing is wrong yet."""
        if self._oracle.violations:
            return False
        over = time.monotonic() - self._began - self.config.seconds
        if over < 0:
            return True
        if self.config.seconds < SHORT_RUN_SECONDS or over > OVERTIME_SECONDS:
            return False
        counts = self._oracle.totals()
        if all(counts.get(name) for name in HARD_PATHS):
            return False
        self._stage = "overtime, until every hard path was met"
        return True

    def poll(self) -> Progress:
        """Look at the tasks, also for stalls, and say how far they are."""
        self._look_for_stalls()
        self._look_for_warnings()
        elapsed = (time.monotonic() if self.started else self._began) - self._began
        return Progress(
            seed=self.config.seed,
            threads=self.config.threads,
            seconds=self.config.seconds,
            elapsed=elapsed,
            stage=self._stage,
            counts=self._oracle.totals(),
            violations=len(self._oracle.violations),
        )

    def _look_for_stalls(self) -> None:
        now = time.monotonic()
        for log in list(self._oracle.logs):
            beat, since = self._beats.get(log.name, (-1, now))
            if log.beat != beat or log.ended:
                self._beats[log.name] = (log.beat, now)
            elif now - since > STALL_SECONDS and not self._oracle.violations:
                self._oracle.report(
                    log,
                    "P5 (no stall)",
                    f"{log.name} made no progress for {now - since:.0f} s",
                    self.stacks(),
                )

    def _look_for_warnings(self) -> None:
        if self._oracle.violations:
            return
        for error in getattr(engine(), "worker_errors", []):
            self._oracle.crashed(None, "no error in a kernel worker", error)
        warnings = kernel_warnings()
        if warnings and not self._warned_at:
            self._warned_at = time.monotonic()
        # The task it happened in will know more: give it a moment to say so.
        if self._over or time.monotonic() - self._warned_at > WARNING_SECONDS:
            for warning in warnings:
                times = f" ({warning.count} times)" if warning.count > 1 else ""
                what = f"WARNING: {warning.message} at {warning.where}{times}"
                self._oracle.report(None, "no kernel warning", what)

    def stacks(self) -> list[str]:
        """What every task of the machine holds, and where every thread is."""
        lines = []
        for task in engine().tasks():
            held = ", ".join(f"{lock!r} ({how})" for lock, how in list(task.held_locks))
            lines.append(f"{task!r}, thread {task.thread_ident:#x}, holds {held or 'nothing'}")
        # The other threads' frames may not be walked while they run; faulthandler stops them for it.
        with tempfile.TemporaryFile("w+") as out:
            faulthandler.dump_traceback(out)
            out.seek(0)
            lines += out.read().splitlines()
        return lines

    # -- after

    def finish(self, *, interrupted: bool) -> Report:
        """Stop the tasks, check that the books balance, and report."""
        self._ended = time.monotonic()
        self._over = True
        self._stage = "stopping"
        stopped = self._stop()
        counts = self._oracle.totals()
        if stopped and not self._oracle.violations:
            self._stage = "balancing"
            try:
                self._ledger = build.tear_down(self.world)
            except KernelBug as error:
                self._oracle.crashed(None, "B1 (the end of the run)", error)
            for what, left in self._ledger.items():
                if left:
                    self._oracle.report(None, "B1 (ledgers balance)", f"{what}: {left} left over at the end")
        self._look_for_warnings()
        self._stack.close()
        world = self.world
        return Report(
            seed=self.config.seed,
            threads=self.config.threads,
            seconds=self.config.seconds,
            elapsed=self._ended - self._began,
            source=self.source,
            python=platform.python_version(),
            parallel=not gil_enabled(),
            removed_guards=self.config.removed_guards,
            probes={
                "permanent": len(world.permanent),
                "churned": len(world.churned),
                "contested": sum(len(group) for group in world.contested),
            },
            counts=counts,
            ledger=self._ledger,
            violations=tuple(self._oracle.violations),
            violations_not_shown=self._oracle.suppressed,
            interrupted=interrupted,
        )

    def _stop(self) -> bool:
        for log in list(self._oracle.logs):
            log.go = log.stop = True
        patience = STOP_SECONDS_AFTER_VIOLATION if self._oracle.violations else STOP_SECONDS
        deadline = time.monotonic() + patience
        left = [t for t in self._tasks if not engine().join(t, max(0.0, deadline - time.monotonic()))]
        if left and not self._oracle.violations:
            self._oracle.report(
                None,
                "P5 (no stall)",
                f"{len(left)} tasks did not end within {patience:g} s: {', '.join(map(repr, left))}",
                self.stacks(),
            )
        return not left


def task_body(torture: Torture, n: int, count: int) -> None:
    """What each task runs."""
    world, config = torture.world, torture.config
    roles = roles_of(n, count)
    log = TaskLog(f"{'+'.join(role.name for role in roles)}/{n}")
    rng = random.Random(f"{config.seed}/{n}")
    process = world.processes[n // 4 % len(world.processes)]
    task = current()
    me = Member(world, process, log, task, rng, pause_in_handler)
    task.mm = process.mm
    task.local["torture"] = me
    world.oracle.logs.append(log)
    while not log.go:
        time.sleep(0.001)
    try:
        work = [role(me, rng) for role in roles]
        turn_ends = 0.0
        while not log.stop:
            log.beat += 1
            one = work[0] if len(work) == 1 else rng.choice(work)
            one.step()
            # Tasks that only compute would keep the processors from those that were just woken, which then
            # hold locks for ages: give way often, but not so regularly that nobody is ever interrupted in the
            # middle of something.
            if time.monotonic() > turn_ends:
                time.sleep(one.rest)
                turn_ends = time.monotonic() + rng.choice(TURNS)
        for one in work:
            one.finish()
    except Violated:
        pass
    except UseAfterFree as error:
        world.oracle.crashed(log, "P6, H08 (nothing freed is used)", error)
    except KernelBug as error:
        world.oracle.crashed(log, "no kernel bug", error)
    except Exception as error:  # noqa: BLE001  # whatever it is, the run is not clean and says why
        world.oracle.crashed(log, "no error in the model", error)
    finally:
        log.ended = True
