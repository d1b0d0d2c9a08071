// Graphs that version 0.1.0 saved: a field that a node did not have then is set to what the node did then.

import { app } from "../../scripts/app.js";
import { widgetOf } from "./graph.js";
import { chain } from "./parts.js";

// By node, how many values it saved, and the fields that are new.
const THEN = {
  ElrondFitWords: [3, { pairs: "guessed" }],
  ElrondLabelDirections: [4, { pairs: "guessed" }],
};

app.registerExtension({
  name: "elrond.saved",
  nodeCreated(node) {
    const [count, values] = THEN[node.comfyClass] ?? [];
    if (!values) return;
    chain(node, "onConfigure", (saved) => {
      if (saved?.widgets_values?.length !== count) return;
      for (const [name, value] of Object.entries(values)) {
        const widget = widgetOf(node, name);
        if (widget) widget.value = value;
      }
    });
  },
});
