"""Keeps the workflows and schemas of a release for tests: `python tests/keep_graphs.py` when a version is released.

They go to `tests/golden/graphs/<version>/`: each workflow as the frontend saves it and as clients send it, and
`schemas.json`, the order of every node's inputs and outputs. Every later release must read such graphs alike.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRAPHS = ROOT / "tests" / "golden" / "graphs"
PARTS = ("required", "optional")
# Choices that are the user's files or the host's own lists, and no promise of the pack.
NOT_OURS = {"ElrondLoadDirections": {"name"}, "ElrondLoadGradients": {"name"}}
HOSTS = {"sampler_name", "scheduler"}


def inputs_of(node: Any) -> list[dict[str, Any]]:
    """A node's inputs in the frontend's order, with what decides whether a saved value still fits."""
    types = node.INPUT_TYPES()
    foreign = HOSTS | NOT_OURS.get(node.GET_SCHEMA().node_id, set())
    out = []
    for part in PARTS:
        for name, (kind, *rest) in (types.get(part) or {}).items():
            extra = rest[0] if rest else {}
            entry = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind}
            options = kind if isinstance(kind, list) else extra.get("options")
            entry |= {key: extra[key] for key in ("min", "max") if key in extra}
            if options and name not in foreign:
                entry["options"] = list(options)
            if kind == "INT" and extra.get("control_after_generate", name in ("seed", "noise_seed")):
                entry["control"] = True
            if part == "optional":
                entry["optional"] = True
            out.append(entry)
    return out


def schema_of(node: Any) -> dict[str, Any]:
    """Inputs and outputs of a node class."""
    outputs = [[entry.display_name, entry.io_type] for entry in node.GET_SCHEMA().outputs]
    return {"inputs": inputs_of(node), "outputs": outputs}


def compact(value: Any) -> str:
    """JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"


def main() -> None:
    """Write the files of the version that `elrond_core` has."""
    sys.path.insert(0, str(ROOT))
    from demo import host
    from elrond_core import __version__

    folder = GRAPHS / __version__
    (folder / "api").mkdir(parents=True, exist_ok=True)
    for source, target in ((ROOT / "example_workflows", folder), (ROOT / "workflows" / "api", folder / "api")):
        for path in sorted(source.glob("*.json")):
            graph = json.loads(path.read_text(encoding="utf-8"))
            (target / path.name).write_text(compact(graph), encoding="utf-8")
    schemas = {node.GET_SCHEMA().node_id: schema_of(node) for node in host.pack().NODES}
    lines = ",\n".join(f"{json.dumps(name)}:{compact(schema).strip()}" for name, schema in sorted(schemas.items()))
    (folder / "schemas.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(f"Kept {len(schemas)} schemas and the workflows in {folder.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
