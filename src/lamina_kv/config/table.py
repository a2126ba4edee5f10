"""The configuration table for people, made from the tree itself."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from lamina_kv.config.tree import TIERS_WORDS, Config, section_of
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.config import TierConfig
from lamina_kv.values import SIZE, Kind, Section, choice, format_size


def table() -> str:
    """The configuration table in Markdown: one line for each key, in the order of the tree."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    lines += (f"| {' | '.join(cells)} |" for cells in _rows(Config, ""))
    return "\n".join(lines) + "\n"


def _rows(section: type[Section], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            if field.description:
                yield f"`{prefix}{name}`", "null or the keys below", "`null`", field.description
            yield from _rows(inner, f"{prefix}{name}.")
        elif section is Config and name == "tiers":
            yield "`tiers`", TIERS_WORDS, "`[]`", field.description or ""
            yield from _tier_rows()
        else:
            yield _row(f"`{prefix}{name}`", field)


def _tier_rows() -> Iterator[tuple[str, str, str, str]]:
    """The keys of an entry of ``tiers``: those of every kind, then those of some, with their
    kinds."""
    for name, field in TierConfig.model_fields.items():
        key, words, default, meaning = _row(f"`tiers[].{name}`", field)
        yield key, choice(*KINDS).words if name == "kind" else words, default, meaning
    own: dict[tuple[str, str, str, str], list[str]] = {}
    for kind_name, kind in KINDS.items():
        for name, field in kind.config.model_fields.items():
            if name not in TierConfig.model_fields:
                own.setdefault(_row(f"`tiers[].{name}`", field), []).append(kind_name)
    for (key, words, default, meaning), kinds in own.items():
        yield f"{key} ({', '.join(kinds)})", words, default, meaning


def _row(key: str, field: FieldInfo) -> tuple[str, str, str, str]:
    kind = next(item for item in field.metadata if isinstance(item, Kind))
    return key, kind.words, _default(field, kind), field.description or ""


def _default(field: FieldInfo, kind: Kind) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:  # of one key only, a tier's name
        return "the kind"
    # A size may be one of several things that are accepted.
    size = type(field.default) is int and kind.words.endswith(SIZE.words)
    value = format_size(field.default) if size else field.default
    return f"`{json.dumps(value)}`"
