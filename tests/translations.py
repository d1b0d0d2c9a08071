"""Texts of the nodes in other languages: `python tests/translations.py` writes the English ones from the schemas.

`locales/<language>/` holds what ComfyUI's page shows in that language: `nodeDefs.json` names, descriptions and tooltips
of nodes, `main.json` categories and types. Run this after a schema has changed. It prints which English texts changed,
and which texts each language lacks or no longer needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCALES = ROOT / "locales"
# As ComfyUI's page names them.
LANGUAGES = ("zh", "ja", "de", "es")
ENGLISH = "en"

Texts = dict[str, str]


def english(nodes: list[Any]) -> dict[str, Any]:
    """`nodeDefs.json` of node classes, in English."""
    out: dict[str, Any] = {}
    for node in nodes:
        schema = node.GET_SCHEMA()
        entries = [entry for entry in schema.inputs if entry.tooltip]
        out[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {entry.id: {"name": entry.id, "tooltip": entry.tooltip} for entry in entries},
            "outputs": {
                str(place): {"name": entry.display_name, "tooltip": entry.tooltip}
                for place, entry in enumerate(schema.outputs)
            },
        }
    return out


def flat(value: Any, path: str = "") -> Texts:
    """Every text by its path, as in `ElrondDiversify.inputs.count.tooltip`."""
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: text
        for name, part in value.items()
        for key, text in flat(part, f"{path}.{name}" if path else name).items()
    }


def read(language: str, file: str = "nodeDefs") -> dict[str, Any]:
    """A file of a language; empty if there is none."""
    path = LOCALES / language / f"{file}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(language: str, value: dict[str, Any], file: str = "nodeDefs") -> None:
    """Write a file of a language."""
    path = LOCALES / language / f"{file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What a language lacks of the wanted texts, and what it has beside them."""
    wanted_texts, found_texts = flat(wanted), flat(found)
    lines = [f"missing: {path}" for path in wanted_texts if not str(found_texts.get(path) or "").strip()]
    return lines + [f"stale: {path}" for path in found_texts if path not in wanted_texts]


def main() -> int:
    """Write English, compare the others; 1 if any differs."""
    sys.path.insert(0, str(ROOT))
    from demo import host

    before, now = flat(read(ENGLISH)), english(host.pack().NODES)
    write(ENGLISH, now)
    changed = [path for path, text in flat(now).items() if path in before and before[path] != text]
    for path in changed:
        print(f"changed, so translate it again: {path}: {flat(now)[path]}")
    lines = [f"{language}: {line}" for language in LANGUAGES for line in differences(now, read(language))]
    lines += [
        f"{language}: main.json {line}"
        for language in LANGUAGES
        for line in differences(read(ENGLISH, "main"), read(language, "main"))
    ]
    print("\n".join(lines) or "Every language has every text.")
    return int(bool(lines or changed))


if __name__ == "__main__":
    sys.exit(main())
