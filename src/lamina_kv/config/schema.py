"""The tree as a JSON Schema, with which editors complete and check a configuration file."""

from __future__ import annotations

from typing import Any

from lamina_kv.config.tree import Config
from lamina_kv.tiers import KINDS

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema of a file that ``LAMINA_CONFIG`` names.

    It accepts whatever :func:`~lamina_kv.config.load_config` accepts. What depends on several keys
    at once, or on how a text is made, only that function finds.
    """
    schema = Config.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    kinds = []
    for name, kind in KINDS.items():
        one = kind.config.model_json_schema()
        definitions |= one.pop("$defs", {})
        one["required"] = ["kind", *one.get("required", ())]
        one["properties"]["kind"] = {"const": name}
        definitions[one["title"]] = one
        kinds.append({"$ref": f"#/$defs/{one['title']}"})
    schema["properties"]["tiers"]["items"] = {"oneOf": kinds}
    return {"$schema": _DIALECT, **schema, "title": "Lamina"}
