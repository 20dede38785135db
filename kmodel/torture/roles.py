"""Which tasks a run has.

Models:      nothing in Linux
Guards:      none
Invariants:  none
Read next:   torture/run.py
"""

from kmodel.torture.readers import Descender, Hitter, MapsReader, RefUser
from kmodel.torture.registrar import Registrar
from kmodel.torture.remap import FileChurner, Remapper
from kmodel.torture.tasks import Task

ROLES: tuple[type[Task], ...] = (
    Hitter,
    Remapper,
    Registrar,
    Descender,
    Hitter,
    RefUser,
    FileChurner,
    Descender,
    MapsReader,
)
"""What the first tasks do; if there are fewer tasks than these, they take turns at several."""

MORE_ROLES: tuple[type[Task], ...] = (
    Hitter,
    Descender,
    Hitter,
    Registrar,
    Hitter,
    RefUser,
    Hitter,
    FileChurner,
)
"""What further ones do, over and over."""


DEFAULT_TASKS = 8


def roles_of(n: int, count: int) -> tuple[type[Task], ...]:
    """What the n-th of `count` tasks does: one kind of work, or in turn several if there are not enough
    tasks.
    """
    if count <= len(ROLES):
        return ROLES[n::count]
    return (ROLES[n],) if n < len(ROLES) else (MORE_ROLES[(n - len(ROLES)) % len(MORE_ROLES)],)
