"""The URL of a server: ``valkeys://user:password@cache.internal:6379/0``."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

from lamina_kv.values import WrongValueError

WORDS = (
    'a URL such as "valkey://cache.internal:6379", "valkeys://user@cache.internal:6379/0" (TLS) or '
    '"unix:///run/valkey/valkey.sock"'
)

_PLAIN, _TLS, _SOCKET = ("valkey", "redis"), ("valkeys", "rediss"), ("unix",)
_DATABASE_DIGITS = 9  # more are no number to the client library
_PORT = 6379


@dataclass(frozen=True, slots=True)
class Address:
    """Which server, and who asks.

    Attributes:
        hosts: host and port of the server; of several nodes, if it is a cluster.
        socket: path of a Unix socket instead of hosts; empty if there is none.
        tls: whether the connection is encrypted.
        user: empty for the default user.
        password: empty if the URL has none.
        database: number of the database.
    """

    hosts: tuple[tuple[str, int], ...]
    socket: str
    tls: bool
    user: str
    password: str = field(repr=False)
    database: int

    def __str__(self) -> str:
        """The server for messages: neither user nor password."""
        if self.socket:
            return self.socket
        return ",".join(f"[{h}]:{p}" if ":" in h else f"{h}:{p}" for h, p in self.hosts)


def parse(value: object) -> Address:
    """The address that a URL names.

    Raises:
        WrongValueError: if it is none; the text quotes nothing of it, as it may hold a password.
    """
    if not isinstance(value, str):
        raise WrongValueError
    try:
        url = urlsplit(value)
    except ValueError:
        raise WrongValueError from None
    if url.scheme not in (*_PLAIN, *_TLS, *_SOCKET):
        raise WrongValueError("a URL that begins with valkey, valkeys, redis, rediss or unix://")
    if url.query or url.fragment:
        raise WrongValueError("a URL without ? and # (write them as %3F and %23 in a password)")
    credentials, _, hosts = url.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    socket = url.scheme in _SOCKET
    if socket and (hosts or len(url.path) < 2):
        raise WrongValueError('a URL with an absolute path, such as "unix:///run/valkey.sock"')
    return Address(
        hosts=() if socket else tuple(map(_host, hosts.split(","))),
        socket=unquote(url.path) if socket else "",
        tls=url.scheme in _TLS,
        user=unquote(user),
        password=unquote(password),
        database=0 if socket else _database(url),
    )


def _host(text: str) -> tuple[str, int]:
    try:
        one = urlsplit(f"//{text}")
        host, port = one.hostname, one.port or _PORT
    except ValueError:
        raise WrongValueError("a URL with a port from 1 to 65535 behind each host") from None
    if not host:
        raise WrongValueError("a URL with a host")
    return host, port


def _database(url: SplitResult) -> int:
    number = url.path.strip("/")
    if number and not (number.isascii() and number.isdecimal()):
        raise WrongValueError("a URL that ends with the port or the number of a database")
    if len(number) > _DATABASE_DIGITS:
        raise WrongValueError(f"a URL with a database of {_DATABASE_DIGITS} digits at most")
    return int(number or 0)
