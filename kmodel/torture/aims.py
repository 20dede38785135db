"""Which guards the torture is aimed at: with one of these away, a run on two processors finds out in seconds.

Models:      nothing in Linux
Guards:      none
Invariants:  none
Leaves out:  others may be found too. Barriers cannot be: real threads of this interpreter show no reordered
             memory accesses (docs/limits.md); those are the explorer's
Read next:   cli/guards.py
"""

AIMED_AT = frozenset(
    {
        "call-rcu-grace-period",
        "free-without-grace-period",
        "no-active-test",
        "no-dead-twin",
        "no-final-retry",
        "no-mm-seq-begin",
        "no-read-seqcount-retry",
        "no-refcount-zero-test",
        "no-seqcount-retry",
        "no-tasks-trace-wait",
        "no-unregister-sync",
        "plain-get",
        "srcu-second-scan",
    }
)
