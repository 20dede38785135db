"""The page of a trace, driven in a headless Chromium."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kmodel.explore.html import write_page
from tests.explore.chromium import Page, chromium, find_chromium
from tests.explore.samples import deadlock, message_passing, resurrection

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on PATH (chromium, google-chrome) or in $KMODEL_CHROMIUM"
)

WIDE, PHONE = (1400, 900), (390, 844)

# Every visible text with too little contrast against what is painted behind it, as "ratio: text".
CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const curve = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgb.slice(0, 3).map((v) => curve(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let checked = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    const box = element.getBoundingClientRect();
    if (!text || element.closest("script, style, .hidden") || box.width === 0) continue;
    if (getComputedStyle(element).visibility !== "visible") continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    checked += 1;
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${text}`);
  }
  return [checked, found];
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    browser.emulate(*WIDE)
    return browser


@pytest.fixture
def story(page: Page, tmp_path: Path) -> Page:
    """The page of the resurrection."""
    return _open(page, tmp_path, resurrection())


def _open(page: Page, folder: Path, trace: Any, fragment: str = "") -> Page:
    path = folder / "page.html"
    write_page(path, trace, replay="kmodel replay page.html")
    page.open(path, fragment)
    return page


def _at(page: Page) -> str:
    """The number of the row marked as current."""
    return str(page.evaluate("document.querySelector('.step.current > th').textContent"))


def test_it_begins_at_the_first_step(story: Page) -> None:
    """The first step is current, and there is no way back from it."""
    assert _at(story) == "1"
    assert story.text("#position") == "1 of 12"
    assert story.text("#now-title") == "Step 1: lookup"
    assert story.evaluate("document.querySelector('#back').disabled") is True
    assert story.evaluate("document.querySelector('#forward').disabled") is False


def test_keys_step(story: Page) -> None:
    """Arrows, j and k step, Home and End go to the ends and not past them."""
    reached = []
    for key in ("ArrowRight", "j", "j", "ArrowLeft", "k", "End", "ArrowRight", "ArrowLeft", "Home", "k"):
        story.press(key)
        reached.append(_at(story))

    assert reached == ["2", "3", "4", "3", "2", "12", "12", "11", "1", "1"]


def test_keys_with_modifiers_are_the_browsers(story: Page) -> None:
    """Alt+Left is the browser's way back, not a step."""
    story.press("j")
    story.press("ArrowRight", modifiers=1)

    assert _at(story) == "2"


def test_switches_and_the_failure_have_keys(story: Page) -> None:
    """s goes round the forced switches, v to where it breaks."""
    reached = []
    for key in ("s", "s", "s", "v"):
        story.press(key)
        reached.append(_at(story))

    assert reached == ["3", "7", "3", "12"]
    assert story.evaluate("document.querySelector('#failure').disabled") is True


def test_buttons_step(story: Page) -> None:
    """Each button does what it says."""
    reached = []
    for button in ("forward", "last", "back", "first", "switch", "failure"):
        story.click(f"#{button}")
        reached.append(_at(story))

    assert reached == ["2", "12", "11", "1", "3", "12"]


def test_the_slider_steps_once_per_key(story: Page) -> None:
    """With the slider focused an arrow moves one step, not two, and its value is said in words."""
    story.evaluate("document.querySelector('#slider').focus()")
    story.press("ArrowRight")
    story.press("ArrowRight")
    story.press("ArrowLeft")

    assert _at(story) == "2"
    assert (
        story.evaluate("document.querySelector('#slider').getAttribute('aria-valuetext')") == "step 2 of 12"
    )


def test_a_click_on_a_row_selects_it(story: Page) -> None:
    """A step is selected by clicking it."""
    story.click(".step:nth-of-type(5) .do")

    assert _at(story) == "5"
    assert story.evaluate("document.querySelector('[aria-current=step]').dataset.step") == "5"


