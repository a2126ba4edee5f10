"""What a chunk is called in stores that find chunks by key, and what stands beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from lamina_kv.plan import ChunkKey

ABOUT = "about.json"
"""In the place of a chunk: what a namespace stands for."""

_OBJECT_NAME = re.compile(r"([0-9a-f]{40})\.(\d{1,9})")


def object_name(key: ChunkKey, shard: int) -> str:
    """The last part of a chunk's name."""
    return f"{key.hex()}.{shard}"


def parse_object_name(name: str) -> tuple[ChunkKey, int] | None:
    """Key and shard in what :func:`object_name` made; None if it did not make this."""
    match = _OBJECT_NAME.fullmatch(name)
    return (ChunkKey(bytes.fromhex(match[1])), int(match[2])) if match else None


def object_path(namespace: str, key: ChunkKey, shard: int) -> str:
    """A chunk's name where names are paths: below its namespace, in one of 256 folders."""
    name = object_name(key, shard)
    return f"{namespace}/{name[:2]}/{name}"


def parse_object_path(path: str) -> tuple[str, ChunkKey, int] | None:
    """Namespace, key and shard in what :func:`object_path` made; None if it did not make this."""
    namespace, _, rest = path.partition("/")
    found = parse_object_name(rest.rpartition("/")[2])
    if found is None or object_path(namespace, *found) != path:
        return None
    return (namespace, *found)


def parse_about(content: bytes | str) -> Mapping[str, str]:
    """What an :data:`ABOUT` says; empty if it is none."""
    try:
        said = json.loads(content)
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in said.items()} if isinstance(said, dict) else {}
