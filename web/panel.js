// A list of the directions of a file, on Load Directions and the nodes that steer along them: names, stars, scores,
// thumbnails, sliders.
//
// Everything it does goes through the nodes' plain widgets and /elrond/…, so graphs work the same without it.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { allNodes, effectiveWidget, feeding, pathsTo } from "./graph.js";
import { BAR_HEIGHT, LINE_HEIGHT, LOOK_EVERY, ask, box, chain, changed, fit, make, place } from "./parts.js";
import { makeWhen } from "./presets.js";
import { format, parse, round } from "./values.js";

const LOAD = "ElrondLoadDirections";
const GUIDE = "ElrondGuideDirections";
const STEERING = ["ElrondApplyDirection", GUIDE];
const CLOSED_HEIGHT = 34;
const LEAST_WIDTH = 360;
const MOST_ROWS = 6;

/** The panels of all nodes that are in the workflow. */
function panels() {
  return allNodes().flatMap((node) => node.elrondPanel ?? []);
}

let lists = 0;

class Panel {
  constructor(node) {
    this.node = node;
    this.steers = STEERING.includes(node.comfyClass);
    this.guides = node.comfyClass === GUIDE;
    this.file = null; // what /elrond/directions said
    this.problem = ""; // why there is no file
    this.asked = 0;
    // A new node shows what there is; one of a saved graph stays as it was saved.
    this.kept.open = true;
    this.build();
    this.widget = place(node, "elrond_panel", this.root, () => this.height());
    // Its title in App mode.
    this.widget.label = "Directions";
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

  /** Start and end of the steering where a direction has none of its own. */
  get usualWindow() {
    return ["start", "end"].map((name, place) => this.effective(name)[0]?.value ?? place);
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
    return CLOSED_HEIGHT + 44 + (this.steers ? 3 : 1) * BAR_HEIGHT + rows * this.rowHeight;
  }

  get rowHeight() {
    return (this.steers ? 2 : 1) * LINE_HEIGHT + 5;
  }

  build() {
    const toggle = () => this.toggle();
    this.head = make("button", { type: "button", className: "elrond-head", "aria-expanded": "true", onclick: toggle });
    this.list = make("ul", { "aria-label": "Directions" });
    // Where the frontend lays nodes out by their content, the list itself must be limited.
    this.list.style.maxHeight = `${MOST_ROWS * this.rowHeight}px`;
    this.status = make("div", { role: "status" });
    this.columns = make("div", { className: "elrond-columns" });
    this.starred = make("input", { type: "checkbox", onchange: () => this.draw() });
    this.bars = [make("div", { className: "elrond-bar" })];
    if (this.steers) {
      this.ends = this.makeEnds("the sliders");
      this.bars[0].append("ends", ...this.ends);
      this.when = makeWhen(this.node, (text) => this.draw(text || this.problem));
      this.bars.push(this.makeRandomiser(), this.when.bar);
    }
    this.bars[0].append(
      make("label", { className: "elrond-right", title: "Show starred directions only" }, this.starred, " ★ only"),
      make("button", {
        type: "button",
        textContent: "↻",
        title: "Look at the files again",
        "aria-label": "Look at the files again",
        onclick: () => this.refresh(true),
      }),
    );
    this.root = box(this.head, ...this.bars, this.columns, this.list, this.status);
  }

  makeRandomiser() {
    const label = "Total strength that Randomise keeps to";
    const title = `${label}: the length of the sum of the directions, in the node's unit. Empty: none.`;
    const onchange = () => {
      this.kept.total = this.total.valueAsNumber > 0 ? this.total.valueAsNumber : undefined;
      this.draw();
      changed(this.node);
    };
    this.total = make("input", { type: "number", min: 0, step: "any", title, "aria-label": label, onchange });
    return make(
      "div",
      { className: "elrond-bar" },
      make("button", {
        type: "button",
        textContent: "Randomise",
        title: "A random strength for every direction that is switched on",
        onclick: () => this.randomise(),
      }),
      make("label", { title }, "to a total of", this.total),
      make("button", {
        type: "button",
        className: "elrond-right",
        textContent: "Off",
        title: "Switch all off; index and strength act again",
        onclick: () => this.strengths && this.write(new Map()),
      }),
    );
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
    chain(this.node, "onConfigure", (saved) => {
      this.configured = true;
      if (saved?.properties?.elrond?.open === undefined) this.kept.open = false;
      this.later();
    });
    chain(this.node, "onConnectionsChange", () => this.later());
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
    const strengths = this.steers && this.effective("strengths").map((widget) => widget?.value);
    return this.steers && JSON.stringify([strengths, this.unit, this.usualWindow]);
  }

  /** Follow the values, whoever changed them; what is shown already stays, with what is said beside it. */
  look() {
    if (this.namesNow !== this.namesShown) this.later();
    else if (this.valuesNow !== this.valuesShown) this.draw();
  }

  async refresh(anew = false) {
    // A node that was removed, or is being moved into a subgraph, has no graph.
    if (!this.node.graph) return;
    if (!this.configured) this.widen();
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
    fit(this.node);
  }

  toggle() {
    this.unfold(!this.kept.open);
    changed(this.node);
    if (this.kept.open) this.refresh(true);
  }

  unfold(open) {
    this.kept.open = open;
    if (open) {
      this.widen();
      // It may grow over the node below.
      app.canvas?.bringToFront?.(this.node);
    }
    this.draw();
    fit(this.node, true);
  }

  widen() {
    if (this.steers && this.node.size[0] < LEAST_WIDTH) this.node.setSize([LEAST_WIDTH, this.node.size[1]]);
  }

  /** Both ends of a slider, or of all that have none of their own: what is usable, where that is known. */
  range(index) {
    // Guidance changes about as much at twice the strength.
    const reach = (this.unit === "absolute" ? 60 : 1) * (this.guides ? 2 : 1);
    return [...(this.kept.ranges?.[index] ?? this.kept.range ?? this.usable(index) ?? [-reach, reach])];
  }

  /** The strengths that Calibrate Directions found usable with Apply Direction, in the node's unit; null if unknown. */
  usable(index) {
    const interval = this.unit === "token norms" && !this.guides ? this.file?.directions[index]?.interval : null;
    return interval && interval[0] < interval[1] ? interval.map(round) : null;
  }

  /** Strengths of equal change, in the node's unit; none where they are not known. */
  stops(index) {
    const stops = (!this.guides && this.file?.directions[index]?.stops) || [];
    if (this.unit === "token norms") return stops.map(round);
    const middle = (stops.length - 1) / 2;
    return this.unit === "absolute" ? [] : stops.map((_, place) => round((place - middle) / middle));
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
    changed(this.node);
  }

  /** Write strengths to the node's widget; all else follows from it. */
  write(strengths) {
    const text = format(strengths);
    const widget = this.strengths;
    if (widget.value !== text) {
      widget.value = text;
      widget.callback?.(text);
      changed(this.node);
    }
    this.draw();
  }

  async randomise() {
    const chosen = parse(this.strengths?.value);
    if (!chosen.size) return this.draw("Switch on the directions to randomise first.");
    for (const [index, entry] of chosen) {
      const [lowest, highest] = this.range(index);
      entry.value = round(lowest + (highest - lowest) * Math.random());
    }
    if (!(this.kept.total > 0)) return this.write(chosen);
    const { file } = this;
    if (!file) return this.draw("A total needs the directions' file: connect Load Directions.");
    const before = this.strengths.value;
    try {
      const name = encodeURIComponent(file.name);
      const { length } = await ask(`/elrond/length?name=${name}&strengths=${encodeURIComponent(format(chosen))}`);
      if (!length) return this.draw("These strengths add up to nothing: move the ends of the sliders.");
      // A slider that was moved in the meantime wins.
      if (this.strengths?.value !== before || this.file !== file) return;
      for (const entry of chosen.values()) entry.value = round((entry.value * this.kept.total) / length);
      this.write(chosen);
    } catch (error) {
      this.draw(error.message);
    }
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
    const names = (this.file?.directions ?? []).flatMap(({ label }) => label || []);
    this.head.textContent =
      `${open ? "▾" : "▸"} ${count ? `${count} directions of “${this.file.concept}”` : "Directions"}` +
      (open || !names.length ? "" : `: ${names.join(", ")}`);
    this.head.setAttribute("aria-expanded", String(open));
    for (const part of [...this.bars, this.columns, this.list, this.status]) part.hidden = !open;
    if (!open) return;
    const on = this.steers ? parse(this.strengths?.value) : new Map();
    if (this.steers) {
      this.when.draw();
      this.range().forEach((end, place) => (this.ends[place].value = end));
      if (document.activeElement !== this.total) this.total.value = this.kept.total ?? "";
    }
    this.columns.replaceChildren(
      ...(count ? ["direction", this.file.score_name] : []).map((text) => make("span", { textContent: text, title: text })),
    );
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
      parts.stops = make("datalist", { id: `elrond-stops-${++lists}` });
      parts.slider = make("input", { type: "range", oninput: slide });
      parts.slider.setAttribute("list", parts.stops.id);
      parts.value = make("input", { type: "number", step: "any", onchange: slide });
      parts.more = make("button", { type: "button", className: "elrond-more", textContent: "⋯" });
      parts.ends = this.makeEnds(`direction ${index}`, index);
      parts.window = this.makeWindow(index);
      const own = [line("ends", ...parts.ends), line("acts from", parts.window[0], "to", parts.window[1])];
      for (const each of own) each.hidden = true;
      parts.more.onclick = () => {
        for (const each of own) each.hidden = !each.hidden;
        parts.more.setAttribute("aria-expanded", String(!own[0].hidden));
      };
      parts.more.setAttribute("aria-expanded", "false");
      lines.push(line(parts.on, parts.slider, parts.stops, parts.value, parts.more), ...own);
    }
    const row = make("li", {}, parts.picture, make("div", { className: "elrond-lines" }, ...lines));
    row.dataset.index = index;
    row.parts = parts;
    return row;
  }

