// A list of the directions of a file, on Load Directions and Apply Direction: names, stars, scores, thumbnails, sliders.
//
// Everything it does goes through the nodes' plain widgets and /elrond/…, so graphs work the same without it.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { allNodes, effectiveWidget, feeding, pathsTo } from "./graph.js";

const LOAD = "ElrondLoadDirections";
const APPLY = "ElrondApplyDirection";
const CLOSED_HEIGHT = 34;
const LEAST_WIDTH = 360;
const LINE_HEIGHT = 24;
const MOST_ROWS = 6;
// Milliseconds between looks at the widgets: a widget on the face of a subgraph calls no node's callback.
const LOOK_EVERY = 250;

const STYLE = `
.elrond-panel { display: flex; flex-direction: column; gap: 4px; height: 100%; overflow: hidden; box-sizing: border-box;
  color: var(--input-text, #ddd); font: 12px/1.3 system-ui, sans-serif; }
.elrond-panel button, .elrond-panel input { font: inherit; color: inherit; }
.elrond-panel button, .elrond-panel input[type="text"], .elrond-panel input[type="number"] {
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px;
  padding: 2px 6px; min-width: 0; }
.elrond-panel button { cursor: pointer; white-space: nowrap; }
.elrond-panel :focus-visible { outline: 2px solid var(--p-primary-color, #3b82f6); outline-offset: -1px; }
.elrond-panel .elrond-head { text-align: left; flex: none; overflow: hidden; text-overflow: ellipsis; }
.elrond-panel .elrond-bar { display: flex; gap: 4px; align-items: center; flex: none; }
.elrond-panel input[type="number"] { width: 58px; box-sizing: border-box; }
.elrond-panel .elrond-bar label { display: flex; gap: 4px; align-items: center; margin-left: auto; }
.elrond-panel ::placeholder { color: inherit; opacity: 0.8; }
.elrond-panel ul { list-style: none; margin: 0; padding: 0; overflow: auto; flex: 1; min-height: 0;
  overscroll-behavior: contain; }
.elrond-panel li { display: flex; gap: 6px; align-items: center; padding: 2px 0; }
.elrond-panel li + li { border-top: 1px solid var(--border-color, #4e4e4e); }
.elrond-panel .elrond-lines { flex: 1; min-width: 0; }
.elrond-panel .elrond-line { display: flex; gap: 5px; align-items: center; height: ${LINE_HEIGHT}px; }
.elrond-panel li input[type="text"] { flex: 1 1 70px; }
.elrond-panel li input[type="range"] { flex: 1 1 50px; min-width: 40px; accent-color: var(--p-primary-color, #3b82f6); }
.elrond-panel .elrond-index { width: 20px; text-align: right; }
.elrond-panel .elrond-index, .elrond-panel .elrond-score { font-variant-numeric: tabular-nums; }
.elrond-panel .elrond-star, .elrond-panel .elrond-more { border: none; background: none; padding: 0 3px; }
.elrond-panel .elrond-star { font-size: 15px; }
.elrond-panel img { border-radius: 3px; }
.elrond-panel [role="status"] { flex: none; }
.elrond-panel [hidden] { display: none; }
`;

/** An element with properties, attributes (names with a dash) and children. */
function make(tag, settings = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(settings)) {
    if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

/** The panels of all nodes that are in the workflow. */
function panels() {
  return allNodes().flatMap((node) => node.elrondPanel ?? []);
}

async function ask(path, change) {
  const options = change && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(change),
  };
  const reply = await api.fetchApi(path, options);
  // A proxy, or a server that is starting, answers with a page.
  const answer = await reply.json().catch(() => ({ error: `ComfyUI's server answered ${reply.status}: look at its log.` }));
  if (answer.error) throw new Error(answer.error);
  return answer;
}

