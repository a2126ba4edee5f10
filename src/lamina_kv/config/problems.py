"""What an operator is told about a mistake: the key, what is wrong with it, what would be right."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from itertools import chain

from pydantic_core import ErrorDetails

from lamina_kv.config.tree import TIERS_WORDS, Config, section_of
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.disk.config import DiskConfig
from lamina_kv.values import Section, show

_NO_FETCH_AHEAD = "does not exist any more; `max_inflight` also bounds what is read ahead"
_NO_DECISIONS = (
    "does not exist any more; the logger `lamina_kv.requests` says the same of every request at "
    "level DEBUG"
)


def problem(error: ErrorDetails, given: Mapping[str, object]) -> str:
    """One line for one of pydantic's errors.

    Args:
        error: the error.
        given: the whole tree that was checked.
    """
    name = _name(error["loc"], given)
    value = show(error["input"])
    match error["type"]:
        case "value_error":
            return f"{name}: {error['ctx']['error']}"
        case "missing":
            return f"{name}: is required"
        case "extra_forbidden" | "invalid_key":
            return f"{name}: {_unknown(error['loc'], error['input'])}"
        case _ if error["loc"] == ("tiers",):
            value = type(error["input"]).__name__  # a password may stand in it
            return f"{name}: must be {TIERS_WORDS}, got {value}"
        case _:
            field = Config.model_fields[name]
            inner = ", ".join(_keys(section_of(field.annotation) or Config, ""))
            return f"{name}: must be a section with the keys {inner}, got {value}"


def printable(key: object) -> str:
    """A key as it may stand in a message: on one line, and not without end."""
    name = str(key)
    return name if name.isprintable() and len(name) <= 60 else show(name)


def _name(loc: tuple[int | str, ...], given: Mapping[str, object]) -> str:
    """How messages call a place of the tree. An entry of ``tiers`` goes by its number, and by its
    name if it has one: ``tiers[1].capacity (scratch)``."""
    match loc:
        case ("tiers", int(index), *keys):
            entries = given["tiers"]
            entry = entries[index] if isinstance(entries, list | tuple) else None
            called = entry.get("name", entry.get("kind")) if isinstance(entry, Mapping) else None
            name = ".".join([f"tiers[{index}]", *map(printable, keys)])
            return f"{name} ({printable(called)})" if isinstance(called, str) else name
    return ".".join(map(printable, loc))


def _unknown(loc: tuple[int | str, ...], value: object) -> str:
    """What to say of a key that the tree does not have."""
    match loc:
        case ("disk",):
            return _moved_disk(value)
        case ("tiers", _, "fetch_ahead"):
            return _NO_FETCH_AHEAD
        case ("observe", "decisions"):
            return _NO_DECISIONS
        case ("tiers", _, *keys):
            name = ".".join(["tiers[]", *map(printable, keys)])
        case _:
            name = ".".join(map(printable, loc))
    return f"unknown key; {_suggestion(name)}"


def _moved_disk(value: object) -> str:
    """The former section ``disk`` as an entry of ``tiers``."""
    if value is None:
        return "does not exist any more; leave it out, `tiers` is empty by default"
    old = value if isinstance(value, Mapping) else {}
    entry = {"kind": "disk", **{key: old[key] for key in DiskConfig.model_fields if key in old}}
    said = ", ".join(f'"{key}": {_literal(item)}' for key, item in entry.items())
    gone = f"; `fetch_ahead` {_NO_FETCH_AHEAD}" if "fetch_ahead" in old else ""
    return f'is an entry of the list `tiers` now: "tiers": [{{{said}}}]{gone}'


def _literal(value: object) -> str:
    """A value as a configuration has it, if it is short."""
    plain = value is None or isinstance(value, bool | str | float)
    return json.dumps(value) if plain and len(str(value)) <= 100 else show(value)


def _suggestion(name: str) -> str:
    known = [*_keys(Config, "")]
    # A key that is only in the wrong section is recognised by its last part.
    moved = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    near = moved or difflib.get_close_matches(name, [*known, *Config.model_fields], n=1)
    if near:
        return f"did you mean {' or '.join(near)}?"
    if not name.startswith("tiers[]"):  # they are many, and nobody has asked for them
        known = [*dict.fromkeys(key.partition("[]")[0] for key in known)]
    else:
        known = [key for key in known if key.startswith("tiers[]")]
    return f"the keys are {', '.join(known)}"


def _keys(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")
        elif section is Config and name == "tiers":
            kinds = (kind.config.model_fields for kind in KINDS.values())
            fields = chain(TierConfig.model_fields, *kinds)
            yield from (f"tiers[].{key}" for key in dict.fromkeys(fields))
        else:
            yield prefix + name
