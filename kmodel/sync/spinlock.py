"""spinlock_t: mutual exclusion for short sections that may not sleep.

Models:      include/linux/spinlock.h, spin_lock / spin_unlock / spin_trylock; kernel/locking/qspinlock.c as
             its contract only
Guards:      whatever its owner says; the holder runs with preemption disabled, so might_sleep() objects
             inside
Invariants:  S1 one holder, S2 acquire on lock, release on unlock, S3 the holder unlocks
Leaves out:  the MCS queue (the engine decides who is next), interrupt states (there are no interrupts), raw
             versus RT locks
Read next:   rwlock.py

A lock is a struct of its own, embedded where the kernel embeds it: the threads engine makes it out of the
struct's own lock, which read-modify-write operations on fields *beside* it would need.
"""

from kmodel.core import Struct, atomic, engine, kernel_struct, lock_acquire, lock_release


@kernel_struct
class SpinLock(Struct):
    """spinlock_t.

    Embed it (`embedded(factory=SpinLock)`); never derive a struct with other atomic fields from it.
    """

    locked: int = atomic(default=0)


def spin_lock(lock: SpinLock) -> None:
    """Take the lock, waiting for its holder. ACQUIRE: pairs with the release in spin_unlock()."""
    engine().spin_lock(lock, "locked")
    lock_acquire(lock, atomic=True)


def spin_trylock(lock: SpinLock) -> bool:
    """Take the lock if it is free now."""
    if not engine().spin_trylock(lock, "locked"):
        return False
    lock_acquire(lock, atomic=True)
    return True


def spin_unlock(lock: SpinLock) -> None:
    """Release the lock. RELEASE: what was done inside is seen by whoever takes it next."""
    lock_release(lock, atomic=True)
    engine().spin_unlock(lock, "locked")
