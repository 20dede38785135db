"""What a run shows."""

import io

from rich.console import Console

from kmodel.cli.stress import verdict_line
from kmodel.cli.view import PLAIN_INTERVAL, LiveView, PlainView, open_view
from kmodel.torture import HARD_PATHS, Progress
from tests.torture.test_report import VIOLATION, report


def progress(elapsed: float, hits: int) -> Progress:
    counts = {"hit": hits, "speculation_retried": 3}
    return Progress(
        seed=7, threads=8, seconds=10.0, elapsed=elapsed, stage="running", counts=counts, violations=0
    )


def test_without_a_terminal_there_is_a_line_now_and_then() -> None:
    """Not one per poll."""
    out = io.StringIO()
    with PlainView(out) as view:
        for n in range(41):
            view.show(progress(n / 10, 1000 * n))

    lines = out.getvalue().splitlines()

    assert len(lines) == int(4 / PLAIN_INTERVAL)
    assert lines[0].split()[:4] == ["2.0", "s", "20,000", "hits"]
    assert f"hard paths 1/{len(HARD_PATHS)}" in lines[0]


def test_a_terminal_gets_a_table_with_rates() -> None:
    """Counts, what they are per second, and the hard paths."""
    out = io.StringIO()
    view = LiveView(Console(file=out, force_terminal=True, width=160))
    with view:
        view.show(progress(1.0, 1000))
        view.show(progress(2.0, 3000))

    shown = out.getvalue()

    assert "seed 7" in shown
    assert "2,000/s" in shown
    assert HARD_PATHS["speculation_retried"] in shown


def test_a_file_is_no_terminal() -> None:
    """Plain lines where the cursor cannot move."""
    assert isinstance(open_view(io.StringIO()), PlainView)


def test_the_last_word() -> None:
    """One line says what came out."""
    assert verdict_line(report()) == "CLEAN"
    assert verdict_line(report(counts={}, elapsed=1.0)).startswith("CLEAN as far as it went")
    assert verdict_line(report(counts={})).startswith(
        "INCOMPLETE: nothing was wrong, but this never happened: spec"
    )
    assert verdict_line(report(violations=(VIOLATION,))) == "VIOLATION: P1, found after 1.50 s"
    assert verdict_line(report(removed_guards=("plain-get",))) == "NOTHING FOUND without plain-get"