def test_the_address_names_the_step(page: Page, tmp_path: Path) -> None:
    """An address with a step opens there, and links to steps go there."""
    _open(page, tmp_path, resurrection(), "#step-5")

    assert _at(page) == "5"

    page.press("j")

    assert page.evaluate("location.hash") == "#step-6"

    page.click("#violation a")
    page.until("document.querySelector('.step.current > th').textContent === '12'")


def _busy() -> Any:
    """A trace in which the reader also has twenty steps on memory of its own."""
    trace: Any = message_passing()
    trace["locations"].append({"id": 3, "name": "reader.stack", "initial": "0"})
    own = [
        {"n": 0, "task": 2, "kind": "load", "order": "plain", "location": 3, "value": "0"} for _ in range(20)
    ]
    trace["steps"][3]["read_from"]["newest"] = 1
    trace["steps"][2:2] = own
    trace["steps"][22]["read_from"]["step"] = 2
    for n, step in enumerate(trace["steps"], 1):
        step["n"] = n
    for state in trace["steps"][22]["memory"]:
        state["history"][1]["step"] = 2
    trace["violation"]["step"] = 24
    return trace


def _much() -> Any:
    """A trace with a long history of long values."""
    trace: Any = message_passing()
    step = trace["steps"][0]
    step["value"] = "VmAreaStruct#1.vm_file_with_a_long_name"
    stores = [{"step": None if n == 0 else 1, "value": f"-0x{n:08x}"} for n in range(20)]
    step["memory"] = [{"location": 1, "history": stores, "visible": {"1": [19], "2": list(range(20))}}]
    return trace


def test_minor_steps_are_left_out_at_first(page: Page, tmp_path: Path) -> None:
    """Many steps on memory of one's own are hidden and counted; stepping skips them until asked for."""
    _open(page, tmp_path, _busy())
    reached = [_at(page)]
    for key in ("j", "j", "j", "k"):
        page.press(key)
        reached.append(_at(page))

    assert reached == ["1", "2", "23", "24", "23"]
    assert page.text("#minor") == "Show 20 minor steps"

    page.click("#minor")
    page.press("k")

    assert _at(page) == "22"
    assert page.text("#minor") == "Hide 20 minor steps"

    page.press("p")

    assert _at(page) == "23"


def test_a_row_stands_for_what_is_left_out(page: Page, tmp_path: Path) -> None:
    """Where steps are hidden a row says how many, in the lane of their task; a click brings them back."""
    _open(page, tmp_path, _busy())
    row = "[...document.querySelectorAll('.gap')].map((row) => [...row.cells].map((cell) => cell.innerText))"

    assert page.evaluate(row) == [["", "", "... 20 steps of its own"]]

    page.click(".gap")

    assert page.evaluate("document.querySelector('.gap').offsetHeight") == 0
    assert page.evaluate("document.querySelector('.step.minor').offsetHeight") > 0


def test_a_link_to_a_minor_step_shows_it(page: Page, tmp_path: Path) -> None:
    """An address that names a hidden step brings the hidden ones back."""
    _open(page, tmp_path, _busy(), "#step-5")

    assert _at(page) == "5"
    assert page.text("#minor") == "Hide 20 minor steps"


def test_few_minor_steps_are_not_hidden(story: Page) -> None:
    """Where there are only a few, everything is shown."""
    assert (
        story.evaluate("[...document.querySelectorAll('.step')].every((row) => row.offsetHeight > 0)") is True
    )
    assert story.evaluate("document.querySelectorAll('.step.minor').length") == 0


