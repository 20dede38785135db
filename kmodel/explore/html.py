"""A trace as one page that needs nothing else: lanes, words, source lines and memory, stepped by keys.

Models:      nothing in Linux
Guards:      none
Invariants:  P1 the page loads nothing and runs no script but its own (its content security policy says so),
             P2 the trace inside it reads back equal (explore/tracefile.py, read_trace)
Leaves out:  executions of more than some thousand steps, which a browser shows slowly
Read next:   page.html, page.css, page.js beside this module

The lanes are plain HTML, made here: they can be read and printed without scripts. page.js adds the stepping
and the memory panel.
"""

import base64
import hashlib
import json
import os
import re
import shlex
from html import escape
from importlib import resources
from string import Template

from kmodel.explore.fold import folded
from kmodel.explore.tracefile import PAGE_MARK, Source, Step, Trace, Violation, write_text
from kmodel.explore.words import Words, violation_name

_LEGEND = (
    ("switch", "switch", "the scheduler took the CPU from a task that could have gone on"),
    ("stale", "stale", "the read got an older value than the newest"),
    ("free", "freed", "the object is gone from here on"),
    ("grace", "grace period", "a wait for all readers that were inside a section"),
    ("breaks", "breaks", "the property that does not hold, at the step where it shows"),
)
_BARS = (
    ("reader", "solid line: inside a read-side section"),
    ("held", "dashed line: holding a lock"),
    ("waiting", "double line: waiting for a grace period"),
)


def write_page(path: str | os.PathLike[str], trace: Trace, *, replay: str | None = None) -> None:
    """Write the page of a trace, all of it or nothing; `replay` is the command it shows."""
    if replay is None:
        replay = f"kmodel replay {shlex.quote(os.fspath(path))}"
    write_text(path, page(trace, replay=replay))


def page(trace: Trace, *, replay: str = "") -> str:
    """The page of a trace as text."""
    style = f"{_asset('page.css')}:root {{ --lanes: {len(trace['tasks'])}; }}\n"
    script = _asset("page.js")
    csp = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("page.html")).substitute(
        csp=escape(csp),
        title=escape(f"{trace['scenario']}: {_headline(trace)}"),
        style=style,
        script=script,
        header=_header(trace),
        last=len(trace["steps"]) + _has_end(trace),
        lanes=_Lanes(trace).table(),
        legend=_legend(),
        footer=_footer(replay),
        data=f"{PAGE_MARK}{_embedded(trace)}</script>",
    )


def _asset(name: str) -> str:
    return resources.files("kmodel.explore").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(trace: Trace) -> str:
    """JSON that cannot end the element it stands in, whatever the trace says."""
    text = json.dumps(trace, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _has_end(trace: Trace) -> bool:
    """Whether something is wrong that shows only after the last step."""
    return "violation" in trace and "step" not in trace["violation"]


def _headline(trace: Trace) -> str:
    violation = trace.get("violation")
    return violation_name(violation["kind"]) if violation else trace["verdict"]


# ------------------------------------------------------------------------------------------- around the lanes


def _header(trace: Trace) -> str:
    lines = [f"<h1>{escape(trace['scenario'])}</h1>"]
    if "summary" in trace:
        lines.append(f'<p class="summary">{escape(trace["summary"])}</p>')
    violation = trace.get("violation")
    if violation is None:
        lines.append(
            f'<p class="verdict fine"><strong>{escape(trace["verdict"])}</strong> Nothing breaks here.</p>'
        )
    else:
        message = escape(violation["message"].rstrip(".")) + "."
        lines.append(
            f'<div class="verdict bad" id="violation"><p><strong>{escape(trace["verdict"])}: '
            f"{escape(violation_name(violation['kind']))}</strong> {message}{_at(trace, violation)}</p>"
            f"{_waits(trace, violation)}</div>"
        )
    lines.append(f'<ul class="facts">{"".join(f"<li>{fact}</li>" for fact in _facts(trace))}</ul>')
    return "\n".join(lines)


def _at(trace: Trace, violation: Violation) -> str:
    """Where it showed, as a link to that row."""
    names = {task["id"]: task["name"] for task in trace["tasks"]}
    n = violation.get("step", len(trace["steps"]) + 1)
    where = f"Step {n}" if "step" in violation else "After the last step"
    task = f", {escape(names[violation['task']])}" if violation.get("task") in names else ""
    return f' <a href="#step-{n}">{where}</a>{task}.'


def _waits(trace: Trace, violation: Violation) -> str:
    """The table of a deadlock: who waits for what, who has it."""
    if not violation.get("waits"):
        return ""
    names = {task["id"]: task["name"] for task in trace["tasks"]}
    rows = []
    for wait in violation["waits"]:
        held_by = wait.get("held_by")
        cells = (
            names.get(wait["task"], "?"),
            wait["for"],
            "nobody" if held_by is None else names.get(held_by, "?"),
            ", ".join(wait.get("holds", [])) or "nothing",
        )
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("task", "waits for", "held by", "holds itself")
    )
    return f'<div class="scroll"><table class="waits"><tr>{head}</tr>{"".join(rows)}</table></div>'


