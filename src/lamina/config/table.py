"""The configuration table for people, made from the tree itself."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from lamina.config.tree import Config, Section, section_of
from lamina.config.values import SIZE, Kind, format_size


def table() -> str:
    """The configuration table in Markdown: one line for each key, in the order of the tree."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    lines += (f"| {' | '.join(cells)} |" for cells in _rows(Config, ""))
    return "\n".join(lines) + "\n"


def _rows(section: type[Section], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            kind = next(item for item in field.metadata if isinstance(item, Kind))
            yield f"`{prefix}{name}`", kind.words, _default(field, kind), field.description or ""
            continue
        if field.description:
            yield f"`{prefix}{name}`", "null or the keys below", "`null`", field.description
        yield from _rows(inner, f"{prefix}{name}.")


def _default(field: FieldInfo, kind: Kind) -> str:
    if field.is_required():
        return "required"
    # A size may be one of several things that are accepted.
    size = type(field.default) is int and kind.words.endswith(SIZE.words)
    value = format_size(field.default) if size else field.default
    return f"`{json.dumps(value)}`"
