"""Which guards the torture is aimed at: with one of these away, a run on two processors is to find out in
seconds.

Models:      nothing in Linux
Guards:      none
Invariants:  none
Read next:   cli/guards.py

Others may be found too. Barriers among them cannot be: real threads of this interpreter do not show reordered
memory
accesses (docs/limits.md); those are the explorer's.
"""

AIMED_AT = frozenset(
    {
        "no-final-retry",
        "no-seqcount-retry",
        "plain-get",
        "free-without-grace-period",
    }
)
