"""What kind of Python interpreter runs the model.

Models:      nothing in Linux
Read next:   core/threads.py
"""

import sys

from kmodel.core.struct import FREE_THREADED


def gil_enabled() -> bool:
    """Whether threads of this interpreter run one at a time."""
    check = getattr(sys, "_is_gil_enabled", None)
    return True if check is None else bool(check())


def gil_was_reenabled() -> bool:
    """Whether this is a free-threaded build whose GIL some import (or PYTHON_GIL=1) switched back on."""
    return FREE_THREADED and gil_enabled()
