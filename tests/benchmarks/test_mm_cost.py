"""The cost of mappings: the benchmark runs, and reports what it measured."""

from benchmarks.mm_cost import crowd, main, measure, report
from kmodel.core import boot


def test_it_runs_and_prints_a_curve(capsys):
    """Two small sizes, two passes: a row for each, and a verdict."""
    main(["--sizes", "20,60", "--passes", "2"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:4]] == ["VMAs", "20", "60"]
    assert printed[-1].startswith("goal: 60 VMAs at most 2.5 times 20")


def test_the_verdict_is_about_the_largest_size(capsys):
    """Ratios are taken pass by pass, and their median is judged."""
    boot()
    crowds = [crowd(2), crowd(4)]
    assert report(crowds, {"x": [[10.0, 20.0], [100.0, 240.0], [1.0, 9.0]]})
    assert not report(crowds, {"x": [[10.0, 26.0], [100.0, 260.0], [1.0, 1.0]]})
    assert "2.40 x" in capsys.readouterr().out


def test_every_pass_measures_every_size():
    """The first pass is for warming up and is not counted."""
    boot()
    found = measure([crowd(3), crowd(6)], 2, 1)
    assert {name: [len(row) for row in rows] for name, rows in found.items()} == {
        "mmap+munmap": [2, 2],
        "vma_lookup": [2, 2],
        "find_vma": [2, 2],
    }