def test_the_step_is_explained(story: Page) -> None:
    """The panel says in words what the current step did, announces it, and shows its source line."""
    for _ in range(6):
        story.press("j")

    assert story.text("#now-code") == "refcount_inc(Uprobe#1.ref) 0 → 1 ← #4"
    assert "lookup changes Uprobe#1.ref from 0 to 1 in one step, ordering nothing." in story.text(
        "#now-words"
    )
    assert "The scheduler switches here: unregister could have gone on." in story.text("#now-words")
    assert "not refcount_inc_not_zero" in story.text("#now-source")
    assert "kmodel/examples.py:42 lookup" in story.text("#now-source")
    assert (
        story.evaluate("document.querySelector('#now-words').closest('[aria-live=polite]') !== null") is True
    )


def test_the_violation_is_named_where_it_shows(story: Page) -> None:
    """The header names the violation; so does the failing step, in words and by a mark with text."""
    assert "FAIL: use after free" in story.text("#violation")
    assert "Step 12, lookup" in story.text("#violation")

    story.press("v")

    assert "Here it breaks (use after free)" in story.text("#now-words .breaking")
    assert story.text(".step.current .mark") == "breaks: use after free"


@pytest.mark.parametrize(
    ("n", "mark"),
    [(3, "switch"), (9, "grace period begins"), (10, "grace period over"), (11, "freed")],
)
def test_marks_are_words(story: Page, n: int, mark: str) -> None:
    """Switches, grace periods and frees are marked in text, so not by colour alone."""
    assert story.text(f".step:nth-of-type({n}) .mark") == mark


def test_sections_have_lines_of_different_style(story: Page) -> None:
    """Reader sections, held locks and grace periods differ in the style of their lines."""
    styles = story.evaluate(
        "['td.reader', 'td.held', 'td.waiting'].map((cell) =>"
        " getComputedStyle(document.querySelector(cell)).borderLeftStyle)"
    )

    assert styles == ["solid", "dashed", "double"]
    assert story.evaluate("document.querySelectorAll('td.reader').length") == 8


def _memory(page: Page, location: int) -> list[list[str]]:
    """The table of a location: its stores, then per task a mark for each it may still read."""
    script = f"""[...document.querySelectorAll('[data-location="{location}"] .history tr')].map((row) =>
        [...row.cells].map((cell) => cell.innerText.replace(/\\n/g, ' ').trim()))"""
    found: list[list[str]] = page.evaluate(script)
    return [[cell.removesuffix("may read it").strip() for cell in row] for row in found]


def test_memory_shows_who_may_still_see_what(page: Page, tmp_path: Path) -> None:
    """After the reader has seen the flag it can no longer miss that, but it may still miss the data."""
    _open(page, tmp_path, message_passing())

    assert [row[1:] for row in _memory(page, 2)] == [["0 initial"], ["●"], ["●"]]

    for _ in range(2):
        page.press("j")
    flag = [[cell[:1] for cell in row[1:]] for row in _memory(page, 2)[1:]]
    data = [[cell[:1] for cell in row[1:]] for row in _memory(page, 1)[1:]]

    assert flag == [["·", "●"], ["·", "●"]]
    assert data == [["·", "●"], ["●", "●"]]
    assert page.text("#memory-title") == "Memory after step 3"
    assert page.text(".location.touched .name") == "message.flag"


def test_memory_marks_what_a_stale_read_got(page: Page, tmp_path: Path) -> None:
    """At a stale read the entry that was read is marked, and so is the newest one."""
    _open(page, tmp_path, message_passing())
    page.press("End")

    assert _memory(page, 1)[0][1:] == ["0 initial, read now", "42 #1, newest"]
    assert "stale" in page.text(".step.current")


def test_memory_of_a_freed_object(story: Page) -> None:
    """Fields of a freed object say when it was freed, from the free on."""
    story.press("v")

    assert "freed at #11" in story.text('[data-location="1"] h4')
    assert "freed" not in story.text('[data-location="2"] h4')

    story.press("Home")

    assert "freed" not in story.text('[data-location="1"] h4')


