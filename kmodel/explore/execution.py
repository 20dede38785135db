"""The life of an execution, from setup() to the verdict on it, in whichever thread is at hand.

Models:      nothing in Linux
Guards:      the baton
Invariants:  E2 an execution ends: done, blocked, broken or cut, E3 tasks of a finished execution have unwound
             before the next begins
Read next:   explore/engine.py for tasks and locations

A thread whose task has ended starts the next task, or the next execution, itself; so a hand-over of the baton
is paid for a preemption only.
"""

from collections.abc import Callable
from typing import Any, cast

from kmodel.core import access
from kmodel.core.baton import Baton, borrow
from kmodel.core.engine import Tracer, engine, installed, tracing
from kmodel.core.report import clear_warnings, kernel_warnings, log
from kmodel.core.task import TaskStruct, bind_thread, unbind_thread
from kmodel.explore.events import (
    Aborted,
    Runner,
    Violation,
)
from kmodel.explore.oracles import classify
from kmodel.explore.scheduler import Scheduler

PARK = cast("Runner", object())
"""What a thread does when the baton is elsewhere."""


class Execution(Scheduler):
    """Executions, one after the other."""

    # -- the whole exploration, seen from its caller

    def run(self, watch: Callable[[Any], bool] | None = None) -> None:
        """Run executions until the search has no more; `watch` is called now and then, False gives up."""
        if isinstance(engine(), Tracer):
            raise RuntimeError("a traced engine is already installed: explorations do not nest")
        with tracing(), installed(self):
            access._tracer = self
            try:
                first = borrow(self.loop)
                if self.recorder is None:
                    log.addFilter(_silently)
                first.wake()
                while not self.done.acquire(timeout=0.25):
                    if watch is not None and not watch(self):
                        return
            except BaseException:
                # Ctrl-C, most likely: let the execution end before memory is handed back.
                self.stop = lambda: True
                self.max_steps = 0
                self.done.acquire(timeout=5)
                raise
            finally:
                access._tracer = None
                log.removeFilter(_silently)
                self.close()
        if self.error is not None:
            raise self.error

    def _restore(self) -> None:
        for obj, _kid, values in self.externals.values():
            for field, value in values.items():
                type(obj).__k_slots__[field].__set__(obj, value)

    def close(self) -> None:
        """Give the threads back to the pool, and what was built before the exploration its values."""
        self.closed = True
        self._restore()
        for obj, _kid, _values in self.externals.values():
            obj._k_id = None  # ptr() of it is its address again
        while self.idle:
            self.idle.pop().wake()

    # -- the life of an execution, in whichever thread is at hand

    def loop(self, mine: Baton) -> None:
        while True:
            runner, mine.runner = mine.runner, None
            try:
                if runner is None:
                    chosen = self._begin(mine)
                else:
                    self._execute(runner)
                    if runner.unwinding:
                        self.idle.append(mine)
                        self.ender.wake()
                        mine.wait()
                        if self.closed:
                            return
                        continue
                    chosen = self._go_on(mine)
            except Aborted:  # while no task ran: the model diverged
                self._end(mine)
                chosen = None
            except BaseException as error:  # noqa: BLE001  # not the model's fault: to the caller
                self.error = error
                chosen = None
            if chosen is None:
                self.done.release()
                return
            if chosen is not PARK:
                mine.runner = chosen
                continue
            mine.wait()
            if self.closed:
                return

    def _execute(self, runner: Runner) -> None:
        bind_thread(runner.task)
        try:
            assert runner.func is not None
            runner.func(*runner.args)
        except (Aborted, SystemExit):
            pass
        except BaseException as error:  # noqa: BLE001  # the violation that was looked for
            if self.over is None and not runner.unwinding:
                self.fail(classify(error, runner, self.depth - 1))
        finally:
            runner.finished = True
            self.live &= ~runner.bit
            self.cur = None
            unbind_thread()

    def _begin(self, mine: Baton) -> Runner | None:
        """Set the next execution up; what this thread does then, as _go_on()."""
        self.reset()
        self.search.begin()
        clear_warnings()
        self._restore()
        self.working = mine
        boot = TaskStruct(pid=0, comm="setup")
        self.boot_task = boot
        bind_thread(boot)
        try:
            self.state = self.setup()
            for n, func in enumerate(self.threads):
                self.add(func, (self.state,), getattr(func, "__name__", f"thread-{n}"), daemon=False)
        finally:
            unbind_thread()
        if self.recorder is not None:
            self.recorder.begin(self)
        return self._go_on(mine)

    def _go_on(self, mine: Baton) -> Runner | None:
        """After a task or an execution has ended: what this thread does next, PARK, or None when all is
        done.
        """
        while True:
            if self.over is None:
                chosen = self._decide(None)
            else:
                chosen = None
            if chosen is None:
                if not self._end(mine):
                    return None
                return self._begin(mine)
            if not chosen.started:
                self._start(chosen)
                chosen.baton = mine
                return chosen
            if chosen.owner is not None:
                self.flush(chosen)
                continue
            self.cur = chosen
            self.idle.append(mine)
            chosen.baton.wake()
            return PARK

    def _end(self, mine: Baton) -> bool:
        """Unwind what is left, judge the execution, go to the next: whether there is one."""
        self.cur = None
        self.ender = mine
        reason = self.over
        for runner in self.runners:
            if runner.started and not runner.finished and runner.owner is None:
                runner.unwinding = True
                runner.baton.wake()
                mine.wait()
        if self.nondeterminism is not None or self.hang is not None:
            return False
        partial = reason in ("blocked", "skipped")
        if not partial and reason != "steps" and self.broken is None and not self._judge():
            return False
        if self.checking:
            if not self._as_before(reason):
                return False
        elif partial:
            self.blocked += reason == "blocked"
        else:
            self.executions += 1
            if reason == "steps":
                self.cut += 1
            if self.broken is not None:
                self.violation = self.broken
        self.steps += self.depth
        if self.recorder is not None:
            self.recorder.end(self)
        if self.first is None and not partial and self.violation is None and self.search.exhausts:
            # Run the first execution twice: a model that is not deterministic shows at once,
            # and not as a strange result.
            self.first = (reason, self.depth, self.collected)
            self.checking = True
            self.plen = len(self.stack)
            return True
        self.checking = False
        return bool(self.search.advance(reason)) and not self.stop()

    def _as_before(self, reason: str | None) -> bool:
        if self.first == (reason, self.depth, self.collected) and self.broken is None:
            return True
        before, now = self.first, (reason, self.depth, self.collected)
        assert before is not None
        self.nondeterminism = (
            f"the first execution was run twice and ended differently: {before[0]} after {before[1]} steps "
            f"with outcome {before[2]!r}, then {now[0]} after {now[1]} steps with outcome {now[2]!r}"
            + (f" and {self.broken}" if self.broken is not None else "")
        )
        return False

    def _judge(self) -> bool:
        """The execution went to its end: final(), outcome() and the oracles of the end. False: stuck."""
        bind_thread(self.boot_task)
        try:
            if self.final is not None:
                self.final(self.state)
            if self.outcome is not None:
                self.collected = self.outcome(self.state)
                self.outcomes.add(self.collected)
        except BaseException as error:  # noqa: BLE001  # an assertion of final() is what was looked for
            self.broken = classify(error, None, None)
        finally:
            unbind_thread()
        if self.broken is None and self.check_warnings:
            for warning in kernel_warnings():
                self.broken = Violation("warning", f"{warning.message} ({warning.where})")
                break
        if self.broken is None:
            self.broken = self.oracles.at_end()
        return self.hang is None


def _silently(_record: Any) -> bool:
    """A search logs nothing: only the execution that is shown does."""
    return False
