// Presets on Diversify and a list of what each image of the batch got, to be copied to the sliders of Apply Direction.
//
// The list appears once the node has run: the strengths are drawn on the server, which sends them with its results.

import { app } from "../../scripts/app.js";
import { allNodes, feeding, onlyWidget as one, pathsTo } from "./graph.js";
import { BAR_HEIGHT, LINE_HEIGHT, LOOK_EVERY, box, chain, changed, fit, make, place } from "./parts.js";
import { makeHowFar, makeWhen } from "./presets.js";

const DIVERSIFY = "ElrondDiversify";
const APPLY = "ElrondApplyDirection";
const CLOSED_HEIGHT = 34;
const STATUS_HEIGHT = 52;
const AROUND = 10;
const MOST_ROWS = 6;
const ROW_HEIGHT = LINE_HEIGHT + 5;
// Inputs that both nodes have and that must agree for an image to come out the same.
const SHARED = ["start", "end", "concept"];
const NEW = "new";

class Batch {
  constructor(node) {
    this.node = node;
    this.open = false;
    this.got = null; // what the server sent: a text an image
    this.build();
    chain(node, "onExecuted", (output) => this.show(output));
    // Undo and another tab make the node anew; the frontend still has its results.
    setTimeout(() => {
      this.show(this.stored);
      if (this.node.graph) fit(this.node);
    });
  }

  get stored() {
    const { graph, id } = this.node;
    return graph && (app.nodeOutputs?.[graph.isRootGraph === false ? `${graph.id}:${id}` : id] ?? null);
  }

  show(output) {
    const strengths = output?.elrond_strengths;
    if (!strengths?.length) return;
    this.got = { strengths, summaries: output.elrond_summaries ?? [], unit: output.elrond_unit?.[0] };
    this.draw();
    fit(this.node);
  }

  build() {
    this.presets = [makeHowFar, makeWhen].map((makePreset) => makePreset(this.node, (text) => this.say(text)));
    const chosen = this.presets.map((preset) => preset.bar);
    this.head = make("button", { type: "button", className: "elrond-head", onclick: () => this.toggle() });
    this.target = make("select", { "aria-label": "Where the strengths are copied to" });
    this.bar = make("div", { className: "elrond-bar" }, "Copy to", this.target);
    this.list = make("ul", { "aria-label": "Images" });
    this.list.style.maxHeight = `${MOST_ROWS * ROW_HEIGHT}px`;
    this.status = make("div", { role: "status" });
    this.root = box(...chosen, this.head, this.bar, this.list, this.status);
    const widget = place(this.node, "elrond_batch", this.root, () => this.height());
    widget.label = "How different the images are";
    this.draw();
  }

  height() {
    const presets = AROUND + this.presets.length * BAR_HEIGHT + (this.status.textContent && !this.open ? STATUS_HEIGHT : 0);
    if (!this.got) return presets;
    const rows = Math.min(this.got.strengths.length, MOST_ROWS);
    return presets + CLOSED_HEIGHT - AROUND + (this.open ? 52 + rows * ROW_HEIGHT : 0);
  }

  /** A sentence below, also while the list is closed. */
  say(text) {
    this.status.textContent = text;
    this.status.title = text;
    this.status.hidden = !text && !this.open;
    if (this.node.graph) fit(this.node);
  }

  /** Follow the values, whoever changed them. */
  look() {
    this.presets.forEach((preset) => preset.draw());
    if (this.open) this.drawTargets();
  }

  toggle() {
    this.open = !this.open;
    if (this.open) app.canvas?.bringToFront?.(this.node);
    this.draw();
    fit(this.node, true);
  }

  draw(said = "") {
    this.presets.forEach((preset) => preset.draw());
    this.head.hidden = !this.got;
    for (const part of [this.bar, this.list]) part.hidden = !this.open;
    this.say(said);
    if (!this.got) return;
    this.head.textContent = `${this.open ? "▾" : "▸"} What each image got`;
    this.head.setAttribute("aria-expanded", String(this.open));
    this.list.replaceChildren(...this.got.strengths.map((strengths, image) => this.row(strengths, image)));
    this.drawTargets();
  }

