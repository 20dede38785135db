"""file_ref: every zone of the word against arithmetic on signed numbers, and put against get."""

from typing import Any

import pytest

from kmodel.core import CoopEngine, boot, kernel_warnings, variables
from kmodel.fs import (
    FILE_REF_DEAD,
    FILE_REF_MAXREF,
    FILE_REF_NOREF,
    FILE_REF_ONEREF,
    FILE_REF_RELEASED,
    FILE_REF_SATURATED,
    file_ref_get,
    file_ref_inc,
    file_ref_init,
    file_ref_put,
    file_ref_put_close,
    file_ref_read,
)

MIN = -(1 << 63)

BORDERS = (
    FILE_REF_ONEREF,
    FILE_REF_MAXREF,
    FILE_REF_MAXREF + 1,
    FILE_REF_SATURATED,
    FILE_REF_RELEASED,
    FILE_REF_DEAD,
    FILE_REF_NOREF,
)
STATES = sorted({(border + step) % (1 << 64) for border in BORDERS for step in (-2, -1, 0, 1, 2)})


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def unsigned(value: int) -> int:
    return value % (1 << 64)


def zone(value: int) -> str:
    if signed(value) >= 0:
        return "valid"
    if value < FILE_REF_RELEASED:
        return "saturated"
    return "none" if signed(value) == -1 else "dead"


def expected_put(old: int) -> tuple[bool, int, int]:
    """Released, value afterwards, warnings."""
    new = unsigned(signed(old) - 1)
    match zone(new):
        case "valid":
            return False, new, 0
        case "none":
            return True, FILE_REF_DEAD, 0
        case "dead":
            return False, FILE_REF_DEAD, 1
        case _:
            return False, FILE_REF_SATURATED, 0


def test_states_cover_every_zone() -> None:
    """The loops below meet every zone."""
    assert {zone(state) for state in STATES} == {"valid", "saturated", "dead", "none"}


@pytest.mark.parametrize("old", STATES, ids=hex)
def test_get_adds_one_and_succeeds_iff_not_negative(old: int) -> None:
    """From NOREF too: that get raced with the last put and wins. A refused get leaves its mark."""
    v = variables(ref=old)
    got = file_ref_get(v, "ref")

    assert (got, v.ref) == (signed(unsigned(old + 1)) >= 0, unsigned(old + 1))


@pytest.mark.parametrize("old", STATES, ids=hex)
@pytest.mark.parametrize("put", [file_ref_put, file_ref_put_close])
def test_put_in_every_zone(old: int, put: Any) -> None:
    """Who is told to release, what remains, and who is warned."""
    boot()
    v = variables(ref=old)
    released = put(v, "ref")

    assert (released, v.ref, len(kernel_warnings())) == expected_put(old)


@pytest.mark.parametrize("old", STATES, ids=hex)
def test_read_counts_references_outside_the_dead_zone(old: int) -> None:
    """Stored value plus one, 0 when dead (also for NOREF)."""
    assert file_ref_read(variables(ref=old), "ref") == (0 if old >= FILE_REF_RELEASED else old + 1)


@pytest.mark.parametrize("old", STATES, ids=hex)
def test_inc_warns_of_a_released_file(old: int) -> None:
    """get_file() is for those who hold a reference."""
    boot()
    v = variables(ref=old)
    file_ref_inc(v, "ref")

    assert (v.ref, len(kernel_warnings())) == (unsigned(old + 1), int(signed(old) < 0))


def test_init_stores_one_less() -> None:
    """One reference is stored as zero."""
    v = variables(ref=FILE_REF_DEAD)
    file_ref_init(v, "ref", 1)
    assert v.ref == FILE_REF_ONEREF


def putter(state: Any) -> None:
    if file_ref_put(state, "ref"):
        state.released += 1


def closer(state: Any) -> None:
    if file_ref_put_close(state, "ref"):
        state.released += 1


def getter(state: Any) -> None:
    if file_ref_get(state, "ref"):
        state.got += 1
        if file_ref_put(state, "ref"):
            state.released += 1


@pytest.mark.parametrize("last", [putter, closer])
def test_exactly_one_put_releases(last: Any) -> None:
    """F1: gets and puts in any order; the word ends dead and one task was told."""
    outcomes = set()
    for seed in range(60):
        state = CoopEngine(seed).run(lambda: variables(ref=0, released=0, got=0), [last, getter, getter])
        assert state.released == 1
        assert FILE_REF_RELEASED <= state.ref < FILE_REF_NOREF
        outcomes.add(state.got)
    assert len(outcomes) > 1, "every run went the same way"
