"""A configuration file with every key in it, made from the tree itself."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from lamina_kv import __version__
from lamina_kv.config.tree import Config, section_of
from lamina_kv.tiers import KINDS
from lamina_kv.values import SIZE, Kind, Section, format_size

_COLUMNS = 100
_HEAD = f"""\
# Lamina {__version__}: every key with its default. To change one, delete the "#" in front of it and
# of the section that it stands in. The environment variable LAMINA_CONFIG of the engine names this
# file; `lamina-kv doctor --config FILE` checks it. Sizes are for each rank.
"""


def example() -> str:
    """A YAML file in which everything is commented out: as it stands it is the default. Without the
    ``#`` in front of keys it has every key, and a tier of every kind."""
    said: set[str] = set()
    return "\n".join([_HEAD, *_section(Config, "", said)]).rstrip() + "\n"


def _section(section: type[Section], indent: str, said: set[str]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _prose(field.description or inner.__doc__ or "", indent, said)
            yield f"{indent}#{name}:"
            yield from _section(inner, f"{indent}  ", said)
        elif section is Config and name == "tiers":
            yield from _prose(field.description or "", indent, said)
            yield f"{indent}#{name}:"
            for kind in KINDS.values():
                yield from _prose(kind.config.__doc__ or "", f"{indent}  ", said)
                yield from _tier(kind.config, f"{indent}  ", said)
        else:
            yield from _leaf(name, field, indent, said)
        if not indent:
            yield ""


def _tier(config: type[Section], indent: str, said: set[str]) -> Iterator[str]:
    kind = config.model_fields["kind"].default
    yield f"{indent}#- kind: {kind}"
    fields = {name: field for name, field in config.model_fields.items() if name != "kind"}
    for name in sorted(fields, key=lambda each: not fields[each].is_required()):
        yield from _leaf(name, fields[name], f"{indent}  ", said, kind)


def _leaf(
    name: str, field: FieldInfo, indent: str, said: set[str], kind: str = ""
) -> Iterator[str]:
    accepted = next(item for item in field.metadata if isinstance(item, Kind))
    yield from _prose(field.description or "", indent, said)
    required = " (required)" if field.is_required() else ""
    words = f"Value: {accepted.words}{required}"
    yield from _prose(words, indent, set())  # whatever stands further up
    yield f"{indent}#{name}: {_value(field, accepted, kind)}"


def _value(field: FieldInfo, accepted: Kind, kind: str) -> str:
    if field.is_required():
        value: Any = (field.examples or [None])[0]
    elif field.default_factory is not None:  # of one key only, a tier's name
        value = kind
    else:
        value = field.default
    if type(value) is int and accepted.words.endswith(SIZE.words):
        value = format_size(value)
    plain = [*value] if isinstance(value, tuple) else value
    # A document of one scalar ends with "...".
    return yaml.safe_dump(plain, default_flow_style=True, width=_COLUMNS).split("\n...")[0].strip()


def _prose(text: str, indent: str, said: set[str]) -> Iterator[str]:
    """Lines of a comment; none if the same stands further up."""
    if text in said:
        return
    said.add(text)
    for line in textwrap.wrap(text, _COLUMNS - len(indent) - 2, break_on_hyphens=False):
        yield f"{indent}# {line}"
