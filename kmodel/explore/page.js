"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const trace = JSON.parse(byId("trace").textContent);
  const rows = [...document.querySelectorAll(".step")];
  const last = rows.length;
  if (last === 0) return;

  const names = new Map(trace.tasks.map((task) => [String(task.id), task.name]));
  const minors = rows.filter((row) => row.classList.contains("minor")).length;
  const breaksAt = rows.findIndex((row) => row.classList.contains("is-breaks")) + 1;
  // The memory that other than minor steps touch.
  const noticed = new Set();
  trace.steps.forEach((step, i) => { if (!rows[i].classList.contains("minor")) noticed.add(step.location); });
  let at = 0;
  let shown = rows.map((_row, i) => i + 1);  // the numbers of the steps that are not hidden

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // The state of every location after step n: the newest mention at or before it.
  function memoryAt(n) {
    const states = new Map();
    for (const step of trace.steps.slice(0, n)) for (const state of step.memory || []) states.set(state.location, state);
    return states;
  }

  function freedAt(n) {
    const freed = new Map();
    for (const step of trace.steps.slice(0, n)) {
      if (step.kind === "free" && step.object) freed.set(step.object, step.n);
      if (step.kind === "alloc") freed.delete(step.object);
    }
    return freed;
  }

  function history(location, state, step) {
    const entries = state ? state.history : [{ step: null, value: location.initial }];
    const here = step && step.location === location.id;
    // Only a step that read says which entry it got; null there is the initial value.
    const readStep = here && step.read_from ? step.read_from.step : undefined;
    const table = element("table", "history");
    const head = table.insertRow();
    head.append(element("td"));
    entries.forEach((entry, i) => {
      const cell = element("th", entry.step === readStep ? "read" : "");
      cell.scope = "col";
      const by = entry.step === null ? "initial" : `#${entry.step}`;
      const newest = i === entries.length - 1 && entries.length > 1 ? ", newest" : "";
      const read = entry.step === readStep ? ", read now" : "";
      cell.append(element("span", "value", entry.value), element("span", "by", by + newest + read));
      head.append(cell);
    });
    for (const [task, name] of names) {
      const seen = state ? state.visible[task] : [0];
      if (!seen) continue;
      const row = table.insertRow();
      const label = element("th", "", name);
      label.scope = "row";
      row.append(label);
      entries.forEach((entry, i) => {
        const may = seen.includes(i);
        const cell = element("td", entry.step === readStep ? "read" : "");
        const sign = element("span", "", may ? "●" : "·");
        sign.setAttribute("aria-hidden", "true");
        cell.append(sign, element("span", "hidden", may ? "may read it" : "cannot read it any more"));
        row.append(cell);
      });
    }
    return table;
  }

  function box(location, state, step, freed) {
    const touched = step && step.location === location.id;
    const made = element("div", "location" + (touched ? " touched" : ""));
    made.dataset.location = location.id;
    const title = element("h4");
    title.append(element("span", "name", location.name));
    if (freed.has(location.object)) {
      made.classList.add("gone");
      title.append(" ", element("span", "mark free", `freed at #${freed.get(location.object)}`));
    }
    const scroll = element("div", "scroll");
    scroll.append(history(location, state, step));
    made.append(title, scroll);
    return made;
  }

  function showMemory(n) {
    const step = trace.steps[n - 1];
    const states = memoryAt(n);
    const freed = freedAt(n);
    const changed = new Set((step && step.memory ? step.memory : []).map((state) => state.location));
    if (step && step.location !== undefined) changed.add(step.location);
    const here = [];
    const rest = [];
    const brief = shown.length < last;
    for (const location of trace.locations) {
      const isHere = changed.has(location.id) || (step && step.kind === "free" && location.object === step.object);
      // While minor steps are left out, so is the memory that only they touch.
      if (!isHere && brief && !noticed.has(location.id)) continue;
      (isHere ? here : rest).push(box(location, states.get(location.id), step, freed));
    }
    if (here.length) here.unshift(element("h3", "", "This step"));
    if (rest.length) rest.unshift(element("h3", "", here.length ? "Elsewhere" : "All of it"));
    byId("memory-here").replaceChildren(...here);
    byId("memory-rest").replaceChildren(...rest);
    byId("memory-title").textContent = n > trace.steps.length ? "Memory at the end" : `Memory after step ${n}`;
  }

  function showNow(n) {
    const row = rows[n - 1];
    const step = trace.steps[n - 1];
    const clone = (selector) => [...row.querySelectorAll(selector)].map((found) => found.cloneNode(true));
    byId("now-title").textContent = step ? `Step ${n}: ${names.get(String(step.task))}` : "After the last step";
    document.querySelector(".now-code").hidden = !step;
    byId("now-code").textContent = row.querySelector(".do").textContent;
    const words = clone(".words > p");
    if (row.classList.contains("is-breaks") && words.length) words[words.length - 1].className = "breaking";
    byId("now-words").replaceChildren(...words);
    byId("now-source").replaceChildren(...clone(".source"), ...clone(".stack"));
  }

  // Moves as little as needed. On a phone only the lanes' own box moves, never the page around it: that would take
  // away what is being read.
  const lanes = document.querySelector(".lanes .scroll");
  const narrow = window.matchMedia("(max-width: 62rem)");  // as in page.css
  function reveal(row) {
    const place = () => row.querySelector(".mine").getBoundingClientRect();
    const around = lanes.getBoundingClientRect();
    const head = document.querySelector(".steps thead").getBoundingClientRect();
    const number = row.firstElementChild.getBoundingClientRect();
    // Negative: up or left by so much; positive: down or right, but not past the near edge.
    const nudge = (low, high, from, to) => (low < from ? low - from : high > to ? Math.min(high - to, low - from) : 0);
    let cell = place();
    lanes.scrollLeft += nudge(cell.left, cell.right, around.left + number.width, around.left + lanes.clientWidth);
    const boxed = getComputedStyle(lanes).overflowY === "auto";
    if (boxed) {
      lanes.scrollTop += nudge(cell.top, cell.bottom, around.top + head.height, around.top + lanes.clientHeight);
      if (narrow.matches) return;
    }
    cell = place();
    const above = byId("controls").offsetHeight + (boxed ? 0 : head.height);
    window.scrollBy(0, nudge(cell.top, cell.bottom, above, window.innerHeight - 24));
  }

  function fit() {
    lanes.classList.toggle("fits", document.querySelector(".steps").offsetWidth <= lanes.clientWidth);
    document.documentElement.style.setProperty("--controls", `${byId("controls").offsetHeight - 1}px`);
  }

  function select(n, { quiet = false } = {}) {
    const next = Math.min(Math.max(n, 1), last);
    if (next === at) return;
    if (!shown.includes(next)) showMinor(true);
    at = next;
    const step = trace.steps[at - 1];
    const origin = step && step.read_from ? step.read_from.step : null;
    rows.forEach((row, i) => {
      const current = i + 1 === at;
      row.classList.toggle("current", current);
      row.classList.toggle("later", i + 1 > at);
      row.classList.toggle("source-of", i + 1 === origin);
      const button = row.querySelector(".do");
      button.tabIndex = current ? 0 : -1;
      if (current) button.setAttribute("aria-current", "step");
      else button.removeAttribute("aria-current");
    });
    byId("slider").max = shown.length;
    byId("slider").value = shown.indexOf(at) + 1;
    byId("slider").setAttribute("aria-valuetext", `step ${at} of ${last}`);
    byId("position").textContent = `${at} of ${last}`;
    for (const id of ["first", "back"]) byId(id).disabled = at === shown[0];
    for (const id of ["forward", "last"]) byId(id).disabled = at === shown[shown.length - 1];
    byId("switch").disabled = nextSwitch() === 0;
    byId("failure").disabled = breaksAt === 0 || breaksAt === at;
    showNow(at);
    showMemory(at);
    if (!quiet) {
      reveal(rows[at - 1]);
      window.history.replaceState(null, "", `#step-${at}`);
    }
  }

  // Long executions have many steps that only matter to their own task: those can be left out.
  function showMinor(show) {
    shown = rows.map((_row, i) => i + 1).filter((n) => show || !rows[n - 1].classList.contains("minor"));
    document.querySelector(".steps").classList.toggle("brief", !show);
    byId("minor").textContent = `${show ? "Hide" : "Show"} ${minors} minor step${minors === 1 ? "" : "s"}`;
  }

  function toggleMinor() {
    if (minors === 0) return;
    showMinor(shown.length < last);
    const here = shown.includes(at) ? at : shown.find((n) => n > at) || shown[shown.length - 1];
    at = 0;
    select(here);
  }

  // The shown step that lies `by` further.
  function along(by) {
    return shown[Math.min(Math.max(shown.indexOf(at) + by, 0), shown.length - 1)];
  }

  // The next step at which the task changes against its will; after the last of them the first. 0: there is none.
  function nextSwitch() {
    const all = rows.map((row, i) => (row.classList.contains("is-switch") ? i + 1 : 0)).filter(Boolean);
    return all.find((n) => n > at) || all.find((n) => n !== at) || 0;
  }

  const actions = {
    first: () => select(shown[0]),
    back: () => select(along(-1)),
    forward: () => select(along(1)),
    last: () => select(shown[shown.length - 1]),
    switch: () => select(nextSwitch() || at),
    failure: () => select(breaksAt || at),
    minor: toggleMinor,
  };
  const keys = {
    ArrowLeft: "back", k: "back", ArrowRight: "forward", j: "forward",
    Home: "first", End: "last", s: "switch", v: "failure", p: "minor",
  };

  for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
  byId("slider").addEventListener("input", (event) => select(shown[Number(event.target.value) - 1]));
  document.addEventListener("keydown", (event) => {
    const name = keys[event.key];
    if (!name || event.ctrlKey || event.altKey || event.metaKey) return;
    // The slider moves by these keys itself.
    if (event.target === byId("slider") && event.key.length > 1) return;
    event.preventDefault();
    actions[name]();
  });
  for (const row of rows) row.addEventListener("click", () => select(rows.indexOf(row) + 1));
  for (const gap of document.querySelectorAll(".gap")) gap.addEventListener("click", toggleMinor);

  function fromAddress() {
    const wanted = /^#step-(\d+)$/.exec(window.location.hash);
    return wanted ? Number(wanted[1]) : 0;
  }
  window.addEventListener("hashchange", () => select(fromAddress() || at));

  // From here on an address with #step-7 is for select(): the browser itself would scroll the whole page there.
  rows.forEach((row) => row.removeAttribute("id"));
  document.querySelector("main").classList.add("stepping");
  for (const id of ["controls", "side"]) byId(id).hidden = false;
  byId("memory").hidden = trace.locations.length === 0;
  fit();
  window.addEventListener("resize", fit);
  byId("minor").hidden = minors === 0;
  showMinor(minors < 3 || shown.length - minors < 2);
  const wanted = fromAddress();
  select(wanted || shown[0], { quiet: !wanted });
})();
