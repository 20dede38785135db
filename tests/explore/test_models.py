"""The classic shapes under each memory model."""

from typing import Any

import pytest

from kmodel.core import (
    READ_ONCE,
    WRITE_ONCE,
    Struct,
    kernel_struct,
    rcu_assign_pointer,
    rcu_dereference,
    smp_load_acquire,
    smp_mb,
    smp_rmb,
    smp_store_release,
    smp_wmb,
    variables,
    xchg,
    xchg_relaxed,
)
from kmodel.explore import Result, explore


class Registers:
    """Shared variables, and what the tasks read, which nobody watches."""

    def __init__(self) -> None:
        self.v = variables(x=0, y=0)
        self.r: dict[str, Any] = {}


def outcomes(memory: str, *threads: Any) -> set[Any]:
    result = explore(Registers, *threads, outcome=lambda s: tuple(s.r[k] for k in sorted(s.r)), memory=memory)
    assert result.passed, result
    return result.outcomes


def nothing() -> None:
    pass


@pytest.mark.parametrize(("memory", "weak"), [("sc", False), ("tso", True), ("lkmm", True)])
@pytest.mark.parametrize("barrier", [nothing, smp_mb, smp_wmb])
def test_store_buffering(memory: str, weak: bool, barrier: Any) -> None:
    """Both tasks miss the other's store, unless memory is sc or a full barrier stands between."""

    def p0(s: Registers) -> None:
        WRITE_ONCE(s.v, "x", 1)
        barrier()
        s.r["0"] = READ_ONCE(s.v, "y")

    def p1(s: Registers) -> None:
        WRITE_ONCE(s.v, "y", 1)
        barrier()
        s.r["1"] = READ_ONCE(s.v, "x")

    found = outcomes(memory, p0, p1)

    assert found == {(0, 1), (1, 0), (1, 1)} | ({(0, 0)} if weak and barrier is not smp_mb else set())


@pytest.mark.parametrize(("memory", "weak"), [("sc", False), ("tso", False), ("lkmm", True)])
def test_message_passing(memory: str, weak: bool) -> None:
    """The flag without the data: only the kernel's model, and only if one of the two orderings is missing."""

    def writer(barrier: Any, store: Any) -> Any:
        def body(s: Registers) -> None:
            WRITE_ONCE(s.v, "x", 1)
            barrier()
            store(s)

        return body

    def reader(load: Any, barrier: Any) -> Any:
        def body(s: Registers) -> None:
            s.r["flag"] = load(s.v, "y")
            barrier()
            s.r["data"] = READ_ONCE(s.v, "x")

        return body

    def once(s: Registers) -> None:
        WRITE_ONCE(s.v, "y", 1)

    def release(s: Registers) -> None:
        smp_store_release(s.v, "y", 1)

    writers = [(nothing, once, False), (smp_wmb, once, True), (nothing, release, True), (smp_mb, once, True)]
    readers = [
        (READ_ONCE, nothing, False),
        (READ_ONCE, smp_rmb, True),
        (smp_load_acquire, nothing, True),
        (READ_ONCE, smp_wmb, False),
    ]
    for write_barrier, store, write_ordered in writers:
        for load, read_barrier, read_ordered in readers:
            found = outcomes(memory, writer(write_barrier, store), reader(load, read_barrier))
            stale = (0, 1) in found  # sorted: data, flag
            assert stale == (weak and not (write_ordered and read_ordered))


def test_coherence_and_rmw() -> None:
    """Two exchanges never read the same store; a full one is a barrier, a relaxed one is not."""

    def body(exchange: Any, mine: str, other: str) -> Any:
        def run(s: Registers) -> None:
            exchange(s.v, mine, 1)
            s.r[mine] = READ_ONCE(s.v, other)

        return run

    assert (0, 0) not in outcomes("lkmm", body(xchg, "x", "y"), body(xchg, "y", "x"))
    assert (0, 0) in outcomes("lkmm", body(xchg_relaxed, "x", "y"), body(xchg_relaxed, "y", "x"))

    def both(name: str) -> Any:
        def run(s: Registers) -> None:
            s.r[name] = xchg_relaxed(s.v, "x", name)

        return run

    assert outcomes("lkmm", both("a"), both("b")) == {(0, "a"), ("b", 0)}


@kernel_struct
class Node(Struct):
    """Something that is published."""

    value: int = 0


@kernel_struct
class Head(Struct):
    """Where it is published."""

    first: Any = None


def published(store: Any) -> Result:
    def writer(head: Head) -> None:
        node = Node()
        WRITE_ONCE(node, "value", 42)
        store(head, "first", node)

    def reader(head: Head) -> None:
        node = rcu_dereference(head, "first")
        if node is not None:
            assert READ_ONCE(node, "value") == 42, "the pointer was seen, what it points to was not"

    return explore(Head, writer, reader)


def test_address_dependency() -> None:
    """A pointer that rcu_assign_pointer published orders the loads through it; one that WRITE_ONCE stored
    does not.
    """
    assert published(rcu_assign_pointer).passed
    assert not published(WRITE_ONCE).passed


@pytest.mark.parametrize("memory", ["sc", "tso", "lkmm"])
def test_independent_readers_agree_behind_barriers(memory: str) -> None:
    """IRIW with full barriers: the readers agree on the order of two independent stores."""

    def store(name: str) -> Any:
        return lambda s: WRITE_ONCE(s.v, name, 1)

    def reader(first: str, second: str, barrier: Any) -> Any:
        def run(s: Registers) -> None:
            a = READ_ONCE(s.v, first)
            barrier()
            s.r[first] = (a, READ_ONCE(s.v, second))

        return run

    disagree = ((1, 0), (1, 0))
    ordered = outcomes(memory, store("x"), store("y"), reader("x", "y", smp_mb), reader("y", "x", smp_mb))
    assert disagree not in ordered
    if memory == "lkmm":
        loose = outcomes(memory, store("x"), store("y"), reader("x", "y", smp_rmb), reader("y", "x", smp_rmb))
        assert disagree in loose