def test_what_shows_only_at_the_end(page: Page, tmp_path: Path) -> None:
    """A deadlock has a row after the last step, and a table of who waits for what."""
    _open(page, tmp_path, deadlock())
    page.press("v")

    assert _at(page) == "end"
    assert page.text("#now-title") == "After the last step"
    assert "no task can go on" in page.text("#now-words")
    assert page.text(".waits").split("\n")[1].split("\t") == ["left", "mutex b", "right", "mutex a"]
    assert page.evaluate("document.querySelector('#memory').hidden") is True


def test_a_trace_without_steps_or_violation(page: Page, tmp_path: Path) -> None:
    """The smallest trace makes a page that says so and complains about nothing."""
    trace: Any = message_passing()
    trace.update(steps=[], verdict="PASS")
    del trace["violation"]
    _open(page, tmp_path, trace)

    assert "PASS" in page.text(".verdict")
    assert page.complaints() == []


def test_it_runs_alone_and_without_complaints(story: Page) -> None:
    """The page fetches nothing but itself, and nothing it does violates its policy or raises."""
    for key in ("j", "v", "Home", "End", "s"):
        story.press(key)

    assert [url for url in story.requests() if not url.endswith("/page.html")] == []
    assert story.complaints() == []


def test_hostile_text_is_shown_as_text(page: Page, tmp_path: Path) -> None:
    """Markup in names, values and source lines is shown, not obeyed."""
    nasty = "</script><img src=x onerror=window.bad=1><b>"
    trace = message_passing()
    trace["tasks"][0]["name"] = trace["locations"][0]["name"] = trace["steps"][0]["value"] = nasty
    trace["steps"][0]["memory"][0]["history"][1]["value"] = nasty
    trace["steps"][0]["source"]["text"] = nasty
    _open(page, tmp_path, trace)

    assert page.evaluate("document.querySelectorAll('img, main b').length") == 0
    assert page.evaluate("window.bad") is None
    assert nasty in page.text("#now-words")
    assert nasty in page.text('[data-location="1"]')


@pytest.mark.parametrize("sample", [message_passing, resurrection, deadlock, _busy, _much])
def test_it_fits_a_phone(page: Page, tmp_path: Path, sample: Any) -> None:
    """On a phone the page never scrolls sideways; the lanes do, in their own box, and follow the step."""
    page.emulate(*PHONE, mobile=True)
    _open(page, tmp_path, sample())
    for key in ("Home", "j", "End"):
        page.press(key)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
        inside = page.evaluate(
            "(() => { const c = document.querySelector('.step.current .mine').getBoundingClientRect();"
            "const b = document.querySelector('.lanes > .scroll').getBoundingClientRect();"
            "return c.left >= b.left && c.left < b.right && c.top >= b.top && c.top < b.bottom; })()"
        )
        assert inside is True


def test_a_phone_has_buttons_for_thumbs(page: Page, tmp_path: Path) -> None:
    """On a phone the controls stay at the bottom of the window, and each button is 44 pixels high."""
    page.emulate(*PHONE, mobile=True)
    _open(page, tmp_path, resurrection())
    sizes = page.evaluate("[...document.querySelectorAll('.buttons button')].map((b) => b.offsetHeight)")
    bottom = page.evaluate("document.querySelector('#controls').getBoundingClientRect().bottom")

    assert min(sizes) >= 44
    assert bottom == PHONE[1]


def test_many_tasks_scroll_in_their_box(page: Page, tmp_path: Path) -> None:
    """Twenty lanes do not widen the page; their box scrolls, and the last lane's step is brought into it."""
    trace = message_passing()
    trace["tasks"] += [{"id": n, "name": f"task {n}"} for n in range(3, 21)]
    trace["steps"][3]["task"] = 20
    page.emulate(WIDE[0], 500)
    _open(page, tmp_path, trace)
    page.press("End")

    assert page.evaluate("document.documentElement.scrollWidth") <= WIDE[0]
    assert page.evaluate(
        "document.querySelector('.step.current .mine').getBoundingClientRect().right"
        " <= document.querySelector('.lanes > .scroll').getBoundingClientRect().right + 1"
    )
    assert (
        page.evaluate("document.querySelector('.step.current .mine').getBoundingClientRect().bottom") <= 500
    )


