"""What the tests of this room share."""

from kmodel.core import CoopEngine, boot, current, kernel_warnings, smp_cond_load_acquire, variables
from kmodel.mm import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    mm_alloc,
    mmap,
)

BASE = 0x10_0000_0000
PAGE = PAGE_SIZE
RW = PROT_READ | PROT_WRITE
ANON = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED


def over_seeds(count, setup, threads, final=None):
    """Run the scenario with seeds 0 to count - 1 on the cooperative engine; the first error ends it."""
    states = []
    for seed in range(count):
        states.append(CoopEngine(seed).run(setup, threads, final))
    return states


class OneVma:
    """An address space with one mapping of four pages, and two words that its write lock protects."""

    def __init__(self):
        boot()
        self.mm = mm_alloc()
        mmap(self.mm, BASE, 4 * PAGE, RW, ANON)
        self.data = variables(a=0, b=0)
        self.gate = Gate()
        self.got = []


def quiet(_state):
    """A final that wants no kernel warning."""
    assert kernel_warnings() == ()


class Gate:
    """A place where one task (named, or the first that comes) stops until another lets it go on."""

    def __init__(self, who=None):
        self.words = variables(reached=0, go=0)
        self.who = who

    def stop(self):
        """Say so and wait; only the first time."""
        if self.words.reached or self.who not in (None, current().comm):
            return
        self.words.reached = 1
        smp_cond_load_acquire(self.words, "go", bool)

    def wait_until_reached(self):
        smp_cond_load_acquire(self.words, "reached", bool)

    def open(self):
        self.words.go = 1


def stop_before(monkeypatch, module, name, gates):
    """The next call of module.name stops at gates[-1] before it does anything (the scenario puts its gate
    there).
    """
    real = getattr(module, name)

    def stopping(*args, **kwargs):
        if gates:
            gates[-1].stop()
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, stopping)


def stop_after(monkeypatch, module, name, gates):
    """The next call of module.name stops at gates[-1] when it is done."""
    real = getattr(module, name)

    def stopping(*args, **kwargs):
        result = real(*args, **kwargs)
        if gates:
            gates[-1].stop()
        return result

    monkeypatch.setattr(module, name, stopping)