/** "0: 0.5, 3: -0.2" as a Map; what cannot be read is left out, since the server says so anyway. */
export function parse(text) {
  const found = new Map();
  for (const part of String(text ?? "").split(/[,;\n]/)) {
    const [index, value] = part.split(/[:=]/).map((piece) => Number(piece.trim() || NaN));
    if (Number.isInteger(index) && index >= 0 && Number.isFinite(value)) found.set(index, value);
  }
  return found;
}

/** The inverse of `parse`. */
export function format(strengths) {
  return [...strengths].sort((a, b) => a[0] - b[0]).map(([index, value]) => `${index}: ${value}`).join(", ");
}

class Panel {
  constructor(node) {
    this.node = node;
    this.steers = node.comfyClass === APPLY;
    this.file = null; // what /elrond/directions said
    this.problem = ""; // why there is no file
    this.asked = 0;
    this.build();
    const height = () => this.height();
    this.widget = node.addDOMWidget("elrond_panel", "elrond_panel", this.root, {
      serialize: false,
      getMinHeight: height,
      getMaxHeight: height,
    });
    this.widget.serialize = false;
    this.listen();
  }

  /** What survives in the workflow, beside the widgets. */
  get kept() {
    return (this.node.properties.elrond ??= {});
  }

  /** The widgets whose values count for an input of this node, one a use of the subgraph; null where a node feeds it. */
  effective(name) {
    return [...new Set(pathsTo(this.node.graph).map((path) => effectiveWidget(this.node, name, path)))];
  }

  /** The widget that the sliders write to; null if there is not just one. */
  get strengths() {
    const widgets = this.effective("strengths");
    return widgets.length === 1 ? widgets[0] : null;
  }

  get unit() {
    return this.effective("unit")[0]?.value;
  }

  /** The widgets that name the file: of this node, or of the one that the directions come from; one a use. */
  get names() {
    const found = new Set();
    for (const path of pathsTo(this.node.graph)) {
      const loader = this.steers ? feeding(this.node, "directions", path) : { node: this.node, path };
      if (loader?.node.comfyClass === LOAD) found.add(effectiveWidget(loader.node, "name", loader.path));
    }
    return [...found];
  }

  height() {
    if (!this.kept.open) return CLOSED_HEIGHT;
    const rows = Math.max(1, Math.min(this.file ? this.file.directions.length : 0, MOST_ROWS));
    return CLOSED_HEIGHT + 52 + rows * this.rowHeight;
  }

  get rowHeight() {
    return (this.steers ? 2 : 1) * LINE_HEIGHT + 5;
  }

