"""Names of shards, which say what is in them without opening one."""

from __future__ import annotations

import re

_SHARD = re.compile(r"[0-9]{8,}-[0-9]+\.safetensors")


def shard_name(first: int, count: int) -> str:
    """The file name of `count` batches in a row."""
    return f"{first:08d}-{count}.safetensors"


def batches_of(name: str) -> range:
    """The numbers of the batches in a shard, by its file name; none if it is no shard's."""
    if not _SHARD.fullmatch(name):
        return range(0)
    first, count = map(int, name.removesuffix(".safetensors").split("-"))
    return range(first, first + count)
