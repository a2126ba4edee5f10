"""The configuration table for people, made from the tree itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

from pydantic.fields import FieldInfo

from lamina_kv.config.tree import TIERS_WORDS, Config, section_of
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.config import TierConfig
from lamina_kv.values import SIZE, Kind, Section, choice, format_size


class Row(NamedTuple):
    """One key, each cell in Markdown.

    Attributes:
        key: the key, and behind it kinds of tier if not all have it.
        words: what it may be.
        default: what it is if it is not given.
        meaning: what it does.
    """

    key: str
    words: str
    default: str
    meaning: str

    @property
    def name(self) -> str:
        """The key as it is written; an entry of a list has ``[]``."""
        return self.key.split("`")[1]


def rows() -> list[Row]:
    """Every key, in the order of the tree."""
    return [*_rows(Config, "")]


def table() -> str:
    """The configuration table in Markdown: one line for each key, in the order of the tree."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    lines += (f"| {' | '.join(row)} |" for row in rows())
    return "\n".join(lines) + "\n"


def _rows(section: type[Section], prefix: str) -> Iterator[Row]:
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            if field.description:
                words = "null or the keys below"
                yield Row(f"`{prefix}{name}`", words, "`null`", field.description)
            yield from _rows(inner, f"{prefix}{name}.")
        elif section is Config and name == "tiers":
            below = "Every entry has the keys below; those that only one kind has name it."
            yield Row("`tiers`", TIERS_WORDS, "`[]`", f"{field.description} {below}")
            yield from _tier_rows()
        else:
            yield _row(f"`{prefix}{name}`", field)


def _tier_rows() -> Iterator[Row]:
    """The keys of an entry of ``tiers``: those of every kind, then those of some, with their
    kinds."""
    for name, field in TierConfig.model_fields.items():
        key, words, default, meaning = _row(f"`tiers[].{name}`", field)
        yield Row(key, choice(*KINDS).words if name == "kind" else words, default, meaning)
    own: dict[Row, list[str]] = {}
    for kind_name, kind in KINDS.items():
        for name, field in kind.config.model_fields.items():
            if name not in TierConfig.model_fields:
                own.setdefault(_row(f"`tiers[].{name}`", field), []).append(kind_name)
    for (key, words, default, meaning), kinds in own.items():
        yield Row(f"{key} ({', '.join(kinds)})", words, default, meaning)


def _row(key: str, field: FieldInfo) -> Row:
    kind = next(item for item in field.metadata if isinstance(item, Kind))
    return Row(key, kind.words, _default(field, kind), field.description or "")


def _default(field: FieldInfo, kind: Kind) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:  # of one key only, a tier's name
        return "the kind"
    # A size may be one of several things that are accepted.
    size = type(field.default) is int and kind.words.endswith(SIZE.words)
    value = format_size(field.default) if size else field.default
    return f"`{json.dumps(value)}`"