def _facts(trace: Trace) -> list[str]:
    """The small print under the title."""
    facts = [f"memory model <strong>{escape(trace['memory'])}</strong>"]
    if trace.get("removed_guards"):
        facts.append(f"without <strong>{escape(', '.join(trace['removed_guards']))}</strong>")
    search = trace.get("search", {})
    if "executions" in search:
        how = f" by {escape(search['strategy'])}" if "strategy" in search else ""
        facts.append(f"execution {search['executions']:,}{how}")
    switches = sum(1 for step in trace["steps"] if step.get("preemption"))
    steps = len(trace["steps"])
    facts.append(f"{steps} step{'s' * (steps != 1)}, {switches} forced switch{'es' * (switches != 1)}")
    return facts


def _legend() -> str:
    marks = "".join(
        f'<li><span class="mark {kind}">{mark}</span> {text}</li>' for kind, mark, text in _LEGEND
    )
    bars = "".join(
        f'<li><span class="bar {kind}" aria-hidden="true"></span> {text}</li>' for kind, text in _BARS
    )
    arrow = "<li><code>← #3</code> the value was stored by step 3</li>"
    return (
        f'<section aria-label="Legend"><h2>Legend</h2><ul class="legend">{marks}{arrow}{bars}</ul></section>'
    )


def _footer(replay: str) -> str:
    keys = (
        '<p class="keys">Keys: <kbd>←</kbd> <kbd>→</kbd> or <kbd>k</kbd> <kbd>j</kbd> step, '
        "<kbd>Home</kbd> <kbd>End</kbd> first and last, <kbd>s</kbd> next forced switch, "
        "<kbd>v</kbd> where it breaks, <kbd>p</kbd> minor steps.</p>"
    )
    if not replay:
        return keys
    return f'{keys}<p class="replay">Run it again: <code id="replay">{escape(replay)}</code></p>'


# -------------------------------------------------------------------------------------------------- the lanes


