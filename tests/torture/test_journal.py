"""The journal of contested addresses."""

from kmodel.torture.journal import KEEP, NOTHING, Entry, Picture, Slot


def entry(seq: int, label: str) -> Entry:
    return Entry(seq, Picture(label, seq, label), "writer", "mmap", 0)


def test_each_sequence_value_has_the_entry_before_it() -> None:
    """A picture holds from its own sequence value until the next entry's."""
    slot = Slot(None, 0x1000, NOTHING, 10, 0)
    slot.append(entry(14, "a"))
    slot.append(entry(20, "b"))

    shown = [found.picture.label if (found := slot.at(seq)) else None for seq in (8, 10, 12, 14, 18, 20, 99)]

    assert shown == [None, NOTHING.label, NOTHING.label, "a", "a", "b", "b"]


def test_two_changes_in_one_hold_count_as_the_last() -> None:
    """Nobody can sample between them."""
    slot = Slot(None, 0x1000, NOTHING, 10, 0)
    slot.append(entry(14, "a"))
    slot.append(entry(14, "b"))

    found = slot.at(14)

    assert found is not None
    assert found.picture.label == "b"


def test_between_includes_what_held_at_the_start() -> None:
    """Every picture of a stretch of time, also the one it began with."""
    slot = Slot(None, 0x1000, NOTHING, 10, 0)
    slot.append(entry(14, "a"))
    slot.append(entry(20, "b"))
    during = slot.between(16, 20)

    assert during is not None
    assert [e.picture.label for e in during] == ["a", "b"]
    assert slot.between(2, 30) is None


def test_old_entries_are_forgotten_and_said_to_be() -> None:
    """The history is bounded; what is too long ago is None, not a guess."""
    slot = Slot(None, 0x1000, NOTHING, 0, 0)
    for n in range(1, 5 * KEEP):
        slot.append(entry(2 * n, str(n)))
    slot.check_invariants()
    newest = slot.at(10 * KEEP)

    assert slot.at(2) is None
    assert newest is not None
    assert newest.picture.label == str(5 * KEEP - 1)
