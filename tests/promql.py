"""A parser for the part of PromQL that dashboards and alerts use here: no package on hand has one.

It takes selectors, ranges, offsets, aggregations, a few functions, and binary operators with
matching. What it does not know it refuses, so that a query is not in error unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

AGGREGATIONS = {"sum", "min", "max", "avg", "count"}
FUNCTIONS = {"rate": 1, "increase": 1, "min_over_time": 1, "histogram_quantile": 2}
RANGED = {"rate", "increase", "min_over_time"}
"""Functions of a range."""

LEVELS = (
    {"or"},
    {"and", "unless"},
    {"==", "!=", "<", ">", "<=", ">="},
    {"+", "-"},
    {"*", "/", "%"},
)
MATCHINGS = {"on", "ignoring", "group_left", "group_right"}

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<string>"(?:[^"\\]|\\.)*") |
        (?P<duration>\d+(?:ms|[smhdwy])(?![\w.])|\$__(?:rate_interval|range)\b) |
        (?P<number>\d+(?:\.\d+)?) |
        (?P<name>[a-zA-Z_:][\w:]*) |
        (?P<sign>=~|!~|==|!=|<=|>=|[-+*/%<>=(){}\[\],])
    )""",
    re.VERBOSE,
)


class PromqlError(ValueError):
    """A query is not understood."""


@dataclass(frozen=True)
class Matcher:
    """One condition of a selector."""

    label: str
    sign: str
    value: str


@dataclass
class Node:
    """A part of a query.

    Attributes:
        kind: ``selector``, ``number``, ``call``, ``aggregation`` or ``binary``.
        name: of the metric, function, aggregation or operator.
        matchers: of a selector.
        ranged: whether it is a range of a selector.
        labels: by which is aggregated or matched.
        parts: what it is made of.
    """

    kind: str
    name: str
    matchers: list[Matcher] = field(default_factory=list)
    ranged: bool = False
    labels: list[str] = field(default_factory=list)
    parts: list[Node] = field(default_factory=list)

    def all(self) -> Iterator[Node]:
        """It and all its parts."""
        yield self
        for part in self.parts:
            yield from part.all()

    def selectors(self) -> Iterator[Node]:
        return (node for node in self.all() if node.kind == "selector")


def parse(query: str) -> Node:
    """A query's parts.

    Raises:
        PromqlError: if it is not understood.
    """
    parser = _Parser(query)
    node = parser.binary(0)
    if parser.sign is not None:
        raise PromqlError(f"{query!r}: {parser.sign!r} is too much")
    return node


class _Parser:
    def __init__(self, query: str) -> None:
        self._query = query
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(query.rstrip()):
            match = _TOKEN.match(query, at)
            if match is None:
                raise PromqlError(f"{query!r}: not understood from {query[at:]!r} on")
            assert match.lastgroup is not None
            self._tokens.append((match.lastgroup, match[match.lastgroup]))
            at = match.end()

    @property
    def sign(self) -> str | None:
        """The text of the next token."""
        return self._tokens[0][1] if self._tokens else None

    def _take(self, kind: str = "", text: str = "") -> str:
        if not self._tokens:
            raise PromqlError(f"{self._query!r}: ends too early")
        found, value = self._tokens.pop(0)
        if (kind and found != kind) or (text and value != text):
            raise PromqlError(f"{self._query!r}: {text or kind} expected, {value!r} found")
        return value

    def binary(self, level: int) -> Node:
        if level == len(LEVELS):
            return self._unit()
        left = self.binary(level + 1)
        while self.sign in LEVELS[level]:
            node = Node("binary", self._take())
            while self.sign in MATCHINGS:
                node.labels += self._labels_of(self._take())
            node.parts = [left, self.binary(level + 1)]
            left = node
        return left

    def _labels_of(self, word: str) -> list[str]:
        return self._list() if self.sign == "(" or word in ("on", "ignoring") else []

    def _list(self) -> list[str]:
        self._take(text="(")
        labels = [self._take("name")]
        while self.sign == ",":
            self._take()
            labels.append(self._take("name"))
        self._take(text=")")
        return labels

    def _unit(self) -> Node:
        kind = self._tokens[0][0] if self._tokens else ""
        if kind == "number":
            return Node("number", self._take())
        if self.sign == "(":
            self._take()
            node = self.binary(0)
            self._take(text=")")
            return node
        name = self._take("name")
        if name in AGGREGATIONS:
            return self._aggregation(name)
        return self._call(name) if self.sign == "(" else self._selector(name)

    def _aggregation(self, name: str) -> Node:
        node = Node("aggregation", name)
        if self.sign == "by":
            self._take()
            node.labels = self._list()
        self._take(text="(")
        node.parts = [self.binary(0)]
        self._take(text=")")
        return node

    def _call(self, name: str) -> Node:
        if name not in FUNCTIONS:
            raise PromqlError(f"{self._query!r}: no function {name!r} is known here")
        self._take(text="(")
        parts = [self.binary(0)]
        while self.sign == ",":
            self._take()
            parts.append(self.binary(0))
        self._take(text=")")
        if len(parts) != FUNCTIONS[name]:
            raise PromqlError(f"{self._query!r}: {name} takes {FUNCTIONS[name]}, not {len(parts)}")
        if (name in RANGED) != parts[-1].ranged:
            raise PromqlError(f"{self._query!r}: {name} of a range, or not of one")
        return Node("call", name, parts=parts)

    def _selector(self, name: str) -> Node:
        node = Node("selector", name)
        if self.sign == "{":
            self._take()
            while self.sign != "}":
                label, sign, value = self._take("name"), self._take("sign"), self._take("string")
                if sign not in ("=", "!=", "=~", "!~"):
                    raise PromqlError(f"{self._query!r}: {sign!r} does not compare labels")
                node.matchers.append(Matcher(label, sign, value[1:-1]))
                if self.sign == ",":
                    self._take()
            self._take()
        if self.sign == "[":
            self._take()
            self._take("duration")
            self._take(text="]")
            node.ranged = True
        if self.sign == "offset":
            self._take()
            self._take("duration")
        return node
