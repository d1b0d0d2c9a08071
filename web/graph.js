// Which node feeds an input and which value a widget has, across the boundaries of subgraphs.
//
// A node inside a subgraph is one object for every use of that subgraph. A *path* lists the subgraph nodes by which one
// goes from the workflow into the graph of a node, so a node and a path name one node that runs.

import { app } from "../../scripts/app.js";

const root = () => app.rootGraph ?? app.graph;

const linkOf = (graph, id) => graph.getLink?.(id) ?? graph.links.get?.(id) ?? graph.links[id];

/** Every node of the workflow, those in subgraphs too. */
export function allNodes() {
  const graphs = [root(), ...(root().subgraphs?.values() ?? [])];
  return graphs.flatMap((graph) => graph.nodes ?? graph._nodes);
}

/** Every path into a graph; none if it is not part of the workflow. */
export function pathsTo(graph) {
  if (!graph) return [];
  if (graph === root()) return [[]];
  return allNodes()
    .filter((node) => node.subgraph === graph)
    .flatMap((node) => pathsTo(node.graph).map((path) => [...path, node]));
}

/** What a link of a graph comes from: {node, path}, {widget} on the face of a subgraph, or null. */
function origin(graph, id, path) {
  const link = id == null ? null : linkOf(graph, id);
  if (!link) return null;
  if (link.origin_id === graph.inputNode?.id) {
    const face = path.at(-1);
    const input = face?.inputs[link.origin_slot];
    if (!input) return null;
    if (input.link != null) return origin(face.graph, input.link, path.slice(0, -1));
    const widget = input._widget ?? widgetOf(face, input.widget?.name);
    return widget ? { widget } : null;
  }
  const node = graph.getNodeById(link.origin_id);
  if (node?.subgraph) return origin(node.subgraph, node.subgraph.outputs[link.origin_slot]?.linkIds[0], [...path, node]);
  if (node?.type === "Reroute") return origin(graph, node.inputs[0]?.link, path);
  return node ? { node, path } : null;
}

/** The node that feeds an input: {node, path}, or null. */
export function feeding(node, name, path) {
  const input = node.inputs?.find((each) => each.name === name);
  const found = input && node.graph ? origin(node.graph, input.link, path) : null;
  return found?.node ? found : null;
}

export function widgetOf(node, name) {
  return node?.widgets?.find((widget) => widget.name === name);
}

/** The widget whose value counts for an input; null if a node feeds it, or if each use of a subgraph has its own. */
export function onlyWidget(node, name) {
  const widgets = new Set(pathsTo(node.graph).map((path) => effectiveWidget(node, name, path)));
  return widgets.size === 1 ? [...widgets][0] : null;
}

/** The widget whose value counts: the node's own, or the one on the face of a subgraph; null if a node feeds it. */
export function effectiveWidget(node, name, path) {
  const input = node.inputs?.find((each) => each.name === name);
  if (input?.link == null || !node.graph) return widgetOf(node, name) ?? null;
  return origin(node.graph, input.link, path)?.widget ?? null;
}
