// What the panels share: their look, elements, and questions to the server.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { allNodes } from "./graph.js";

export const LINE_HEIGHT = 24;
export const BAR_HEIGHT = 28;
// Milliseconds between looks at the widgets: a widget on the face of a subgraph calls no node's callback.
export const LOOK_EVERY = 250;
// Milliseconds without a change after which what was done is one step to undo.
const CAPTURE_AFTER = 300;

const STYLE = `
.elrond-panel { display: flex; flex-direction: column; gap: 4px; height: 100%; overflow: hidden; box-sizing: border-box;
  container-type: inline-size;
  color: var(--input-text, #ddd); font: 12px/1.3 system-ui, sans-serif; }
.elrond-panel button, .elrond-panel input, .elrond-panel select { font: inherit; color: inherit; }
.elrond-panel button, .elrond-panel input[type="text"], .elrond-panel input[type="number"], .elrond-panel select {
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px;
  padding: 2px 6px; min-width: 0; }
.elrond-panel button { cursor: pointer; white-space: nowrap; }
.elrond-panel :focus-visible { outline: 2px solid var(--p-primary-color, #3b82f6); outline-offset: -1px; }
.elrond-panel .elrond-head { text-align: left; flex: none; overflow: hidden; text-overflow: ellipsis; }
.elrond-panel .elrond-bar { display: flex; gap: 4px; align-items: center; flex: none; min-width: 0; }
.elrond-panel input[type="number"] { width: 58px; box-sizing: border-box; }
.elrond-panel .elrond-bar label { display: flex; gap: 4px; align-items: center; min-width: 0; white-space: nowrap; }
.elrond-panel .elrond-bar select { flex: 1; }
.elrond-panel .elrond-right { margin-left: auto; }
.elrond-panel ::placeholder { color: inherit; opacity: 0.8; }
.elrond-panel .elrond-columns { display: flex; justify-content: space-between; gap: 12px; flex: none; }
.elrond-panel .elrond-columns span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
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
.elrond-panel .elrond-got { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.elrond-panel img { border-radius: 3px; }
.elrond-panel [role="status"] { flex: none; }
.elrond-panel [hidden] { display: none; }
/* As narrow as App mode's inputs. */
@container (max-width: 340px) {
  .elrond-panel li img { width: 66px; height: auto; }
  .elrond-panel .elrond-index { display: none; }
}
`;

/** An element with properties, attributes (names with a dash) and children. */
export function make(tag, settings = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(settings)) {
    if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

/** The box of a panel. Delete in a slider must not delete the node; shortcuts with Ctrl, such as queueing, still work. */
export function box(...children) {
  const root = make("div", { className: "elrond-panel" }, ...children);
  root.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
  root.addEventListener("pointerdown", (event) => event.stopPropagation());
  return root;
}

/** Puts a box on a node as a widget that is no value of the graph. */
export function place(node, name, root, height) {
  const widget = node.addDOMWidget(name, name, root, { serialize: false, getMinHeight: height, getMaxHeight: height });
  widget.serialize = false;
  placed.add({ node, name, root });
  chain(node, "onRemoved", () => placed.forEach((entry) => entry.root === root && placed.delete(entry)));
  return widget;
}

// The boxes that were placed.
const placed = new Set();

/** When a graph is loaded in App mode, as undo does, the hidden canvas takes the boxes from the app. This puts them back. */
function putIntoApp() {
  if (!document.querySelector("[data-testid=app-mode-widget-item]")) return;
  const nodes = new Set(allNodes());
  for (const { node, name, root } of placed) {
    if (!nodes.has(node)) continue;
    const key = `${node.graph.id}:${node.id}:${name}`;
    const slot = document.querySelector(`[data-testid=app-mode-widget-item][data-widget-key="${key}"] [node-type]`);
    if (slot && !slot.contains(root)) slot.replaceChildren(root);
  }
}

/** Makes a node as tall as its content needs, or shrinks it to that. */
export function fit(node, shrink = false) {
  const [width, least] = node.computeSize();
  const height = shrink ? least : Math.max(node.size[1], least);
  if (height !== node.size[1]) node.setSize([Math.max(width, node.size[0]), height]);
  node.setDirtyCanvas?.(true, true);
}

let capture = 0;

/** Tells the editor that there is something to save, and after a pause to undo: it looks by itself after a click only. */
export function changed(node) {
  node.graph?.change?.();
  clearTimeout(capture);
  capture = setTimeout(() => {
    const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
    if (tracker?.captureCanvasState) tracker.captureCanvasState();
    else tracker?.checkState?.();
  }, CAPTURE_AFTER);
}

/** Calls a function of ours after one of the node's. */
export function chain(node, name, after) {
  const before = node[name];
  node[name] = function (...values) {
    const result = before?.apply(this, values);
    after(...values);
    return result;
  };
}

export async function ask(path, change) {
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

/** A list that can scroll does; the canvas, which listens before the list is asked, does not zoom. */
function scrollLists(event) {
  const list = event.target.closest?.(".elrond-panel ul");
  if (list && list.scrollHeight > list.clientHeight && !event.ctrlKey && !event.metaKey) event.stopPropagation();
}

app.registerExtension({
  name: "elrond.parts",
  setup() {
    document.head.append(make("style", { textContent: STYLE }));
    setInterval(putIntoApp, LOOK_EVERY);
    window.addEventListener("wheel", scrollLists, { capture: true, passive: true });
  },
});
