"""The judge: logs, reports and their timelines."""

import pytest

from kmodel.torture.oracle import MOST_VIOLATIONS, RING, Oracle, TaskLog, Violated


def test_totals_add_up_over_tasks() -> None:
    """Counters of equal name are one number."""
    oracle = Oracle()
    for n in range(3):
        log = TaskLog(f"hit/{n}")
        log.count("hit")
        log.count("hit")
        oracle.logs.append(log)
    oracle.logs[0].count("remap")

    assert oracle.totals() == {"hit": 6, "remap": 1}


def test_a_log_keeps_the_last_steps_only() -> None:
    """The ring forgets the oldest; formats are applied when steps are shown."""
    log = TaskLog("hit/0")
    for n in range(RING + 5):
        log.note("step {}", n)

    texts = [text for _at, text in log.steps()]

    assert (texts[0], texts[-1], len(texts)) == ("step 5", f"step {RING + 4}", RING)


def test_a_step_without_values_is_no_format() -> None:
    """Braces in a plain step are shown as they are."""
    log = TaskLog("hit/0")
    log.note("{not a field}")

    assert [text for _at, text in log.steps()] == ["{not a field}"]


def test_a_violation_shows_both_sides_in_order_of_time() -> None:
    """The steps of the task that found it and of the named others, interleaved; nobody else's."""
    oracle = Oracle()
    reader, writer, other = TaskLog("hit/0"), TaskLog("remap/1"), TaskLog("maps/2")
    oracle.logs += [reader, writer, other]
    other.note("bystander")
    reader.note("samples")
    writer.note("replaces")
    reader.note("accepts")

    with pytest.raises(Violated, match="wrong"):
        oracle.violate(reader, "P1", "wrong", ["fact"], others="remap")

    (violation,) = oracle.violations
    words = [line.split()[-1] for line in violation.timeline]
    assert words == ["samples", "replaces", "accepts"]
    assert violation.lines()[0] == "P1: wrong"
    assert violation.task == "hit/0"


def test_violations_are_counted_when_there_are_too_many_to_show() -> None:
    """A flood does not fill the memory."""
    oracle = Oracle()
    for n in range(MOST_VIOLATIONS + 7):
        oracle.report(None, "P1", str(n))

    assert (len(oracle.violations), oracle.suppressed) == (MOST_VIOLATIONS, 7)


def test_what_a_task_died_of_names_the_access() -> None:
    """The innermost line of the traceback is in the facts."""
    oracle = Oracle()

    def dies() -> None:
        raise RuntimeError("use after free")

    try:
        dies()
    except RuntimeError as error:
        oracle.crashed(TaskLog("hit/0"), "H08", error)

    assert oracle.violations[0].message == "RuntimeError: use after free"
    assert 'dies: raise RuntimeError("use after free")' in oracle.violations[0].facts[-1]
