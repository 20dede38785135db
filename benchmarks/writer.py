"""A task that maps and unmaps a page of the modelled process, beside whatever is measured.

Real processes do both at once: an allocator gives memory back, a library is loaded, while other threads hit
breakpoints. A reader of mmap_lock waits then, for the writer that holds the lock and in the queue behind the
writer that waits for earlier readers. A speculation waits only while the writer is inside.
"""

import os
import threading
import time
from types import TracebackType
from typing import Any, Self

import attrs

from kmodel.core import adopt_thread, current
from kmodel.mm import MAP_ANONYMOUS, MAP_PRIVATE, PAGE_SIZE, PROT_READ, MmStruct, mmap, munmap


@attrs.define
class Writer:
    """While entered, a thread on processor `cpu` maps and unmaps, then rests `rest` seconds, in turn."""

    mm: MmStruct
    cpu: int
    rest: float
    rounds: int = 0
    _stop: bool = False
    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._body)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        self._stop = True
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _body(self) -> None:
        try:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {self.cpu})
            adopt_thread("writer")
            current().mm = self.mm
            while True:
                address = mmap(self.mm, 0, PAGE_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS)
                munmap(self.mm, address, PAGE_SIZE)
                self.rounds += 1
                if self._stop:
                    return
                time.sleep(self.rest)
        except BaseException as error:  # noqa: BLE001  # raised in the main thread at the end
            self._error = error


@attrs.define
class Beside:
    """A scheme with the writer's rounds counted while it is timed."""

    scheme: Any
    writer: Writer
    rounds: int = 0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The scheme's name."""
        return str(self.scheme.name)

    def prepare(self) -> Any:
        """The scheme's own."""
        return self.scheme.prepare()

    def loop(self, prepared: Any, n: int) -> None:
        """The scheme's own, with the writer's rounds added up (by several threads roughly)."""
        rounds, began = self.writer.rounds, time.perf_counter()
        self.scheme.loop(prepared, n)
        self.seconds += time.perf_counter() - began
        self.rounds += self.writer.rounds - rounds