class _Lanes:
    """The table with a column per task and a row per step."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.words = Words(trace)
        # What is open per task while rows are made: reader sections, locks, grace periods waited for.
        self.open: dict[int, dict[str, int]] = {
            task["id"]: {"reader": 0, "held": 0, "waiting": 0} for task in trace["tasks"]
        }
        self.minor = folded(trace, above=0)

    def table(self) -> str:
        """All of it."""
        head = "".join(f'<th scope="col">{_code(task["name"])}</th>' for task in self.trace["tasks"])
        said = self.words.all()
        rows = [self._row(step, said[step["n"] - 1]) for step in self.trace["steps"]]
        if _has_end(self.trace):
            rows.append(self._end())
        return (
            '<table class="steps"><thead><tr><th scope="col"><span class="hidden">step</span></th>'
            f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )

    def _row(self, step: Step, said: list[str]) -> str:
        n = step["n"]
        cells = []
        bars = {task: self._bars(task, step) for task in self.open}
        for task in self.trace["tasks"]:
            bar = bars[task["id"]]
            if task["id"] == step["task"]:
                cells.append(f'<td class="{bar} mine">{self._cell(step, said)}</td>')
            else:
                cells.append(f'<td class="{bar}"></td>')
        marks = "".join(f" is-{kind}" for kind, _text in self._marks(step))
        gap = ""
        if n in self.minor:
            marks += " minor"
            gap = self._gap(step, bars) if self.minor[n] else ""
        return gap + f'<tr id="step-{n}" class="step{marks}"><th scope="row">{n}</th>{"".join(cells)}</tr>'

    def _cell(self, step: Step, said: list[str]) -> str:
        words = self.words
        code, origin = words.code(step), words.origin(step)
        outcome = " ".join(part for part in (words.outcome(step), f"← {origin}" if origin else "") if part)
        marks = "".join(
            f'<span class="mark {kind}">{escape(text)}</span> ' for kind, text in self._marks(step)
        )
        result = f' <span class="result">{escape(outcome)}</span>' if outcome else ""
        paragraphs = "".join(f"<p>{escape(sentence)}</p>" for sentence in said)
        below = f'<div class="words">{paragraphs}</div>{_stack(step.get("stack"))}'
        return (
            f'{marks}<button type="button" class="do" data-step="{step["n"]}" tabindex="-1">'
            f"<code>{_code(code)}</code>{result}</button>"
            f"{_source(step.get('source'), code)}{below}"
        )

    def _gap(self, step: Step, bars: dict[int, str]) -> str:
        """A row that stands for the minor steps that begin here, while they are not shown."""
        texts = {task["id"]: "" for task in self.trace["tasks"]} | {step["task"]: self.minor[step["n"]]}
        cells = "".join(f'<td class="{bars[task]}">{escape(text)}</td>' for task, text in texts.items())
        return f'<tr class="gap"><th></th>{cells}</tr>'

    def _marks(self, step: Step) -> list[tuple[str, str]]:
        """(class, text) of what must not be overlooked at this step."""
        marks = []
        if step.get("preemption"):
            marks.append(("switch", "switch"))
        if step.get("read_from", {}).get("stale"):
            marks.append(("stale", "stale"))
        if step["kind"] == "free":
            marks.append(("free", "freed"))
        if step["kind"] == "gp-start":
            marks.append(("grace", "grace period begins"))
        if step["kind"] == "gp-end":
            marks.append(("grace", "grace period over"))
        violation = self.trace.get("violation")
        if violation is not None and violation.get("step") == step["n"]:
            marks.append(("breaks", f"breaks: {violation_name(violation['kind'])}"))
        elif violation is not None and any(r["step"] == step["n"] for r in violation.get("related", [])):
            marks.append(("related", "see the failure"))
        return marks

    def _bars(self, task: int, step: Step) -> str:
        """The classes of a task's cell: what is open in it during this step."""
        count = self.open[task]
        if task == step["task"]:
            kind = step["kind"]
            if kind == "trylock":
                kind = "lock" if step.get("value") == "true" else ""
            shown = dict(count)
            for name, begins, ends in _SPANS:
                if kind == begins:
                    count[name] += 1
                    shown[name] += 1
                elif kind == ends:
                    count[name] = max(0, count[name] - 1)
            count = shown
        return " ".join(name for name, n in count.items() if n)

    def _end(self) -> str:
        violation = self.trace["violation"]
        n = len(self.trace["steps"]) + 1
        name = violation_name(violation["kind"])
        return (
            f'<tr id="step-{n}" class="step is-breaks"><th scope="row">end</th>'
            f'<td class="mine" colspan="{len(self.open)}">'
            f'<span class="mark breaks">breaks: {escape(name)}</span> '
            f'<button type="button" class="do" data-step="{n}" tabindex="-1">after the last step</button>'
            f'<div class="words"><p>{escape(violation["message"])}</p></div></td></tr>'
        )


_SPANS = (
    ("reader", "rcu-lock", "rcu-unlock"),
    ("held", "lock", "unlock"),
    ("waiting", "gp-start", "gp-end"),
)


def _code(text: str) -> str:
    """Code that may be broken where its names have joints, and only there if that is enough."""
    return re.sub(r"([(._])(?=\w)", r"\1<wbr>", escape(text))


def _source(source: Source | None, code: str) -> str:
    """The line of the model, unless it says just what the step's own line does, and where it is."""
    if source is None:
        return ""
    where = f"{source['file']}:{source.get('line', '?')}"
    function = f" {source['function']}" if source.get("function") else ""
    text = source.get("text", "").strip()
    line = f'<code class="line">{_code(text)}</code>' if text and text != code else ""
    return f'<div class="source">{line}<span class="where">{escape(where + function)}</span></div>'


def _stack(stack: list[Source] | None) -> str:
    if not stack:
        return ""
    callers = "".join(
        f"<li>{escape(frame['function'])} <span>{escape(frame['file'])}:{frame['line']}</span></li>"
        for frame in stack
    )
    return f'<ol class="stack">{callers}</ol>'
