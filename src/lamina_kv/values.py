"""The kinds of value that a configuration key can have, and the base of its sections.

The words of a kind complete the sentence "must be …" of an error. They also stand in the
configuration table, so that the table cannot disagree with the check.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from re import IGNORECASE, compile
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))
_UNITS = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
_SIZE = compile(r"\s*([0-9]{1,19})\s*(B|KiB|MiB|GiB|TiB)?\s*")
_NEARLY_SIZE = compile(r"\s*([0-9]{1,19})\s*([KMGT])(?:i|i?B)?\s*", IGNORECASE)
_ADDRESS = compile(r"(?:[^\s:\[\]/]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_NAME = compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_HOST = compile(r"[^\s:\[\]/]+|\[[0-9A-Fa-f:.]+\]")
_MAX_SIZE = (1 << 63) - 1
_MAX_SECONDS = 86_400
_MAX_INTEGER = (1 << 31) - 1


Auto = Literal["auto"]
"""Lamina chooses."""


class Section(BaseModel):
    """A part of the configuration tree: immutable. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class WrongValueError(ValueError):
    """A value is not of its kind.

    The message completes "must be …"; an empty one stands for the kind's own words.
    """


@dataclass(frozen=True)
class Kind:
    """One kind of value.

    Attributes:
        words: what is accepted; completes "must be …".
        parse: the checked value for what was given; raises :class:`WrongValueError`.
        secret: whether an error must not quote the value.
        schema: the same in JSON Schema, as far as that can say it; for editors.
    """

    words: str
    parse: Callable[[object], object]
    secret: bool = False
    schema: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Replaces pydantic's own conversion, which would accept more and say less."""
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """What a validating function accepts, pydantic cannot know."""
        return dict(self.schema)

    def _checked(self, value: object) -> object:
        try:
            return self.parse(value)
        except WrongValueError as wrong:
            reason = str(wrong) or self.words
            got = type(value).__name__ if self.secret else show(value)
            raise ValueError(f"must be {reason}, got {got}") from None

    def auto(self) -> Kind:
        """This kind, or the word ``"auto"``."""
        return self.__or("auto", '"auto"')

    def nullable(self) -> Kind:
        """This kind, or ``null``."""
        return self.__or(None, "null")

    def __or(self, constant: str | None, name: str) -> Kind:
        def parse(value: object) -> object:
            return constant if value == constant else self.parse(value)

        schema = {"anyOf": [{"const": constant}, self.schema]}
        return Kind(f"{name} or {self.words}", parse, self.secret, schema)


def show(value: object) -> str:
    """``value`` on one line and cut to a readable length, whatever it is."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    shortener = reprlib.Repr()
    shortener.maxlevel = 2  # aliases in YAML can make a small file a vast tree
    shortener.maxstring = shortener.maxlong = shortener.maxother = 60
    return shortener.repr(value)


def integer(minimum: int) -> Kind:
    """Integers of at least ``minimum``."""

    def parse(value: object) -> int:
        if type(value) is not int or value < minimum:
            raise WrongValueError
        if value > _MAX_INTEGER:
            raise WrongValueError(f"at most {_MAX_INTEGER}")
        return value

    schema = {"type": "integer", "minimum": minimum}
    return Kind(f"an integer of at least {minimum}", parse, schema=schema)


def _quoted(text: str) -> str:
    return f'"{text}"'


def choice(*names: str) -> Kind:
    """One of ``names``."""
    words = " or ".join(filter(None, [", ".join(map(_quoted, names[:-1])), _quoted(names[-1])]))

    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in names:
            raise WrongValueError
        return value

    return Kind(words, parse, schema={"enum": [*names]})


def _parse_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise WrongValueError
    return value


def _parse_size(value: object) -> int:
    size = value
    if isinstance(value, str):
        if match := _SIZE.fullmatch(value):
            size = int(match[1]) * _UNITS[match[2] or "B"]
        elif match := _NEARLY_SIZE.fullmatch(value):
            unit = f"{match[2].upper()}iB"
            raise WrongValueError(f'a size with a binary unit, such as "{match[1]}{unit}"')
    if type(size) is not int or size <= 0:
        raise WrongValueError
    if size > _MAX_SIZE:
        raise WrongValueError("below 2^63 bytes")
    return size


def _parse_seconds(value: object) -> float:
    # `type`, because a bool is an int; the comparison is false for NaN.
    if type(value) not in (int, float) or not 0 < value <= _MAX_SECONDS:  # type: ignore[operator]
        raise WrongValueError
    return float(value)  # type: ignore[arg-type]


def _parse_share(value: object) -> float:
    if type(value) not in (int, float) or not 0 < value <= 1:  # type: ignore[operator]
        raise WrongValueError
    return float(value)  # type: ignore[arg-type]


def _parse_path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise WrongValueError
    return Path(value)


def _parse_absolute_path(value: object) -> Path:
    path = _parse_path(value)
    if not path.is_absolute():
        raise WrongValueError
    return path


def _parse_text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise WrongValueError
    return value


def _parse_name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise WrongValueError
    return value


def _parse_address(value: object) -> str:
    if not isinstance(value, str) or not (match := _ADDRESS.fullmatch(value)):
        raise WrongValueError
    if not 0 < int(match[1]) < 1 << 16:
        raise WrongValueError("an address with a port from 1 to 65535")
    return value


def _parse_peers(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise WrongValueError
    for peer in value:
        if not isinstance(peer, str) or not (_HOST.fullmatch(peer) or _ADDRESS.fullmatch(peer)):
            raise WrongValueError
    return tuple(value)


_STRING: Mapping[str, Any] = {"type": "string", "minLength": 1}

FLAG = Kind("true or false", _parse_flag, schema={"type": "boolean"})
ADDRESS = Kind('an address such as "10.0.0.1:9300" or "[::1]:9300"', _parse_address, schema=_STRING)
PEERS = Kind(
    'a list of addresses or hosts such as ["10.0.0.1:9300", "prefill.local", "[::1]"]',
    _parse_peers,
    schema={"type": "array", "items": _STRING},
)
SIZE = Kind(
    'a size (bytes, or text with a binary unit such as "4GiB")',
    _parse_size,
    schema={
        "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^\\s*\\d"}]
    },
)
SECONDS = Kind(
    f"a number of seconds above 0 and at most {_MAX_SECONDS} (a day)",
    _parse_seconds,
    schema={"type": "number", "exclusiveMinimum": 0, "maximum": _MAX_SECONDS},
)
SHARE = Kind(
    "a number above 0 and at most 1",
    _parse_share,
    schema={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
)
PATH = Kind("a path", _parse_path, schema=_STRING)
ABSOLUTE_PATH = Kind(
    "an absolute path", _parse_absolute_path, schema={"type": "string", "pattern": "^/"}
)
TEXT = Kind("text that is not empty", _parse_text, schema=_STRING)
NAME = Kind(
    "1 to 40 letters, digits, dots, dashes and underscores",
    _parse_name,
    schema={"type": "string", "pattern": f"^{_NAME.pattern}$"},
)
SECRET = Kind(
    "text that is not empty (in YAML: in quotes)", _parse_text, secret=True, schema=_STRING
)


def format_size(size: int) -> str:
    """``size`` bytes in the largest binary unit that expresses them exactly: ``"256MiB"``.

    The inverse of what a size key accepts.
    """
    unit = max((name for name in _UNITS if size % _UNITS[name] == 0), key=_UNITS.__getitem__)
    return f"{size // _UNITS[unit]}{unit}" if size and unit != "B" else str(size)