  /** Two fields for the start and the end of one direction; empty where it follows the node's. */
  makeWindow(index) {
    return ["Start", "End"].map((end, place) => {
      const label = `${end} of direction ${index}`;
      const title = `${label}, as a share of the sampling; empty: the node's own ${end.toLowerCase()}`;
      const onchange = (event) => this.setWindow(index, place, event.target.valueAsNumber);
      return make("input", { type: "number", min: 0, max: 1, step: 0.05, title, "aria-label": label, onchange });
    });
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
    parts.score.textContent = Number(score.toPrecision(2));
    parts.score.title = `${this.file.score_name} ${score}`;
    if (!this.steers) return;
    const [lowest, highest] = this.range(index);
    const value = on.get(index)?.value ?? this.rest(index);
    const window = this.window(index, on);
    parts.on.checked = on.has(index);
    parts.on.setAttribute("aria-label", `Use ${title}`);
    // Stops lie on no grid.
    const step = this.stops(index).length ? "any" : (highest - lowest) / 200;
    Object.assign(parts.slider, { min: lowest, max: highest, step });
    parts.slider.value = value;
    this.fillStops(parts, index);
    parts.slider.setAttribute("aria-label", `Strength of ${title}`);
    if (document.activeElement !== parts.value) parts.value.value = round(value);
    parts.value.setAttribute("aria-label", `Exact strength for ${title}`);
    [lowest, highest].forEach((end, place) => (parts.ends[place].value = end));
    parts.window.forEach((field, place) => {
      field.placeholder = round(this.usualWindow[place]);
      if (document.activeElement !== field) field.value = window?.[place] ?? "";
    });
    parts.more.textContent = window ? window.join("–") : "⋯";
    parts.more.title = `Ends of the slider, and start and end, of ${title}`;
    parts.more.setAttribute("aria-label", parts.more.title);
    for (const part of [parts.on, parts.slider, parts.value, ...parts.window]) part.disabled = !this.strengths;
  }