def test_a_long_trace_keeps_step_and_names_in_sight(page: Page, tmp_path: Path) -> None:
    """In a trace of 300 steps the current row and the task names are both inside the window at each jump."""
    trace = message_passing()
    first = trace["steps"][0]
    trace["steps"] = [{**first, "n": n} for n in range(1, 301)]
    trace["violation"]["step"] = 300
    _open(page, tmp_path, trace)
    for key in ("End", "Home", "End", "k", "k"):
        page.press(key)
        row, head = page.evaluate(
            "['.step.current .mine', '.steps thead th'].map((s) => document.querySelector(s))"
            ".map((e) => e.getBoundingClientRect()).map((r) => [r.top, r.bottom])"
        )
        assert head[0] >= 0
        assert row[0] >= head[1] - 1
        assert row[1] <= WIDE[1]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("sample", [message_passing, resurrection, deadlock])
def test_text_has_contrast(page: Page, tmp_path: Path, dark: bool, sample: Any) -> None:
    """Every text has a contrast of at least 4.5 to 1, in the light and in the dark, at each step."""
    page.emulate(*WIDE, dark=dark)
    _open(page, tmp_path, sample())
    for key in ("Home", "j", "j", "v"):
        page.press(key)
        checked, found = page.evaluate(CONTRAST)

        assert checked > 30
        assert found == []


def test_the_dark_page_is_dark(page: Page, tmp_path: Path) -> None:
    """The reader's preference decides the background."""
    shades = []
    for dark in (False, True):
        page.emulate(*WIDE, dark=dark)
        _open(page, tmp_path, message_passing())
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shades.append(sum(int(part) for part in colour[4:-1].split(",")))

    assert shades[0] > 700
    assert shades[1] < 150


def test_focus_is_visible(story: Page) -> None:
    """Tab reaches the controls, and what has the focus is outlined."""
    story.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(4):
        story.press("Tab")
        seen.append(
            story.evaluate(
                "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
            )
        )

    assert [style for _id, style in seen] == ["solid"] * 4
    assert "forward" in [name for name, _style in seen]


def test_only_the_current_step_is_a_tab_stop(story: Page) -> None:
    """The rows together are one stop of the Tab key."""
    story.press("j")
    stops = "[...document.querySelectorAll('.do')].filter((b) => b.tabIndex === 0).map((b) => b.dataset.step)"

    assert story.evaluate(stops) == ["2"]


def test_print_shows_every_step_in_words(story: Page) -> None:
    """On paper there are no controls, and each step has its explanation beside it."""
    story.emulate(800, 1100, media="print")

    assert story.evaluate("document.querySelector('#controls').getBoundingClientRect().height") == 0
    assert "0 to 1: the count said that nobody holds the object any more." in story.text(".lanes")
    assert (
        story.evaluate("getComputedStyle(document.querySelector('.lanes > .scroll')).overflowY") == "visible"
    )


def test_without_scripts_it_is_still_a_table_with_words(page: Page, tmp_path: Path) -> None:
    """With scripts off the lanes, their words and the violation are there, and no dead controls."""
    write_page(tmp_path / "page.html", resurrection())
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(tmp_path / "page.html")
        text = page.text("body")
        controls = page.evaluate("document.querySelector('#controls').offsetHeight")
    finally:
        page.send("Emulation.setScriptExecutionDisabled", value=False)

    assert "Here it breaks (use after free)" in text
    assert controls == 0


def test_the_replay_command_is_shown(story: Page) -> None:
    """The page says how to run the execution again, and carries what that needs."""
    assert story.text("#replay") == "kmodel replay page.html"
    assert json.loads(story.evaluate("document.querySelector('#trace').textContent")) == resurrection()
