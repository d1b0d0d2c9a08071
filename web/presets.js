// Choices by what people want: how far the images of a batch go, and in which part of the sampling a step acts.
//
// They write to the nodes' plain widgets, and follow them: what fits no choice is shown as the user's own numbers.

import { feeding, onlyWidget, pathsTo } from "./graph.js";
import { ask, changed, make } from "./parts.js";

const LOAD = "ElrondLoadDirections";
// Their directions know how far the model's own images vary along them.
const KNOWING = ["ElrondFitResponse", "ElrondFitWords"];
const OWN = "own numbers";
// Share of the sampling that makes the composition: two of four steps (`python -m bench.diversity`).
const COMPOSED = 0.3;

const WHEN = {
  throughout: { start: 0, end: 1 },
  "new composition: first steps": { start: 0, end: COMPOSED },
  "keep the composition: late steps": { start: COMPOSED, end: 1 },
};
const LITTLE = "a little";
const BASE = "as varied as the base model";
const WILD = "wild";
// Multiples of the base model's variety: what is drawn adds to the variety that the images have. How far 0.3 goes on
// the demo's distilled model, docs/panel.md says.
const natural = (strength) => ({ how: "natural", lowest: strength, highest: strength, total: 0 });
const NATURAL = { [LITTLE]: natural(0.1), [BASE]: natural(0.3), [WILD]: natural(0.7) };
// For directions along which that variety is not known.
const spread = (lowest, highest) => ({ how: "spread", lowest, highest, unit: "auto", total: 0 });
const SPREAD = { [LITTLE]: spread(0.1, 0.3), [BASE]: spread(0.3, 0.7), [WILD]: spread(0.7, 1) };

/** A bar with a list of choices. */
class Choice {
  constructor(node, label, title, tables, say) {
    Object.assign(this, { node, tables, say });
    this.select = make("select", { "aria-label": title, title, onchange: () => this.choose(this.select.value) });
    this.own = make("option", { value: OWN, textContent: OWN, disabled: true });
    const options = Object.keys(tables[0]).map((text) => make("option", { value: text, textContent: text }));
    this.select.append(...options, this.own);
    this.bar = make("div", { className: "elrond-bar" }, make("label", { title }, label), this.select);
  }

  /** Show what the widgets say. */
  draw() {
    const fits = (values) => Object.entries(values).every(([name, value]) => onlyWidget(this.node, name)?.value === value);
    const found = this.tables.flatMap((table) => Object.entries(table)).find(([, values]) => fits(values));
    const value = found?.[0] ?? OWN;
    this.own.hidden = value !== OWN;
    if (this.select.value !== value) this.select.value = value;
  }

  async choose(text) {
    const asked = (this.asked = (this.asked ?? 0) + 1);
    const table = this.tables.length > 1 && !(await knowsVariety(this.node)) ? this.tables[1] : this.tables[0];
    // The latest choice wins.
    if (asked !== this.asked) return;
    const values = Object.entries(table[text] ?? {});
    const fed = values.map(([name]) => name).filter((name) => !onlyWidget(this.node, name));
    if (fed.length) {
      this.draw();
      return this.say(`Set ${fed.join(", ")} where they come from: this node's fields are not its own.`);
    }
    for (const [name, value] of values) {
      const widget = onlyWidget(this.node, name);
      if (widget.value === value) continue;
      widget.value = value;
      widget.callback?.(value);
    }
    changed(this.node);
    this.draw();
    this.say(
      table === SPREAD && text === BASE
        ? "How far the model varies along these directions is not known, so this is a guess. Fit Response and Fit Word Directions know it."
        : "",
    );
  }
}

/** Whether the directions of a node know how far the model's images vary along them. */
async function knowsVariety(node) {
  let at = { node, path: pathsTo(node.graph)[0] ?? [] };
  while ((at = feeding(at.node, "directions", at.path))) {
    if (KNOWING.includes(at.node.comfyClass)) return true;
    if (at.node.comfyClass !== LOAD) continue;
    const name = encodeURIComponent(onlyWidget(at.node, "name")?.value ?? "");
    return ask(`/elrond/directions?name=${name}`).then((file) => file.natural, () => false);
  }
  return false;
}

export function makeWhen(node, say) {
  const title = "In which part of the sampling it acts: start and end";
  return new Choice(node, "acts", title, [WHEN], say);
}

export function makeHowFar(node, say) {
  const title = "How far the images go: how, lowest and highest";
  return new Choice(node, "images differ", title, [NATURAL, SPREAD], say);
}
