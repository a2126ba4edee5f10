"""What the proxy is told: where the engines are, who may ask, how long and how much it bears."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from lamina_kv.push.proxy.routing.events.places import EventPlaces
from lamina_kv.push.proxy.routing.words import Disaggregate, PolicyName


class SettingsError(ValueError):
    """Settings that cannot work.

    Attributes:
        problems: one sentence each, that names what is wrong and what would be right.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class PrefillAddress:
    """Where a prefill engine is.

    Attributes:
        url: of its OpenAI server; as :func:`server_url` makes it.
        push: ``HOST:PORT`` at which decode engines reach its data-parallel rank 0 for pushes; rank
            N is at PORT + N.
    """

    url: str
    push: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", server_url(self.url))


@dataclass(frozen=True, slots=True)
class EngineTls:
    """Files that secure connections to engines whose URL begins with ``https``.

    Attributes:
        ca: certificates of the authorities that are believed; None for those of this machine.
        certificate: the proxy's own, if engines ask for one.
        key: of it; None if it stands in the same file.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Checked when made. Times are seconds.

    Attributes:
        prefill: the prefill engines.
        decode: URLs of the decode engines' OpenAI servers; as :func:`server_url` makes them.
        engines: file that says where they are, in place of ``prefill`` and ``decode``; it may
            change.
        engines_interval: between two looks at it.
        engine_tls: how connections to engines are secured.
        admin_token: what must be shown by who drains engines; None lets nobody.
        token: what clients must show as ``Authorization: Bearer``; None lets everyone in.
        engine_key: what the engines are shown; None shows them what the client shows, unless that
            is the proxy's own token.
        connect_timeout: for a connection to an engine.
        first_byte_timeout: until an engine begins to answer; for a prefill engine, until it has.
        stall_timeout: between two pieces of an answer, or of a client's body.
        total_timeout: for a request as a whole.
        tries: decode engines that a request is sent to at most, one after the other.
        backoff: before the second try; doubled for each further one.
        max_held_bytes: what requests may take of the proxy's memory, all together; those that
            would need more are turned away.
        max_body_bytes: of a request.
        health_interval: between two health checks of an engine, and how long one may take.
        breaker_failures: failures in a row after which an engine is left alone.
        breaker_pause: for how long; doubled every time it fails again.
        policy: how engines are chosen.
        disaggregate: which prompts are pushed.
        kv_events: where engines publish what they hold.

    Raises:
        SettingsError: if they cannot work.
    """

    prefill: tuple[PrefillAddress, ...] = ()
    decode: tuple[str, ...] = ()
    engines: Path | None = None
    engines_interval: float = 2.0
    engine_tls: EngineTls = EngineTls()
    admin_token: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    engine_key: str | None = field(default=None, repr=False)
    connect_timeout: float = 3.0
    first_byte_timeout: float = 300.0
    stall_timeout: float = 60.0
    total_timeout: float = 3600.0
    tries: int = 3
    backoff: float = 0.1
    max_held_bytes: int = 1 << 30
    max_body_bytes: int = 64 << 20
    health_interval: float = 3.0
    breaker_failures: int = 3
    breaker_pause: float = 2.0
    policy: PolicyName = PolicyName.CACHE_AWARE
    disaggregate: Disaggregate = Disaggregate.AUTO
    kv_events: EventPlaces = field(default_factory=EventPlaces)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decode", tuple(server_url(url) for url in self.decode))
        if problems := (*self._problems(),):
            raise SettingsError(problems)

    def _problems(self) -> Iterator[str]:
        for name, given in (("prefill", self.prefill), ("decode", self.decode)):
            if self.engines is not None and given:
                yield f"--{name}: --engines says where the engines are: give one of the two"
            elif self.engines is None and not given:
                yield f"there is no {name} engine: give at least one --{name}, or --engines"
        if self.engine_tls.key is not None and self.engine_tls.certificate is None:
            yield "--engines-cert-key: there is no --engines-cert to which it could belong"
        for address in self.prefill:
            yield from (f"--prefill: {problem}" for problem in url_problems(address.url))
            yield from (f"--prefill: {problem}" for problem in push_problems(address.push))
        for url in self.decode:
            yield from (f"--decode: {problem}" for problem in url_problems(url))
        urls = [*(address.url for address in self.prefill), *self.decode]
        given_twice = Counter([*urls, *(address.push for address in self.prefill)])
        yield from (
            f"--prefill, --decode: {name} is given twice"
            for name, n in given_twice.items()
            if n > 1
        )
        for secret, name, where in (
            (self.token, "token", "--token or LAMINA_PUSH_TOKEN"),
            (self.admin_token, "admin token", "--admin-token or LAMINA_PUSH_ADMIN_TOKEN"),
            (self.engine_key, "engine key", "--engine-key or LAMINA_PUSH_ENGINE_KEY"),
        ):
            if secret is not None and not (secret.isascii() and secret.isprintable() and secret):
                yield f"{where}: the {name} is empty or has characters that no HTTP header may have"
        for number in fields(self):
            value = getattr(self, number.name)
            if isinstance(value, (int, float)) and not value > 0:
                flag = number.name.replace("_", "-")
                yield f"--{flag}: {number.name} is {value}, and must be more than 0"


def server_url(given: str) -> str:
    """The URL of a server, of which people are used to give that of its API."""
    return re.sub(r"(?<=[^/])/v1$", "", given.rstrip("/")).rstrip("/")


def url_problems(url: str) -> Iterator[str]:
    """What is wrong with the URL of an engine's server."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        yield f"{url!r} is not a URL: {error}"
        return
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        yield f"{url!r} is not the URL of an engine's server, like http://10.0.0.1:8000"
    elif parts.username is not None or parts.query or parts.fragment:
        yield f"the URL of {parts.hostname} may have a scheme, a host, a port and a path only"


def push_problems(address: str) -> Iterator[str]:
    """What is wrong with the address that decode engines are to reach for pushes."""
    try:
        parts = urlsplit(f"//{address}")
        plain = parts.port and parts.hostname and parts == SplitResult("", parts.netloc, "", "", "")
    except ValueError:
        plain = None
    if not plain:
        yield f"{address!r} is not a push address, like 10.0.0.1:7000"
    elif _is_wildcard(parts.hostname or ""):
        yield f"{address!r} is no place that a decode engine could connect to: give a host's own"


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
