"""How the server is reached, again after it broke, and what its errors mean.

A client of glide connects again by itself, but does not say why it cannot, and what it had asked
for still comes over the old connection. So after an error of a connection the next call makes a
new client. Values of one server without TLS are read past glide: see
:mod:`lamina_kv.tiers.valkey.reading`.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glide_shared.exceptions import (
    ClosingError,
    ConfigurationError,
    ConnectionError,
    GlideError,
    TimeoutError,
)
from glide_shared.logger import Level, Logger
from glide_sync import (
    AdvancedGlideClientConfiguration,
    AdvancedGlideClusterClientConfiguration,
    GlideClient,
    GlideClientConfiguration,
    GlideClusterClient,
    GlideClusterClientConfiguration,
    NodeAddress,
    ServerCredentials,
    TlsAdvancedConfiguration,
)

from lamina_kv.tiers.contract import Fate
from lamina_kv.tiers.valkey.address import Address
from lamina_kv.tiers.valkey.config import ValkeyConfig

Client = GlideClient | GlideClusterClient

CLIENT_NAME = "lamina"
"""The name of the library in the server's `CLIENT LIST`. A name of the connection would need a
permission."""

TOO_LONG = "buffer capacity"
"""What glide says of a value that does not fit into its buffer."""

FULL = "OOM"
"""What a server says that is full and evicts nothing."""

CERTIFICATE = "the certificate"

_DIAGNOSIS = 0.25
"""Share of a timeout that is kept, with TLS, to find out why glide did not connect: with a
certificate that it does not trust it tries until the end of its own."""

_CREDENTIALS = ("NOAUTH", "WRONGPASS", "AuthenticationFailed", "NOPERM", "PermissionDenied")
_NO_DATABASE = "DB index is out of range"
TOO_MANY = "max number of clients"
_CLUSTER = "the server is one of a cluster"
_ADVICE = {
    Fate.LATE: "It is too slow, stopped, or out of reach",
    Fate.REFUSED: "Look at what it says",
    Fate.DOWN: "See that it runs",
}
_STALE = ("READONLY", "ReadOnly", "NOAUTH", "in recovery", "MOVED", "Moved")
"""Words of errors that a new connection may be rid of: after a failover, a new password."""

Logger.init(Level.OFF)  # it writes to the engine's standard output; we say what there is to say


class Failure(Exception):
    """The server did not do what it was asked.

    Attributes:
        fate: what that is for a chunk.
        words: what was said, in a few words.
        advice: what to do about it.
    """

    def __init__(self, fate: Fate, words: str) -> None:
        super().__init__(words)
        self.fate = fate
        self.words = words

    @property
    def advice(self) -> str:
        """What to do, in a sentence."""
        if FULL in self.words:
            return "It is full and evicts nothing: set `maxmemory-policy allkeys-lru` there"
        if CERTIFICATE in self.words:
            return "Check ca_file"
        if _NO_DATABASE in self.words:
            return "Check the number at the end of url, and `databases` there"
        if TOO_MANY in self.words:
            return "Raise `maxclients` there"
        if _CLUSTER in self.words:
            return "Set `cluster: true`"
        if any(word in self.words for word in _CREDENTIALS):
            return "Check user, password and permissions (docs/stores.md has what is needed)"
        return _ADVICE[self.fate]


@dataclass(slots=True)
class _Lease:
    """A client in use.

    Attributes:
        client: the client.
        users: calls under way; closed with the last one, once it is discarded.
    """

    client: Client
    users: int = 0
    discarded: bool = False


class Connection:
    """One connection that threads share: what several ask at once is under way at once.

    Args:
        config: the tier.
        greet: called with each new client before it is used, and the seconds that this may take.
    """

    def __init__(
        self,
        config: ValkeyConfig,
        greet: Callable[[Client, float], None] = lambda client, timeout: None,
    ) -> None:
        self._config = config
        self._greet = greet
        self._making = threading.Lock()
        self._lock = threading.Lock()
        self._lease: _Lease | None = None
        self._failure: tuple[float, Failure] | None = None

    @contextmanager
    def client(self, timeout: float) -> Iterator[Client]:
        """A connected client for one call.

        Args:
            timeout: seconds for connecting, and of each request to the server for which none are
                given. A call that connects and then asks takes what is left from :func:`left`.

        Raises:
            Failure: if there is no connection, or the block ends with an error of glide's.
        """
        lease = self._acquire(timeout)
        try:
            yield lease.client
        except GlideError as error:
            if isinstance(error, TimeoutError | ConnectionError | ClosingError) or any(
                word in str(error) for word in _STALE
            ):
                self._discard(lease)
            raise failure(error) from error
        finally:
            self._release(lease)

    def close(self) -> None:
        """Close it; what is under way ends first. Idempotent."""
        with self._lock:
            lease = self._lease
        if lease is not None:
            self._discard(lease)

    # -- leases ------------------------------------------------------------------------------------

    def _acquire(self, timeout: float) -> _Lease:
        began = time.monotonic()
        if (lease := self._taken()) is not None:
            return lease
        if not self._making.acquire(timeout=timeout):
            raise Failure(Fate.LATE, "no connection in time")
        try:
            if (lease := self._taken()) is not None:
                return lease
            if self._failure is not None and self._failure[0] >= began:
                raise self._failure[1]  # another thread has just tried
            try:
                lease = _Lease(self._connected(timeout, began + timeout), users=1)
            except Failure as error:
                self._failure = time.monotonic(), error
                raise
            with self._lock:
                self._lease = lease
            return lease
        finally:
            self._making.release()

    def _taken(self) -> _Lease | None:
        with self._lock:
            if self._lease is not None:
                self._lease.users += 1
            return self._lease

    def _discard(self, lease: _Lease) -> None:
        with self._lock:
            if self._lease is lease:
                self._lease = None
            closes = not lease.discarded and not lease.users
            lease.discarded = True
        if closes:
            lease.client.close()

    def _release(self, lease: _Lease) -> None:
        with self._lock:
            lease.users -= 1
            closes = lease.discarded and not lease.users
        if closes:
            lease.client.close()

    # -- connecting --------------------------------------------------------------------------------

    def _connected(self, timeout: float, due: float) -> Client:
        """A new client whose requests take ``timeout`` seconds; it is there by ``due``."""
        if not self._config.cluster:  # one node of several is enough, and glide finds it
            # Where nobody listens glide tries until the end of its timeout.
            connect(self._config.url, due).close()
        connecting = left(due) * (1 - _DIAGNOSIS if self._config.url.tls else 1)
        try:
            client = self._make(timeout, connecting)
            try:
                self._greet(client, left(due))
            except GlideError:
                client.close()
                raise
        except GlideError as error:
            failed = failure(error)
            if self._config.url.tls and failed.fate is not Fate.REFUSED:
                self._check_certificate(due)
            raise failed from error
        return client

    def _check_certificate(self, due: float) -> None:
        """Fail if the server's certificate is why glide could not connect, which it does not say.

        Raises:
            Failure: if the certificate is not trusted.
        """
        host, _ = self._config.url.hosts[0]
        try:
            context = ssl.create_default_context(cafile=self._config.ca_file)
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python 3.13 sets it, glide does not
            with closing(connect(self._config.url, due)) as connection:
                connection.settimeout(left(due))
                context.wrap_socket(connection, server_hostname=host).close()
        except ssl.SSLCertVerificationError as error:
            words = f"{CERTIFICATE} of the server is not trusted: {error.verify_message}"
            raise Failure(Fate.REFUSED, words) from error
        except (OSError, Failure):
            pass  # glide's own error says as much

    def _make(self, timeout: float, connecting: float) -> Client:
        config, address = self._config, self._config.url
        nodes = [NodeAddress(host, port) for host, port in address.hosts] or [
            NodeAddress(unix_socket_path=address.socket)
        ]
        answering, connecting = (max(1, round(s * 1e3)) for s in (timeout, connecting))
        credentials, tls = self._credentials(), self._tls()
        client: Client
        if config.cluster:
            client = GlideClusterClient(
                GlideClusterClientConfiguration(
                    nodes,
                    use_tls=address.tls,
                    credentials=credentials,
                    request_timeout=answering,
                    lib_name=CLIENT_NAME,
                    advanced_config=AdvancedGlideClusterClientConfiguration(
                        connection_timeout=connecting, tls_config=tls
                    ),
                )
            )
        else:
            client = GlideClient(  # type: ignore[abstract] # of a stub that is never called
                GlideClientConfiguration(
                    nodes,
                    use_tls=address.tls,
                    credentials=credentials,
                    request_timeout=answering,
                    database_id=address.database,
                    lib_name=CLIENT_NAME,
                    advanced_config=AdvancedGlideClientConfiguration(
                        connection_timeout=connecting, tls_config=tls
                    ),
                )
            )
        # Not `create`: that keeps every client for ever, to connect it again in forked processes.
        client._create_core_client()  # type: ignore[no-untyped-call]
        return client

    def _credentials(self) -> ServerCredentials | None:
        secret, user = password(self._config), self._config.url.user
        return ServerCredentials(secret, user or None) if secret or user else None

    def _tls(self) -> TlsAdvancedConfiguration | None:
        config = self._config
        if not config.url.tls:
            return None
        # glide would only say that it cannot connect.
        read = {key: self._read(key) for key in ("ca_file", "certificate_file", "key_file")}
        return TlsAdvancedConfiguration(
            root_pem_cacerts=read["ca_file"],
            client_cert_path=config.certificate_file,
            client_key_path=config.key_file,
        )

    def _read(self, key: str) -> bytes | None:
        """What is in a file that the configuration names; None if it names none."""
        path: Path | None = getattr(self._config, key)
        try:
            return None if path is None else path.read_bytes()
        except OSError as error:
            words = f"{self._config.key(key)} cannot be read: {error.strerror}"
            raise Failure(Fate.REFUSED, words) from error


def connect(address: Address, due: float) -> socket.socket:
    """A connection to a server, or to the first node of several.

    Args:
        address: the server.
        due: when it must be there, by :func:`time.monotonic`.

    Raises:
        Failure: if there is none.
    """
    try:
        if address.socket:
            return _connect(socket.AF_UNIX, address.socket, left(due))
        return _connect_to_host(*address.hosts[0], due)
    except UnicodeError as error:
        raise Failure(Fate.DOWN, "cannot connect: no host can have that name") from error
    except OSError as error:
        raise Failure(Fate.DOWN, f"cannot connect: {error.strerror or error}") from error


def _connect_to_host(host: str, port: int, due: float) -> socket.socket:
    failed = OSError("the name has no address")
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    while places:
        family, _, _, _, place = places.pop(0)
        try:
            # Each has its share, as the first address may swallow all that is sent to it.
            return _connect(family, place, left(due) / (len(places) + 1))
        except OSError as error:
            failed = error
    raise failed


def _connect(family: int, place: Any, timeout: float) -> socket.socket:
    connection = socket.socket(family)
    try:
        connection.settimeout(timeout)
        connection.connect(place)
    except BaseException:
        connection.close()
        raise
    return connection


def password(config: ValkeyConfig) -> str:
    """The password as it is now; empty if there is none.

    Raises:
        Failure: if it is not where it should be.
    """
    if config.password_file is not None:
        try:
            return config.password_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            words = f"{config.key('password_file')} cannot be read: {error}"
            raise Failure(Fate.REFUSED, words) from error
    if config.password_env is not None:
        if secret := os.environ.get(config.password_env, ""):
            return secret
        words = f"{config.key('password_env')}: {config.password_env} is not set"
        raise Failure(Fate.REFUSED, words)
    return config.url.password


def left(due: float) -> float:
    """Seconds until a moment of :func:`time.monotonic`; a little where it is over, as to most
    libraries none means for ever."""
    return max(0.001, due - time.monotonic())


def failure(error: GlideError) -> Failure:
    """What an error of glide's is for a chunk."""
    words = " ".join(str(error).split())
    words = words.removeprefix("An error was signalled by the server: - ")
    if isinstance(error, TimeoutError):
        return Failure(Fate.LATE, "no answer in time")
    if isinstance(error, ConfigurationError):
        return Failure(Fate.REFUSED, words)
    if "timed out" in words:  # of a connection: somebody listens, or there is no way there
        return Failure(Fate.LATE, "no connection in time")
    return said(words)


def said(words: str) -> Failure:
    """What an error of the server's, in its own words, is for a chunk."""
    if words.startswith("MOVED"):  # with a slot and an address: many words for one cause
        return Failure(Fate.REFUSED, _CLUSTER)
    refuses = any(word in words for word in (FULL, "MISCONF", _NO_DATABASE, *_CREDENTIALS))
    return Failure(Fate.REFUSED if refuses else Fate.DOWN, words)
