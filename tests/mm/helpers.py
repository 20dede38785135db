"""What the tests of this room share."""

from kmodel.core import CoopEngine


def over_seeds(count, setup, threads, final=None):
    """Run the scenario with seeds 0 to count - 1 on the cooperative engine; the first error ends it."""
    states = []
    for seed in range(count):
        states.append(CoopEngine(seed).run(setup, threads, final))
    return states