  row(strengths, image) {
    return make(
      "li",
      {},
      make("span", {
        className: "elrond-got",
        textContent: `image ${image}: ${this.got.summaries[image] ?? strengths}`,
        title: `${strengths} in ${this.got.unit}`,
      }),
      make("button", {
        type: "button",
        textContent: "To sliders",
        "aria-label": `Copy the strengths of image ${image} to the sliders`,
        onclick: () => this.copy(image),
      }),
    );
  }

  /** The nodes whose sliders move the same directions. */
  get targets() {
    const source = (node) => feeding(node, "directions", pathsTo(node.graph)[0] ?? [])?.node;
    const mine = source(this.node);
    return allNodes().filter((node) => node.comfyClass === APPLY && mine && source(node) === mine);
  }

  drawTargets() {
    const { targets } = this;
    const shown = targets.map((node) => [`${node.graph.id}:${node.id}`, `${node.title} #${node.id}`]);
    const wanted = JSON.stringify(shown);
    if (wanted === this.shown) return;
    this.shown = wanted;
    const before = this.target.value;
    const options = [...shown, [NEW, "a new Apply Direction"]];
    this.target.replaceChildren(...options.map(([value, textContent]) => make("option", { value, textContent })));
    if (options.some(([value]) => value === before)) this.target.value = before;
  }

  copy(image) {
    this.drawTargets();
    const chosen = this.targets.find((node) => `${node.graph.id}:${node.id}` === this.target.value);
    const node = chosen ?? this.create();
    const mine = (name) => one(this.node, name)?.value;
    const values = {
      strengths: this.got.strengths[image],
      unit: this.got.unit,
      ...Object.fromEntries(SHARED.map((name) => [name, mine(name)])),
    };
    // What one of the two nodes gets from elsewhere cannot be copied.
    const fed = Object.keys(values).filter((name) => values[name] === undefined || !one(node, name));
    if (fed.includes("strengths")) return this.draw(`The strengths of ${node.title} are not its own: they are set elsewhere.`);
    for (const [name, value] of Object.entries(values)) {
      const widget = value === undefined ? null : one(node, name);
      if (!widget || widget.value === value) continue;
      widget.value = value;
      widget.callback?.(value);
    }
    node.elrondPanel?.unfold(true);
    changed(this.node);
    const left = fed.length ? ` Set its ${fed.join(", ")} yourself.` : "";
    this.draw(`${node.title} #${node.id} now has what image ${image} got.${left}`);
  }

  /** A new node beside this one, between the same wires. */
  create() {
    const { graph } = this.node;
    const node = LiteGraph.createNode(APPLY);
    graph.add(node);
    node.pos = [this.node.pos[0], this.node.pos[1] + this.node.size[1] + 60];
    for (const name of ["conditioning", "directions", "mask"]) {
      const input = this.node.inputs.find((each) => each.name === name);
      const link = input?.link == null ? null : (graph.getLink?.(input.link) ?? graph.links[input.link]);
      const slot = node.inputs.findIndex((each) => each.name === name);
      if (!link || slot < 0) continue;
      const origin = graph.getNodeById(link.origin_id);
      if (origin) origin.connect(link.origin_slot, node, slot);
      else graph.inputNode?.slots[link.origin_slot]?.connect(node.inputs[slot], node);
    }
    return node;
  }
}

app.registerExtension({
  name: "elrond.batch",
  setup() {
    const batches = () => allNodes().flatMap((node) => node.elrondBatch ?? []);
    setInterval(() => batches().forEach((batch) => batch.look()), LOOK_EVERY);
  },
  nodeCreated(node) {
    if (node.comfyClass === DIVERSIFY) node.elrondBatch = new Batch(node);
  },
});
