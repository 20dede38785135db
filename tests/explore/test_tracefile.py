"""Traces as files: round trips, damage, and the page that carries its own trace."""

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kmodel.core import WRITE_ONCE, smp_load_acquire, smp_store_release, variables
from kmodel.explore import explore
from kmodel.explore.html import page, write_page
from kmodel.explore.tracefile import TraceError, problem, read_trace, write_text, write_trace
from tests.explore.samples import deadlock, message_passing, resurrection

DOCUMENT = Path(__file__).parents[2] / "docs" / "trace-format.md"


@pytest.mark.parametrize("sample", [message_passing, resurrection, deadlock])
def test_round_trip(sample: Callable[[], Any], tmp_path: Path) -> None:
    """A trace read back from its JSON file, or from its page, is equal."""
    trace = sample()
    write_trace(tmp_path / "trace.json", trace)
    write_page(tmp_path / "page.html", trace)

    assert read_trace(tmp_path / "trace.json") == trace
    assert read_trace(tmp_path / "page.html") == trace


def test_the_documented_example_is_a_trace() -> None:
    """The example of docs/trace-format.md is accepted, so the document and the check agree."""
    example = re.search(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)

    assert example is not None
    assert problem(json.loads(example.group(1))) is None


def _without(key: str) -> Callable[[Any], None]:
    def change(trace: Any) -> None:
        del trace[key]

    return change


def _step(number: int, /, **change: Any) -> Callable[[Any], None]:
    def apply(trace: Any) -> None:
        trace["steps"][number - 1].update(change)

    return apply


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_without("format"), "its format is None"),
        (_without("steps"), "its 'steps' is missing"),
        (_without("schedule"), "its 'schedule' is missing"),
        (lambda trace: trace["tasks"].append({"id": 1, "name": "again"}), "its 'tasks' are not"),
        (lambda trace: trace["locations"].append("x"), "its 'locations' are not"),
        (lambda trace: trace["violation"].update(step=99), "names step 99"),
        (_step(2, n=7), "step 2: its number is not 2"),
        (_step(1, task=9), "step 1: task 9"),
        (_step(1, location=9), "step 1: location 9"),
        (_step(3, read_from={"step": 5, "stale": False}), "step 3: its 'read_from'"),
        (_step(3, source={}), "step 3: its 'source'"),
        (_step(1, memory=[{"location": 1, "history": [], "visible": {"1": [0]}}]), "step 1: its 'memory'"),
    ],
)
def test_damage_is_named(change: Callable[[Any], None], told: str, tmp_path: Path) -> None:
    """A file that lost or garbled something is refused in one line that names it."""
    trace: Any = message_passing()
    change(trace)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(trace))

    with pytest.raises(TraceError) as caught:
        read_trace(path)

    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b"<html></html>"])
def test_what_is_no_trace(content: bytes, tmp_path: Path) -> None:
    """Files of other kinds are refused, not crashed on."""
    path = tmp_path / "other"
    path.write_bytes(content)

    with pytest.raises(TraceError, match="is not a trace"):
        read_trace(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """What cannot be written as text leaves neither a part of itself nor a temporary file."""
    path = tmp_path / "trace.json"
    write_trace(path, message_passing())
    before = path.read_bytes()
    trace = message_passing()
    trace["scenario"] = "\ud800"  # half a character: UTF-8 has no bytes for it

    with pytest.raises(UnicodeEncodeError):
        write_trace(path, trace)

    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]


def test_what_is_no_plain_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """A link stays a link, a pipe a pipe: /dev/null as --json must survive it."""
    (tmp_path / "link").symlink_to("trace.json")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)

    write_text(tmp_path / "link", "text")
    write_text(tmp_path / "pipe", "text")

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "trace.json").read_text() == "text"
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe", "trace.json"]


def test_written_files_can_be_read_by_others(tmp_path: Path) -> None:
    """A trace has the permissions of any new file, not those of a private temporary one."""
    plain, path = tmp_path / "plain", tmp_path / "trace.json"
    plain.touch()
    write_trace(path, message_passing())

    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Names and source lines that look like markup neither end the page's script nor become elements."""
    nasty = "</script><script>bad()</script><img src=x onerror=bad()>&\"'<!--\u2028"
    trace = message_passing()
    trace["scenario"] = trace["tasks"][0]["name"] = trace["locations"][0]["name"] = nasty
    trace["violation"]["message"] = nasty
    trace["steps"][0]["source"]["text"] = nasty
    trace["steps"][0]["value"] = nasty

    text = page(trace, replay=nasty)
    write_page(tmp_path / "page.html", trace)

    assert text.count("<script") == 2
    assert "<img" not in text
    assert "bad()</script>" not in text
    assert read_trace(tmp_path / "page.html") == trace


def test_the_page_asks_for_nothing() -> None:
    """The page names no address outside itself, and its policy allows no script or style but its own two."""
    text = page(resurrection())

    assert re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"|url\(|@import", text) == []
    assert "default-src &#x27;none&#x27;" in text
    assert "unsafe-inline" not in text


def test_memory_follows_what_orders_it() -> None:
    """A step that orders a task after others' stores says so for every location, not only for its own."""

    def writer(v: Any) -> None:
        WRITE_ONCE(v, "data", 42)
        smp_store_release(v, "flag", 1)

    def reader(v: Any) -> None:
        if smp_load_acquire(v, "flag"):
            raise AssertionError("seen")

    trace = explore(lambda: variables(data=0, flag=0), writer, reader).trace
    assert trace is not None
    ids = {location["name"]: location["id"] for location in trace["locations"]}
    tasks = {task["name"]: str(task["id"]) for task in trace["tasks"]}
    data = [
        state["visible"][tasks["reader"]]
        for step in trace["steps"]
        for state in step.get("memory", [])
        if state["location"] == ids["data"]
    ]

    assert problem(trace) is None
    assert data == [[0, 1], [1]]
