"""Traces made by hand, for the tests of what shows and replays them."""

from typing import Any

from kmodel.explore.tracefile import FORMAT, Trace

SOURCE = "kmodel/examples.py"


def _source(line: int, function: str, text: str) -> Any:
    return {"file": SOURCE, "line": line, "function": function, "text": text}


def message_passing() -> Trace:
    """The flag is seen, the data is not: a stale read without the barrier."""
    return {
        "format": FORMAT,
        "scenario": "message-passing",
        "summary": "A writer stores data, then sets a flag; a reader that sees the flag reads the data.",
        "removed_guards": ["no-wmb"],
        "memory": "lkmm",
        "verdict": "FAIL",
        "search": {"strategy": "dpor", "executions": 2},
        "violation": {
            "kind": "assertion",
            "message": "the flag was set but the data was not there",
            "task": 2,
            "step": 4,
        },
        "tasks": [{"id": 1, "name": "writer"}, {"id": 2, "name": "reader"}],
        "locations": [
            {"id": 1, "name": "message.data", "initial": "0"},
            {"id": 2, "name": "message.flag", "initial": "0"},
        ],
        "steps": [
            {
                "n": 1,
                "task": 1,
                "kind": "store",
                "order": "once",
                "location": 1,
                "value": "42",
                "memory": [
                    {
                        "location": 1,
                        "history": [{"step": None, "value": "0"}, {"step": 1, "value": "42"}],
                        "visible": {"1": [1], "2": [0, 1]},
                    }
                ],
                "source": _source(11, "writer", 'WRITE_ONCE(message, "data", 42)'),
            },
            {
                "n": 2,
                "task": 1,
                "kind": "store",
                "order": "once",
                "location": 2,
                "value": "1",
                "memory": [
                    {
                        "location": 2,
                        "history": [{"step": None, "value": "0"}, {"step": 2, "value": "1"}],
                        "visible": {"1": [1], "2": [0, 1]},
                    }
                ],
                "source": _source(12, "writer", 'WRITE_ONCE(message, "flag", 1)'),
            },
            {
                "n": 3,
                "task": 2,
                "kind": "load",
                "order": "once",
                "location": 2,
                "value": "1",
                "read_from": {"step": 2, "stale": False},
                "memory": [
                    {
                        "location": 2,
                        "history": [{"step": None, "value": "0"}, {"step": 2, "value": "1"}],
                        "visible": {"1": [1], "2": [1]},
                    }
                ],
                "source": _source(16, "reader", 'if READ_ONCE(message, "flag"):'),
            },
            {
                "n": 4,
                "task": 2,
                "kind": "load",
                "order": "once",
                "location": 1,
                "value": "0",
                "read_from": {"step": None, "stale": True, "newest": 1},
                "source": _source(17, "reader", 'data = READ_ONCE(message, "data")'),
            },
        ],
        "schedule": [1, 1, 2, 2],
    }