  build() {
    this.head = make("button", { type: "button", className: "elrond-head", onclick: () => this.toggle() });
    this.list = make("ul", { "aria-label": "Directions" });
    // Where the frontend lays nodes out by their content, the list itself must be limited.
    this.list.style.maxHeight = `${MOST_ROWS * this.rowHeight}px`;
    this.status = make("div", { role: "status" });
    this.starred = make("input", { type: "checkbox", onchange: () => this.draw() });
    this.bar = make("div", { className: "elrond-bar" });
    if (this.steers) {
      this.ends = this.makeEnds("the sliders");
      this.bar.append(
        ...this.ends,
        make("button", {
          type: "button",
          textContent: "Randomise",
          title: "A random strength for every direction that is switched on",
          onclick: () => this.randomise(),
        }),
        make("button", {
          type: "button",
          textContent: "Off",
          title: "Switch all off; index and strength act again",
          onclick: () => this.strengths && this.write(new Map()),
        }),
      );
    }
    this.bar.append(
      make("label", { title: "Show starred directions only" }, this.starred, " ★ only"),
      make("button", {
        type: "button",
        textContent: "↻",
        title: "Look at the files again",
        "aria-label": "Look at the files again",
        onclick: () => this.refresh(true),
      }),
    );
    this.root = make("div", { className: "elrond-panel" }, this.head, this.bar, this.list, this.status);
    // Delete in a slider must not delete the node; shortcuts with Ctrl, such as queueing, still work.
    this.root.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
    });
    this.root.addEventListener("pointerdown", (event) => event.stopPropagation());
  }

  /** Two fields for the lowest and the highest strength of one slider, or of all that have none of their own. */
  makeEnds(whose, index) {
    return ["Lowest", "Highest"].map((end, place) => {
      const label = `${end} strength of ${whose}`;
      const onchange = (event) => this.setRange(place, event.target.valueAsNumber, index);
      return make("input", { type: "number", step: "any", title: label, "aria-label": label, onchange });
    });
  }

  listen() {
    const { node } = this;
    const chain = (name, after) => {
      const before = node[name];
      node[name] = function (...values) {
        const result = before?.apply(this, values);
        after();
        return result;
      };
    };
    chain("onConfigure", () => this.later());
    chain("onConnectionsChange", () => this.later());
    this.later();
  }

  /** Refresh once whatever is going on is over: a node is told of its links one by one. */
  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.refresh(), 0);
  }

  /** What the panel shows of widgets that others may change: which files, and which strengths. */
  get namesNow() {
    return JSON.stringify(this.names.map((widget) => widget?.value));
  }

  get valuesNow() {
    return this.steers && JSON.stringify([this.effective("strengths").map((widget) => widget?.value), this.unit]);
  }

  /** Follow the values, whoever changed them; what is shown already stays, with what is said beside it. */
  look() {
    if (this.namesNow !== this.namesShown) this.later();
    else if (this.valuesNow !== this.valuesShown) this.draw();
  }

  async refresh(anew = false) {
    // A node that was removed, or is being moved into a subgraph, has no graph.
    if (!this.node.graph) return;
    this.namesShown = this.namesNow;
    const widgets = this.names;
    const names = new Set(widgets.map((widget) => widget?.value));
    const [name] = names;
    const asked = ++this.asked;
    let said = "";
    let file = null;
    try {
      if (anew && widgets.length) {
        const values = (await ask("/elrond/files")).names;
        for (const widget of widgets) if (widget?.options) widget.options.values = values;
      }
      if (names.size > 1) said = "Each use of this subgraph has a file of its own; look at one outside of it.";
      else if (name) file = await ask(`/elrond/directions?name=${encodeURIComponent(name)}`);
      else if (widgets.length && !widgets[0]) said = "The file's name comes from another node.";
      else said = this.steers ? "Connect Load Directions to see its directions here." : "No file yet.";
    } catch (error) {
      said = error.message;
    }
    // A slower answer to an earlier question is out of date.
    if (asked !== this.asked) return;
    this.file = file;
    this.problem = said;
    this.draw();
    this.fit();
  }

  toggle() {
    this.kept.open = !this.kept.open;
    if (this.kept.open) {
      if (this.steers) this.node.setSize([Math.max(this.node.size[0], LEAST_WIDTH), this.node.size[1]]);
      // It may grow over the node below.
      app.canvas?.bringToFront?.(this.node);
    }
    this.draw();
    this.fit(true);
    if (this.kept.open) this.refresh(true);
  }

  fit(shrink = false) {
    const [width, least] = this.node.computeSize();
    const height = shrink ? least : Math.max(this.node.size[1], least);
    if (height !== this.node.size[1]) this.node.setSize([Math.max(width, this.node.size[0]), height]);
    this.node.setDirtyCanvas?.(true, true);
  }

  /** Both ends of a slider, or of all that have none of their own. */
  range(index) {
    const reach = this.unit === "absolute" ? 60 : 1;
    return [...(this.kept.ranges?.[index] ?? this.kept.range ?? [-reach, reach])];
  }

  /** Where a slider that is off stands: where it was left, or as near to 0 as it goes. */
  rest(index) {
    const [lowest, highest] = this.range(index);
    return this.kept.values?.[index] ?? Math.min(Math.max(0, lowest), highest);
  }

  setRange(place, value, index) {
    const range = this.range(index);
    range[place] = value;
    const good = range[0] < range[1];
    if (good && index === undefined) this.kept.range = range;
    else if (good) this.kept.ranges = { ...this.kept.ranges, [index]: range };
    this.draw(good ? "" : "The lowest strength must be below the highest.");
    this.node.graph?.change?.();
  }

  /** Write strengths to the node's widget; all else follows from it. */
  write(strengths) {
    const text = format(strengths);
    const widget = this.strengths;
    if (widget.value !== text) {
      widget.value = text;
      widget.callback?.(text);
      this.node.graph?.change?.();
    }
    this.draw();
  }

  randomise() {
    const chosen = [...parse(this.strengths?.value).keys()];
    if (!chosen.length) return this.draw("Switch on the directions to randomise first.");
    const drawn = (index) => {
      const [lowest, highest] = this.range(index);
      return round(lowest + (highest - lowest) * Math.random());
    };
    this.write(new Map(chosen.map((index) => [index, drawn(index)])));
  }

  async keep(change) {
    try {
      this.file = await ask("/elrond/directions", { name: this.file.name, ...change });
      this.draw();
      panels().forEach((panel) => panel !== this && panel.file?.name === this.file.name && panel.later());
    } catch (error) {
      this.draw(error.message);
    }
  }

  draw(said = this.problem) {
    this.valuesShown = this.valuesNow;
    const open = Boolean(this.kept.open);
    const count = this.file?.directions.length;
    this.head.textContent = `${open ? "▾" : "▸"} ${count ? `${count} directions of “${this.file.concept}”` : "Directions"}`;
    this.head.setAttribute("aria-expanded", String(open));
    for (const part of [this.bar, this.list, this.status]) part.hidden = !open;
    if (!open) return;
    const on = this.steers ? parse(this.strengths?.value) : new Map();
    if (this.steers) this.range().forEach((end, place) => (this.ends[place].value = end));
    const some = (this.file?.directions ?? []).filter((entry) => entry.star || !this.starred.checked);
    this.arrange(some, on);
    const beyond = count === undefined ? [] : [...on.keys()].filter((index) => index >= count);
    if (!said && beyond.length) said = `This file has no direction ${beyond.join(", ")}.`;
    if (!said && this.steers && !this.strengths) {
      const one = this.effective("strengths").length === 1;
      said = one
        ? "The strengths come from another node, so the sliders are off."
        : "Each use of this subgraph has strengths of its own: set them on its face.";
    }
    if (!said && this.steers && count && !on.size) said = "No slider is on: index and strength are used.";
    this.status.textContent = said;
    this.status.title = said;
  }

  /** Rows are updated where they are, so that the one in use keeps the focus. */
  arrange(entries, on) {
    const rows = new Map([...this.list.children].map((row) => [Number(row.dataset.index), row]));
    const wanted = entries.map((entry) => {
      const row = rows.get(entry.index) ?? this.row(entry.index);
      this.fill(row, entry, on);
      return row;
    });
    if (wanted.length !== this.list.children.length || wanted.some((row, i) => row !== this.list.children[i])) {
      this.list.replaceChildren(...wanted);
    }
  }

  row(index) {
    const parts = {};
    parts.star = make("button", {
      type: "button",
      className: "elrond-star",
      onclick: () => this.keep({ index, star: !this.file.directions[index].star }),
    });
    const height = this.rowHeight - 5;
    const title = "Lowest, middle and highest strength of the last Direction Sweep";
    parts.picture = make("img", { height, title, loading: "lazy" });
    parts.label = make("input", {
      type: "text",
      maxLength: 100,
      placeholder: `direction ${index}`,
      onchange: (event) => this.keep({ index, label: event.target.value.trim() }),
    });
    parts.score = make("span", { className: "elrond-score" });
    const number = make("span", { className: "elrond-index", textContent: index });
    const line = (...children) => make("div", { className: "elrond-line" }, ...children);
    const lines = [line(number, parts.star, parts.label, parts.score)];
    if (this.steers) {
      const slide = (event) => this.slide(index, event.target.valueAsNumber);
      parts.on = make("input", { type: "checkbox", onchange: (event) => this.switch(index, event.target.checked) });
      parts.slider = make("input", { type: "range", oninput: slide });
      parts.value = make("input", { type: "number", step: "any", onchange: slide });
      parts.more = make("button", { type: "button", className: "elrond-more", textContent: "⋯" });
      parts.ends = this.makeEnds(`direction ${index}`, index);
      const own = line("ends ", ...parts.ends);
      own.hidden = true;
      parts.more.onclick = () => {
        own.hidden = !own.hidden;
        parts.more.setAttribute("aria-expanded", String(!own.hidden));
      };
      parts.more.setAttribute("aria-expanded", "false");
      lines.push(line(parts.on, parts.slider, parts.value, parts.more), own);
    }
    const row = make("li", {}, parts.picture, make("div", { className: "elrond-lines" }, ...lines));
    row.dataset.index = index;
    row.parts = parts;
    return row;
  }

  fill({ parts }, entry, on) {
    const { index, label, star, score, thumbnail } = entry;
    const title = label || `direction ${index}`;
    parts.star.textContent = star ? "★" : "☆";
    parts.star.setAttribute("aria-pressed", String(star));
    parts.star.setAttribute("aria-label", `Star ${title}`);
    parts.picture.hidden = !thumbnail;
    parts.picture.alt = `What ${title} does`;
    const address = thumbnail ? api.apiURL(thumbnail) : "";
    if (thumbnail && parts.picture.getAttribute("src") !== address) parts.picture.src = address;
    if (document.activeElement !== parts.label) parts.label.value = label;
    parts.label.setAttribute("aria-label", `Name of direction ${index}`);
    parts.score.textContent = score.toPrecision(2);
    parts.score.title = `${this.file.score_name} ${score}`;
    if (!this.steers) return;
    const [lowest, highest] = this.range(index);
    const value = on.get(index) ?? this.rest(index);
    parts.on.checked = on.has(index);
    parts.on.setAttribute("aria-label", `Use ${title}`);
    Object.assign(parts.slider, { min: lowest, max: highest, step: (highest - lowest) / 200 });
    parts.slider.value = value;
    parts.slider.setAttribute("aria-label", `Strength of ${title}`);
    if (document.activeElement !== parts.value) parts.value.value = round(value);
    parts.value.setAttribute("aria-label", `Exact strength for ${title}`);
    [lowest, highest].forEach((end, place) => (parts.ends[place].value = end));
    parts.more.title = `Ends of the slider of ${title}`;
    parts.more.setAttribute("aria-label", parts.more.title);
    for (const part of [parts.on, parts.slider, parts.value]) part.disabled = !this.strengths;
  }

  switch(index, on) {
    const strengths = parse(this.strengths.value);
    if (on) strengths.set(index, round(this.rest(index)));
    else {
      // Where the slider stood, for when it is switched on again.
      this.kept.values = { ...this.kept.values, [index]: strengths.get(index) };
      strengths.delete(index);
    }
    this.write(strengths);
  }

  slide(index, value) {
    if (!Number.isFinite(value)) return this.draw("A strength is a number.");
    this.write(parse(this.strengths.value).set(index, round(value)));
  }
}

function round(value) {
  return Number(value.toFixed(4));
}

/** A list that can scroll does; the canvas, which listens before the list is asked, does not zoom. */
function scrollLists(event) {
  const list = event.target.closest?.(".elrond-panel ul");
  if (list && list.scrollHeight > list.clientHeight && !event.ctrlKey && !event.metaKey) event.stopPropagation();
}

app.registerExtension({
  name: "elrond.panel",
  setup() {
    document.head.append(make("style", { textContent: STYLE }));
    window.addEventListener("wheel", scrollLists, { capture: true, passive: true });
    // A graph that ran may have saved directions or made thumbnails.
    api.addEventListener("execution_success", () => panels().forEach((panel) => panel.kept.open && panel.refresh(true)));
    setInterval(() => panels().forEach((panel) => panel.look()), LOOK_EVERY);
  },
  nodeCreated(node) {
    if (node.comfyClass === LOAD || node.comfyClass === APPLY) node.elrondPanel = new Panel(node);
  },
});
