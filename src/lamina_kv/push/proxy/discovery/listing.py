"""The file of ``--engines``: where the engines are, or how they are found.

::

    prefill:
      - {url: http://10.0.0.1:8000, push: "10.0.0.1:9300"}
      - {dns: http://prefill.example:8000, push_port: 9300}
      - {kubernetes: {service: lamina-prefill, port: http}, push_port: 9300}
    decode:
      - http://10.0.0.3:8000
      - {url: http://10.0.0.4:8000, drain: true}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec
import yaml

from lamina_kv.push.proxy.discovery.kubernetes import KubernetesService, PodPort
from lamina_kv.push.proxy.discovery.names import Names
from lamina_kv.push.proxy.discovery.places import Place, Source, place_problems
from lamina_kv.push.proxy.engines import Role
from lamina_kv.push.proxy.settings import SettingsError, push_problems, server_url

PUSH_PORT = 9300
"""Of ``push.listen``, as the documentation has it."""


class _Service(msgspec.Struct, forbid_unknown_fields=True):
    service: str
    port: int | str = "http"
    namespace: str = ""
    scheme: str = "http"


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    url: str = ""
    dns: str = ""
    kubernetes: _Service | None = None
    push: str = ""
    push_port: int = PUSH_PORT
    drain: bool = False


class _File(msgspec.Struct, forbid_unknown_fields=True):
    prefill: list[str | _Entry] = []
    decode: list[str | _Entry] = []


@dataclass(frozen=True, slots=True)
class Listing:
    """What the file says.

    Attributes:
        places: engines that it names.
        sources: ways to find more.
    """

    places: tuple[Place, ...]
    sources: frozenset[Source]


def read_listing(text: str) -> Listing:
    """What a file says.

    Args:
        text: its content, YAML.

    Raises:
        SettingsError: if it cannot be meant, with everything that is wrong.
    """
    try:
        document = yaml.safe_load(text)
        file = msgspec.convert({} if document is None else document, _File)
    except yaml.YAMLError as error:
        raise SettingsError((f"not YAML: {' '.join(str(error).split())}",)) from error
    except msgspec.ValidationError as error:
        raise SettingsError((str(error),)) from error
    places: list[Place] = []
    sources: set[Source] = set()
    problems: list[str] = []
    for role, entries in ((Role.PREFILL, file.prefill), (Role.DECODE, file.decode)):
        for number, given in enumerate(entries):
            entry = _Entry(url=given) if isinstance(given, str) else given
            if found := [*_problems(role, entry)]:
                problems += (f"{role.value}[{number}]: {problem}" for problem in found)
            elif entry.url:
                push = entry.push if role is Role.PREFILL else ""
                places.append(Place(role, server_url(entry.url), push, drain=entry.drain))
            else:
                sources.add(_source(role, entry))
    urls = Counter(name for place in places for name in (place.url, place.push) if name)
    problems += (f"{name} is given twice" for name, times in urls.items() if times > 1)
    if not file.decode:
        problems.append("it names no decode engine, nor a way to find one")
    if problems:
        raise SettingsError((*problems,))
    return Listing((*places,), frozenset(sources))


def _problems(role: Role, entry: _Entry) -> Iterator[str]:
    ways = [name for name in ("url", "dns", "kubernetes") if getattr(entry, name)]
    if len(ways) != 1:
        yield "give one of url, dns and kubernetes"
        return
    if entry.url:
        yield from place_problems(server_url(entry.url))
        if role is Role.PREFILL:
            yield from push_problems(entry.push)
    elif entry.push:
        yield "push is the address of one engine: give push_port"
    elif entry.drain:
        yield "drain is for one engine: name it by its url, too"
    if not 0 < entry.push_port < 1 << 16:
        yield f"push_port is {entry.push_port}, and must be a port"
    if role is Role.DECODE and (entry.push or entry.push_port != PUSH_PORT):
        yield "a decode engine has no push address"
    if entry.dns:
        yield from place_problems(server_url(entry.dns))
    if entry.kubernetes and not entry.kubernetes.service:
        yield "kubernetes: service is empty"
    if entry.kubernetes and entry.kubernetes.scheme not in {"http", "https"}:
        yield f"kubernetes: scheme is {entry.kubernetes.scheme!r}, and must be http or https"


def _source(role: Role, entry: _Entry) -> Source:
    push_port = entry.push_port if role is Role.PREFILL else None
    if entry.kubernetes is not None:
        given = entry.kubernetes
        port = PodPort(given.port, given.scheme, push_port)
        return KubernetesService(role, given.service, given.namespace, port)
    parts = urlsplit(server_url(entry.dns))
    return Names(
        role,
        parts.scheme,
        parts.hostname or "",
        parts.port or (443 if parts.scheme == "https" else 80),
        parts.path,
        push_port,
    )
