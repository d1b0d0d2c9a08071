"""What newer hosts know about a node's schema and older ones do not."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io


def search_aliases(*words: str) -> dict[str, Any]:
    """Other words under which a node is found, as an argument of `io.Schema`; empty where the host does not take it."""
    known = any(field.name == "search_aliases" for field in dataclasses.fields(io.Schema))
    return {"search_aliases": list(words)} if known else {}
