"""Which headers pass between clients and engines: all but those of one connection, and those that
the proxy writes itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from starlette.datastructures import Headers

Pairs = tuple[tuple[str, str], ...]
"""Headers of an answer, in order; one name may stand several times (``set-cookie``)."""

RANK: Final = "x-data-parallel-rank"
"""Tells vLLM's server which of its ranks computes a request. A client's names a rank of the decode
engine; the proxy itself chooses that of the prefill engine."""

CREDENTIALS: Final = ("authorization", "x-api-key")
"""Headers in which clients show a key: those of OpenAI's API and those of Anthropic's."""

_OF_ONE_CONNECTION = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# Events are told apart in what engines send, so it must not be compressed.
_OF_REQUESTS = _OF_ONE_CONNECTION | {
    "accept-encoding",
    "content-length",
    "expect",
    "host",
    "x-request-id",
}
_OF_ANSWERS = _OF_ONE_CONNECTION | {"date", "server", "x-request-id"}


def of_request(headers: Headers) -> dict[str, str]:
    """What engines get of a client's headers; names are in lower case."""
    kept = _without(headers.items(), _OF_REQUESTS, headers.getlist("connection"))
    found: dict[str, str] = {}
    for name, value in kept:
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def of_answer(headers: Pairs) -> Pairs:
    """What clients get of an engine's headers; names are in lower case."""
    connection = [value for name, value in headers if name == "connection"]
    return (*_without(headers, _OF_ANSWERS, connection),)


def raw(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """The same as they stand on the wire."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def shown_keys(headers: Headers) -> list[str]:
    """The keys that a client shows."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    keys = [token.strip()] if scheme.lower() == "bearer" else []
    return keys + headers.getlist("x-api-key")


def _without(
    pairs: Iterable[tuple[str, str]], names: frozenset[str], connection: Iterable[str]
) -> Iterable[tuple[str, str]]:
    # RFC 9110, 7.6.1: whoever forwards a message drops what its Connection header names.
    named = {name.strip().lower() for line in connection for name in line.split(",")}
    return [pair for pair in pairs if pair[0] not in names and pair[0] not in named]
