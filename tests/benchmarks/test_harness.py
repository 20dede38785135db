"""The benchmark harness judges its samples."""

from benchmarks.harness import Cell, Sample, Table, judge


def test_threads_that_ran_one_after_the_other_do_not_count() -> None:
    """Two spans that hardly overlap give no sample."""
    assert judge([(0, 100, 0), (90, 190, 0)], 10) is None


def test_a_thread_without_its_processor_does_not_count() -> None:
    """A thread whose processor was taken for more than 7 % of the time gives no sample."""
    assert judge([(0, 100, 10), (0, 100, 0)], 10) is None


def test_overlapping_threads_add_their_throughput() -> None:
    """Throughput is the sum of the threads' rates, ns is their mean."""
    sample = judge([(0, 200, 1), (0, 200, 0)], 10)

    assert sample == Sample(ns=20.0, throughput=1e8)


def test_scaling_pairs_samples_of_one_pass() -> None:
    """Scaling is formed within a pass, and a pass with an invalid sample is left out."""
    one = Cell([Sample(10, 100.0), Sample(10, 50.0), None])
    two = Cell([Sample(10, 190.0), Sample(10, 100.0), Sample(10, 7.0)])
    table = Table(["s"], [1, 2], {("s", 1): one, ("s", 2): two})

    assert table.scaling("s", 2) == [1.9, 2.0]
