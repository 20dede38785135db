"""The steps of a trace in words."""

import pytest

from kmodel.explore.words import VIOLATIONS, Words
from tests.explore.samples import message_passing, resurrection


def _said(trace: object, n: int) -> str:
    return " ".join(Words(trace).all()[n - 1])  # type: ignore[arg-type]


def test_a_stale_read_is_explained() -> None:
    """A stale read says what it got, from where, and what it missed."""
    assert _said(message_passing(), 4) == (
        "reader reads message.data, ordering nothing, and gets 0. 0 is the initial value. "
        "Stale: step 1 has stored 42, but nothing this task did obliges it to see that yet. "
        "Here it breaks (an assertion failed): the flag was set but the data was not there."
    )


def test_a_store_says_who_need_not_see_it() -> None:
    """A store names the tasks that may still read an older value."""
    assert _said(resurrection(), 5).endswith("lookup and bystander may still read an older value.")


def test_a_store_before_another_in_coherence_order() -> None:
    """A store that lands before an earlier step's is said to."""
    trace = message_passing()
    late = trace["steps"][2]
    late.update(
        {
            "kind": "store",
            "location": 1,
            "value": "7",
            "memory": [
                {
                    "location": 1,
                    "history": [
                        {"step": None, "value": "0"},
                        {"step": 3, "value": "7"},
                        {"step": 1, "value": "42"},
                    ],
                    "visible": {"1": [2], "2": [1, 2]},
                }
            ],
        }
    )
    del late["read_from"]

    assert "It lands before the store of step 1: to everybody it was the earlier one." in _said(trace, 3)


def test_a_forced_switch_names_who_was_interrupted() -> None:
    """A preemption says which task could have gone on."""
    assert _said(resurrection(), 3).startswith("The scheduler switches here: lookup could have gone on.")


def test_use_of_a_freed_object_names_the_free() -> None:
    """A step that touches a freed object says when that was freed."""
    assert "Uprobe#1 was freed at step 11." in _said(resurrection(), 12)
    assert "freed" not in _said(resurrection(), 7)


def test_an_object_allocated_again_is_not_freed() -> None:
    """After an allocation of the same object nothing says any more that it is freed."""
    trace = resurrection()
    trace["steps"][10]["kind"] = "free"
    trace["steps"].insert(11, {"n": 12, "task": 1, "kind": "alloc", "object": "Uprobe#1"})
    trace["steps"][12]["n"] = 13
    trace["violation"]["step"] = 13

    assert "freed at step" not in _said(trace, 13)


@pytest.mark.parametrize(
    ("kind", "domain", "code"),
    [
        ("rcu-lock", "rcu", "rcu_read_lock()"),
        ("rcu-unlock", "rcu_tasks_trace", "rcu_read_unlock_trace()"),
        ("rcu-lock", "uprobes_srcu", "srcu_read_lock(uprobes_srcu)"),
        ("gp-start", "rcu", "synchronize_rcu() begins"),
        ("gp-end", "rcu_tasks_trace", "synchronize_rcu_tasks_trace() returns"),
        ("gp-end", "uprobes_srcu", "synchronize_srcu(uprobes_srcu) returns"),
    ],
)
def test_grace_periods_have_the_kernels_names(kind: str, domain: str, code: str) -> None:
    """Reader sections and grace periods are shown as the calls of their domain."""
    step = {"n": 1, "task": 1, "kind": kind, "domain": domain}

    assert Words(message_passing()).code(step) == code  # type: ignore[arg-type]


def test_every_sample_step_has_words_and_code() -> None:
    """No step of the samples is silent."""
    for trace in (message_passing(), resurrection()):
        words = Words(trace)

        assert all(words.all())
        assert all(words.code(step) for step in trace["steps"])


def test_violations_have_names() -> None:
    """Every documented kind of violation has a name in words."""
    assert all(name and "-" not in name.replace("wake-up", "") for name in VIOLATIONS.values())