def resurrection() -> Trace:
    """A lookup raises a reference count from 0 to 1 while its owner frees the object."""
    ref = [{"step": None, "value": "1"}]
    after_put = [*ref, {"step": 4, "value": "0"}]
    after_get = [*after_put, {"step": 7, "value": "1"}]

    def seen(*indices: int) -> Any:
        return {"1": list(indices), "2": list(indices), "3": list(indices)}

    tree = [{"step": None, "value": "Uprobe#1"}]
    erased = [*tree, {"step": 5, "value": "NULL"}]
    steps: list[Any] = [
        {
            "task": 2,
            "kind": "rcu-lock",
            "op": "rcu_read_lock",
            "domain": "rcu",
            "source": _source(40, "lookup", "rcu_read_lock()"),
        },
        {
            "task": 2,
            "kind": "load",
            "order": "once",
            "op": "rcu_dereference",
            "location": 2,
            "value": "Uprobe#1",
            "read_from": {"step": None, "stale": False},
            "memory": [{"location": 2, "history": tree, "visible": seen(0)}],
            "source": _source(41, "lookup", 'uprobe = rcu_dereference(tree, "root")'),
        },
        {
            "task": 1,
            "kind": "lock",
            "op": "spin_lock",
            "lock": "uprobes_treelock",
            "preemption": True,
            "source": _source(60, "put_uprobe", "spin_lock(uprobes_treelock)"),
        },
        {
            "task": 1,
            "kind": "rmw",
            "order": "full",
            "op": "refcount_dec_and_test",
            "location": 1,
            "old": "1",
            "new": "0",
            "read_from": {"step": None, "stale": False},
            "memory": [{"location": 1, "history": after_put, "visible": seen(1)}],
            "source": _source(61, "put_uprobe", 'if refcount_dec_and_test(uprobe, "ref"):'),
        },
        {
            "task": 1,
            "kind": "store",
            "order": "release",
            "op": "rcu_assign_pointer",
            "location": 2,
            "value": "NULL",
            "memory": [{"location": 2, "history": erased, "visible": {"1": [1], "2": [0, 1], "3": [0, 1]}}],
            "source": _source(62, "put_uprobe", 'rcu_assign_pointer(tree, "root", None)'),
        },
        {
            "task": 1,
            "kind": "unlock",
            "op": "spin_unlock",
            "lock": "uprobes_treelock",
            "source": _source(63, "put_uprobe", "spin_unlock(uprobes_treelock)"),
        },
        {
            "task": 2,
            "kind": "rmw",
            "order": "relaxed",
            "op": "refcount_inc",
            "location": 1,
            "old": "0",
            "new": "1",
            "read_from": {"step": 4, "stale": False},
            "memory": [{"location": 1, "history": after_get, "visible": seen(2)}],
            "preemption": True,
            "notes": ["0 to 1: the count said that nobody holds the object any more."],
            "source": _source(42, "lookup", 'refcount_inc(uprobe, "ref")  # <-- not refcount_inc_not_zero'),
        },
        {
            "task": 2,
            "kind": "rcu-unlock",
            "op": "rcu_read_unlock",
            "domain": "rcu",
            "source": _source(43, "lookup", "rcu_read_unlock()"),
        },
        {
            "task": 1,
            "kind": "gp-start",
            "op": "synchronize_rcu",
            "domain": "rcu",
            "source": _source(65, "put_uprobe", "synchronize_rcu()"),
        },
        {
            "task": 1,
            "kind": "gp-end",
            "domain": "rcu",
            "source": _source(65, "put_uprobe", "synchronize_rcu()"),
        },
        {
            "task": 1,
            "kind": "free",
            "op": "kfree",
            "object": "Uprobe#1",
            "source": _source(66, "put_uprobe", "kfree(uprobe)"),
        },
        {
            "task": 2,
            "kind": "load",
            "order": "plain",
            "location": 3,
            "value": "POISON",
            "source": _source(52, "handler", "offset = uprobe.offset"),
        },
    ]
    for n, step in enumerate(steps, 1):
        step["n"] = n
    return {
        "format": FORMAT,
        "scenario": "refcount-resurrection",
        "target": "refcount-resurrection",
        "summary": "A lookup under RCU takes a reference that is already gone.",
        "removed_guards": ["inc-not-zero"],
        "memory": "lkmm",
        "verdict": "FAIL",
        "search": {"strategy": "dpor", "executions": 3, "blocked": 0, "preemptions": 2},
        "violation": {
            "kind": "use-after-free",
            "message": "lookup reads Uprobe#1.offset after put_uprobe() has freed Uprobe#1",
            "task": 2,
            "step": 12,
            "related": [
                {"step": 11, "text": "This is the free that the read at step 12 comes too late for."}
            ],
        },
        "tasks": [
            {"id": 1, "name": "unregister"},
            {"id": 2, "name": "lookup"},
            {"id": 3, "name": "bystander"},
        ],
        "locations": [
            {"id": 1, "name": "Uprobe#1.ref", "initial": "1", "object": "Uprobe#1"},
            {"id": 2, "name": "tree.root", "initial": "Uprobe#1", "object": "tree"},
            {"id": 3, "name": "Uprobe#1.offset", "initial": "0x1040", "object": "Uprobe#1"},
        ],
        "steps": steps,
        "schedule": [2, 2, 1, 1, 1, 1, 2, 2, 1, 1, 1, 2],
    }


def deadlock() -> Trace:
    """Two locks taken in two orders; nothing is wrong at a step, everything after the last."""
    steps: list[Any] = [
        {"n": 1, "task": 1, "kind": "lock", "op": "mutex_lock", "lock": "a"},
        {"n": 2, "task": 2, "kind": "lock", "op": "mutex_lock", "lock": "b", "preemption": True},
    ]
    return {
        "format": FORMAT,
        "scenario": "abba",
        "memory": "sc",
        "verdict": "FAIL",
        "violation": {
            "kind": "deadlock",
            "message": "no task can go on",
            "waits": [
                {"task": 1, "for": "mutex b", "held_by": 2, "holds": ["mutex a"]},
                {"task": 2, "for": "mutex a", "held_by": 1, "holds": ["mutex b"]},
            ],
        },
        "tasks": [{"id": 1, "name": "left"}, {"id": 2, "name": "right"}],
        "locations": [],
        "steps": steps,
        "schedule": [1, 2],
    }
