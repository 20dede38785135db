"""hprobe: the uprobe of a return instance, which must stay until the function returns, and may not for ever.

Models:      kernel/events/uprobes.c, hprobe_init_leased, hprobe_init_stable, hprobe_consume,
             hprobe_finalize, hprobe_expire; include/linux/uprobes.h, struct hprobe (7.2)
Guards:      state by read-modify-write: who changes it away from LEASED ends the lease
Invariants:  P8 each lease is ended once, L1 a STABLE hprobe owns one reference, L2 a CONSUMED one nothing
Leaves out:  nothing
Read next:   uprobes/return_instance.py, where it is embedded; uprobes/ri_timer.py, the expirer

    from      to         by                                 SRCU ended by     reference
    -         LEASED     the owner, at the function's entry -                 none
    -         STABLE     fork, for the child                -                 the one expire(get) took
    -         GONE       fork, for the child                -                 none: the uprobe was dying
    LEASED    CONSUMED   the owner, at the return           owner, finalize   none
    LEASED    STABLE     an expirer: timer or fork          that expirer      +1, the hprobe's
    LEASED    GONE       an expirer, uprobe dying           that expirer      none
    STABLE    CONSUMED   the owner                          -                 put in finalize
    GONE      CONSUMED   the owner                          -                 none; no handler runs

A lease is an SRCU section that the task takes into user space: cheap, but SRCU waits for it. So after 100 ms
the timer trades it for a reference (H58). Both may come at once: one atomic word decides (H57).
"""

from typing import Any, Final

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    Pooled,
    atomic,
    guards,
    kernel_struct,
    try_cmpxchg,
    xchg,
)
from kmodel.rcu import __srcu_read_unlock
from kmodel.uprobes import lifetime
from kmodel.uprobes.lifetime import get_uprobe, put_uprobe, try_get_uprobe
from kmodel.uprobes.uprobe import Uprobe

HPROBE_LEASED: Final = 0
HPROBE_STABLE: Final = 1
HPROBE_GONE: Final = 2
HPROBE_CONSUMED: Final = 3

_ONE_WINNER = guards.register(
    "no-hprobe-cmpxchg", "H57: the owner and the timer both think that they end the lease"
)
_NULL = guards.register("no-hprobe-null-test", "H59: fork takes a reference on the uprobe that was not there")
_PUT_LOSER = guards.register(
    "no-hprobe-loser-put", "H60: the timer's reference is kept although the owner was faster"
)


@kernel_struct
class Hprobe(Pooled):
    """struct hprobe."""

    state: int = atomic(default=HPROBE_LEASED)
    # set before the instance is published, constant until it is reused
    srcu_idx: int = 0
    uprobe: Any = None


def hprobe_init_leased(hprobe: Hprobe, uprobe: Uprobe, srcu_idx: int) -> None:
    """A function was entered, and an SRCU section begun for it."""
    # The kernel stores `state` plainly too. The instance is not published yet, but the timer may still be
    # looking at its last life if it was reused wrongly (H62), which is told by what it then does.
    WRITE_ONCE(hprobe, "state", HPROBE_LEASED)
    hprobe.uprobe = uprobe
    hprobe.srcu_idx = srcu_idx


def hprobe_init_stable(hprobe: Hprobe, uprobe: Uprobe | None) -> None:
    """For a forked child: with the reference that hprobe_expire(get=True) took, or without a uprobe."""
    WRITE_ONCE(hprobe, "state", HPROBE_STABLE if uprobe is not None else HPROBE_GONE)
    hprobe.uprobe = uprobe
    hprobe.srcu_idx = -1


def hprobe_consume(hprobe: Hprobe) -> tuple[Uprobe | None, int]:
    """The owner is done with it: (uprobe, what the state was, for hprobe_finalize()).

    The uprobe stays usable until then. None: it was gone before the function returned.
    """
    hstate: int = xchg(hprobe, "state", HPROBE_CONSUMED)
    if hstate in (HPROBE_LEASED, HPROBE_STABLE):
        return hprobe.uprobe, hstate
    return None, hstate


def hprobe_finalize(hprobe: Hprobe, hstate: int) -> None:
    """Give back what kept the uprobe: the lease or the reference, by the state that consume found."""
    if hstate == HPROBE_LEASED:
        __srcu_read_unlock(lifetime.uretprobes_srcu, hprobe.srcu_idx)
    elif hstate == HPROBE_STABLE:
        put_uprobe(hprobe.uprobe)


def hprobe_expire(hprobe: Hprobe, get: bool) -> Uprobe | None:
    """End the lease, for a reference if the uprobe is still alive; the uprobe, or None if there is none any
    more. With `get` the caller gets a reference of its own.

    Needs RCU (the instance) and a section of uretprobes_srcu (the uprobe, while the lease changes hands).
    """
    hstate = READ_ONCE(hprobe, "state")
    if hstate == HPROBE_STABLE:
        uprobe: Uprobe = hprobe.uprobe
        # Only the owner itself (fork) asks to get: nobody can be putting the hprobe's reference meanwhile.
        return get_uprobe(uprobe) if get else uprobe
    if hstate != HPROBE_LEASED:
        return None
    held = try_get_uprobe(hprobe.uprobe)
    new = HPROBE_STABLE if held is not None else HPROBE_GONE
    if _ONE_WINNER in guards.removed:
        WRITE_ONCE(hprobe, "state", new)
        won = True
    else:
        won, _seen = try_cmpxchg(hprobe, "state", HPROBE_LEASED, new)
    if won:
        __srcu_read_unlock(lifetime.uretprobes_srcu, hprobe.srcu_idx)
        if get and (held is not None or _NULL in guards.removed):
            return get_uprobe(held)  # type: ignore[arg-type]  # None only without its guard
        return held
    # The owner or another expirer was faster, and ends the lease. Ours is the reference only if it was asked
    # for.
    if held is not None and not get and _PUT_LOSER not in guards.removed:
        put_uprobe(held)
    return held