  fillStops(parts, index) {
    const stops = this.stops(index);
    const shown = JSON.stringify(stops);
    if (parts.shownStops === shown) return;
    parts.shownStops = shown;
    parts.stops.replaceChildren(...stops.map((stop) => make("option", { value: stop })));
    const ends = stops.length && `Usable from ${stops[0]} to ${stops.at(-1)}; equal changes between the marks.`;
    parts.slider.title = ends || "";
  }

  switch(index, on) {
    const strengths = parse(this.strengths.value);
    if (on) strengths.set(index, { value: round(this.rest(index)), window: this.window(index) });
    else {
      // Where the slider stood, for when it is switched on again.
      const { value, window } = strengths.get(index);
      this.kept.values = { ...this.kept.values, [index]: value };
      this.kept.windows = { ...this.kept.windows, [index]: window };
      strengths.delete(index);
    }
    this.write(strengths);
  }

  slide(index, value) {
    if (!Number.isFinite(value)) return this.draw("A strength is a number.");
    const strengths = parse(this.strengths.value);
    this.write(strengths.set(index, { value: round(value), window: this.window(index, strengths) }));
  }

  /** Start and end of a direction, if it has its own: in the text if it is on, or as they were when it was last. */
  window(index, on = parse(this.strengths?.value)) {
    return (on.has(index) ? on.get(index).window : this.kept.windows?.[index]) ?? null;
  }

  setWindow(index, place, share) {
    const strengths = parse(this.strengths.value);
    let window = null;
    if (!Number.isNaN(share)) {
      window = [...(this.window(index, strengths) ?? this.usualWindow)].map(round);
      window[place] = round(share);
      const [start, end] = window;
      if (!(start >= 0 && start < end && end <= 1)) return this.draw("A direction starts before it ends, between 0 and 1.");
    }
    if (strengths.has(index)) return this.write(strengths.set(index, { ...strengths.get(index), window }));
    this.kept.windows = { ...this.kept.windows, [index]: window };
    this.draw();
    changed(this.node);
  }
}

app.registerExtension({
  name: "elrond.panel",
  setup() {
    // A graph that ran may have saved directions or made thumbnails.
    api.addEventListener("execution_success", () => panels().forEach((panel) => panel.kept.open && panel.refresh(true)));
    setInterval(() => panels().forEach((panel) => panel.look()), LOOK_EVERY);
  },
  nodeCreated(node) {
    if ([LOAD, ...STEERING].includes(node.comfyClass)) node.elrondPanel = new Panel(node);
  },
});
