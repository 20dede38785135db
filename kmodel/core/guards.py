"""Guards that can be taken away, to see what they were for.

Models:      nothing in Linux; each guard named here is a line of kernel code (a barrier, a re-check, an
             inc-not-zero, a wait)
Guards:      `removed` is replaced, never mutated; change it only while no task runs
Invariants:  G1 a name is registered once, by the module whose line it removes; G2 an unknown name is an
             error, not a no-op
Read next:   hazards/, where each of them has its counterexample
"""

from collections.abc import Iterator
from contextlib import contextmanager

removed: frozenset[str] = frozenset()
"""The guards that are switched off now."""

any_removed = False
"""Whether there are any: for hot lines, where tasks that read the set itself contend for its refcount."""

_known: dict[str, str] = {}


def register(name: str, protects: str) -> str:
    """Declare a removable guard and what goes wrong without it ("H10: ..."); return the name."""
    if _known.setdefault(name, protects) != protects:
        raise ValueError(f"guard {name!r} is registered twice")
    return name


def known_guards() -> dict[str, str]:
    """Every registered guard and what it protects from."""
    return dict(sorted(_known.items()))


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Run the block with these guards removed. ValueError for a name nobody registered."""
    global removed, any_removed
    unknown = [name for name in names if name not in _known]
    if unknown:
        raise ValueError(f"unknown guard {unknown[0]!r}; known: {', '.join(known_guards())}")
    before = removed
    removed = before | set(names)
    any_removed = bool(removed)
    try:
        yield
    finally:
        removed = before
        any_removed = bool(removed)
