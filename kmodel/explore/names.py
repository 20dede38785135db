"""Names that a reader understands and that are the same in every execution: Uprobe#1, mm.mmap_lock,
message.flag.

Models:      nothing in Linux
Guards:      none
Invariants:  N1 equal schedules give equal names
Read next:   explore/timeline.py
"""

import sys
from typing import Any

from kmodel.core import access
from kmodel.core.struct import KernelObject
from kmodel.core.task import TaskStruct

_BYTES = 4  # so many of a string of bytes are shown


class Names:
    """Names of one exploration's objects."""

    def __init__(self, engine: Any) -> None:
        self.e = engine
        self._of_state: Any = None
        self._globals: dict[int, str] = {}

    def of(self, obj: Any) -> str:
        """The name of an object: of its variable in the scenario's state or of the model's global, else its
        class
        and number.
        """
        inside = self.e.inside.get(id(obj))
        if inside is not None:
            return f"{self.of(inside[0])}.{inside[1]}"
        if isinstance(obj, TaskStruct):
            return obj.comm or f"task {obj.pid}"
        if not isinstance(obj, KernelObject):
            return type(obj).__name__
        cls = type(obj).__name__
        state = self.e.state
        if obj is state:
            return "" if cls == "Variables" else cls
        if isinstance(state, dict):
            for name, value in state.items():
                if value is obj:
                    return str(name)
        elif isinstance(state, (tuple, list)):
            for i, value in enumerate(state):
                if value is obj:
                    return "" if cls == "Variables" else f"{cls}[{i}]"
        elif state is not None and not isinstance(state, KernelObject):
            for name, value in getattr(state, "__dict__", {}).items():
                if value is obj:
                    return str(name)
        known = self._global(obj)
        if known is not None:
            return known
        number = 0
        for other in self.e.built.values():
            if type(other) is type(obj):
                number += 1
                if other is obj:
                    return f"{cls}#{number}"
        return cls

    def _global(self, obj: Any) -> str | None:
        """The name of a global of the model, such as uprobes_treelock; boot() makes them anew for each
        execution.
        """
        if self._of_state is not self.e.state:
            self._of_state = self.e.state
            self._globals = {
                id(value): name
                for module, contents in sorted(sys.modules.items())
                if module.startswith("kmodel.")
                for name, value in vars(contents).items()
                if isinstance(value, KernelObject)
            }
        return self._globals.get(id(obj))

    def field(self, obj: Any, field: str) -> str:
        """The name of a location."""
        owner = self.of(obj)
        return f"{owner}.{field}" if owner else field

    def value(self, value: Any) -> str:
        """A value as a person is to read it."""
        if value is None:
            return "NULL"
        if isinstance(value, KernelObject):
            return self.of(value) or type(value).__name__
        if isinstance(value, bool | str):
            return repr(value)
        if isinstance(value, int):
            return hex(value) if value > 4096 or value < -4096 else str(value)
        if isinstance(value, bytes) and len(value) > _BYTES:
            return f"{value[:_BYTES]!r}... of {len(value)}"
        if isinstance(value, tuple):
            return "(" + ", ".join(self.value(v) for v in value) + ")"
        if callable(value) or type(value).__module__ not in (
            "builtins",
            access.__name__,
            "kmodel.core.lifetime",
        ):
            return f"<{type(value).__name__}>"
        return repr(value)
