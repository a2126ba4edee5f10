"""How values are read from the server into buffers.

Requests wait for this, so that it is done without the client library where that can be. glide holds
a value whole, in memory that it gets anew each time, and copies it from there: that takes twice the
processor time of reading from a socket into the buffer (0.20 s and 0.10 s for 64 values of 8 MiB).
Of a cluster, or through TLS, values are read with glide all the same. A cluster moves, and glide
follows. Python decrypts 16 KiB at a time, and waits for the interpreter's lock each time.

No byte comes into a buffer after a call has ended: a socket is read by the call itself, and glide
copies before its call returns.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from glide_shared.exceptions import RequestError

from lamina_kv.tiers.contract import Fate
from lamina_kv.tiers.valkey.config import ValkeyConfig
from lamina_kv.tiers.valkey.connection import (
    CLIENT_NAME,
    TOO_LONG,
    TOO_MANY,
    Client,
    Connection,
    Failure,
    connect,
    left,
    password,
    said,
)
from lamina_kv.values import MIB

AHEAD_BYTES = 2 * MIB
"""Bytes that are asked for and have not come, on one socket. The server copies each answer before
it sends any of it: values of 1 MiB came at half the rate when 8 MiB were asked for at once."""

_END = b"\r\n"
_LENGTH = re.compile(rb"\$\d{1,19}")
_LONGEST_LINE = 1 << 16
_LITTLE = 64
"""Bytes that are received where a value may follow: what comes of it with them is copied."""

_MOST_SURPLUS = 1 * MIB
"""Bytes that a value may have more than its buffer to be thrown away on its wire. Of a longer one a
new wire costs less, and throwing it away could take all the time that the others have."""

_SCRAP = 1 << 16
"""Bytes that are thrown away at once."""


class Reading(Protocol):
    """Connections over which values come. Threads may read at once."""

    def read(
        self, names: Sequence[bytes], buffers: Sequence[memoryview], timeout: float
    ) -> list[Fate]:
        """Fill each buffer with the value of its name.

        Args:
            names: at least one.
            buffers: one for each.
            timeout: seconds for all, connecting included.

        Returns:
            For each value DONE, GONE if there is none, or CORRUPT if it is longer or shorter than
            its buffer.

        Raises:
            Failure: if the server does not answer, or with an error.
        """

    def probe(self, name: bytes, timeout: float) -> None:
        """Ask for a value that is small or not there, and keep the connection.

        Raises:
            Failure: as :meth:`read`.
        """

    def close(self) -> None:
        """Close all connections; no call is under way. Idempotent."""


def open_reading(config: ValkeyConfig) -> Reading:
    """How values of a tier are read; nothing is connected yet."""
    if config.cluster or config.url.tls:
        return ClientReading(config)
    return SocketReading(config)


class ClientReading:
    """A :class:`Reading` with glide: one connection for all threads.

    Args:
        config: the tier.
    """

    def __init__(self, config: ValkeyConfig) -> None:
        self._connection = Connection(config)

    def read(
        self, names: Sequence[bytes], buffers: Sequence[memoryview], timeout: float
    ) -> list[Fate]:
        """See the protocol. A call that connects first may take twice its timeout, as a client of
        glide's has one timeout for all its requests."""
        with self._connection.client(timeout) as client:
            return self._read(client, names, buffers)

    def probe(self, name: bytes, timeout: float) -> None:
        """See the protocol."""
        with self._connection.client(timeout) as client:
            client.mget([name])

    def close(self) -> None:
        """See the protocol."""
        self._connection.close()

    def _read(
        self, client: Client, names: Sequence[bytes], buffers: Sequence[memoryview]
    ) -> list[Fate]:
        try:
            lengths = client.mget([*names], buffers=[*buffers])
        except RequestError as error:
            if TOO_LONG not in str(error):
                raise
            if len(names) == 1:
                return [Fate.CORRUPT]
            # One value is longer than a chunk, and no other one of the batch was read.
            pairs = zip(names, buffers, strict=True)
            return [fate for name, buffer in pairs for fate in self._read(client, [name], [buffer])]
        return [
            Fate.GONE
            if length is None
            else Fate.DONE
            if int(length) == len(buffer)
            else Fate.CORRUPT
            for length, buffer in zip(lengths, buffers, strict=True)
        ]


class SocketReading:
    """A :class:`Reading` from sockets, each of one call at a time.

    Args:
        config: the tier.
    """

    def __init__(self, config: ValkeyConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._idle: list[Wire] = []

    def read(
        self, names: Sequence[bytes], buffers: Sequence[memoryview], timeout: float
    ) -> list[Fate]:
        """See the protocol."""
        due = time.monotonic() + timeout
        fates: list[Fate] = []
        while (done := len(fates)) < len(names):
            fates += self._read_some(names[done:], buffers[done:], due)
        return fates

    def probe(self, name: bytes, timeout: float) -> None:
        """See the protocol."""
        self.read([name], [memoryview(bytearray(1))], timeout)

    def close(self) -> None:
        """See the protocol."""
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _read_some(
        self, names: Sequence[bytes], buffers: Sequence[memoryview], due: float
    ) -> list[Fate]:
        """What came over one wire: the fates of all, or of some from the first on."""
        with self._lock:
            wire = self._idle.pop() if self._idle else None
        if wire is not None:
            try:
                return self._read_over(wire, names, buffers, due)
            except Ended:
                pass  # while it was idle, perhaps, as servers do
        return self._read_over(Wire(self._config, due), names, buffers, due)

    def _read_over(
        self, wire: Wire, names: Sequence[bytes], buffers: Sequence[memoryview], due: float
    ) -> list[Fate]:
        try:
            fates = wire.read(names, buffers, due)
        except BaseException:
            wire.close()
            self.close()  # what is wrong with one may be wrong with those made before it, too
            raise
        if not wire.closed:
            with self._lock:
                self._idle.append(wire)
        return fates


class Ended(Failure):
    """The server has ended the connection.

    Args:
        why: what the server said before, if it did.
    """

    def __init__(self, why: str = "") -> None:
        super().__init__(Fate.DOWN, why or "the connection has ended")


class Wire:
    """A socket to the server, and what has come of the answer that is read. It speaks as much of
    RESP 2 as it takes to log in and to read values. After an error it can only be closed.

    Args:
        config: the tier.
        due: when it must be connected, by :func:`time.monotonic`.

    Raises:
        Failure: if it cannot be.
    """

    def __init__(self, config: ValkeyConfig, due: float) -> None:
        self._unread = b""
        self._complaint = ""  # while the first value has not come: why it may not
        secret = password(config)
        self._socket = connect(config.url, due)
        try:
            self._socket.settimeout(None)  # the kernel's timeouts hold for a whole value
            if not config.url.socket:
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._log_in(config.url.user, secret, config.url.database, due)
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether nothing more can be read."""
        return self._socket.fileno() < 0

    def read(self, names: Sequence[bytes], buffers: Sequence[memoryview], due: float) -> list[Fate]:
        """See :class:`Reading`. Closes the wire, and returns the fates so far, behind a value that
        is too long to be thrown away."""
        ahead = max(1, AHEAD_BYTES // len(buffers[0]))
        # A value that is no string is none to MGET, and an error to GET.
        asked = [_command(b"MGET", name) for name in names]
        fates: list[Fate] = []
        with self._answering("no answer in time"):
            self._send(b"".join(asked[:ahead]), due)
            for number, buffer in enumerate(buffers, ahead):
                fates.append(self._value(buffer, due))
                self._complaint = ""
                if self.closed:
                    break
                if number < len(asked):
                    self._send(asked[number], due)
        return fates

    def close(self) -> None:
        """Close it. Idempotent."""
        self._socket.close()

    # -- inside ------------------------------------------------------------------------------------

    def _log_in(self, user: str, secret: str, database: int, due: float) -> None:
        needed = []
        if secret:  # without one glide does not log in either
            needed.append(_command(b"AUTH", (user or "default").encode(), secret.encode()))
        if database:
            needed.append(_command(b"SELECT", b"%d" % database))
        name = _command(b"CLIENT", b"SETINFO", b"LIB-NAME", CLIENT_NAME.encode())
        with self._answering("no connection in time"):
            self._send(b"".join([*needed, name]), due)
            for _ in needed:
                if (line := self._line(due))[:1] == b"-":
                    raise said(_words(line))
            # Old servers know no such names, and some users may not tell one.
            if TOO_MANY in (words := _words(self._line(due))):
                self._complaint = words

    @contextmanager
    def _answering(self, late: str) -> Iterator[None]:
        """What an error of the socket's is for a chunk."""
        try:
            yield
        except (TimeoutError, BlockingIOError) as error:
            raise Failure(Fate.LATE, late) from error
        except OSError as error:
            raise Ended(self._complaint) from error

    def _value(self, buffer: memoryview, due: float) -> Fate:
        line = self._line(due)
        if line == b"*1":
            line = self._line(due)
        if line[:1] == b"-":
            raise said(_words(line))
        if line == b"$-1":
            return Fate.GONE
        if not _LENGTH.fullmatch(line):
            raise _no_value()
        size = int(line[1:])
        if size > len(buffer) + _MOST_SURPLUS:
            self.close()
            return Fate.CORRUPT
        if size == len(buffer):
            self._fill(buffer, due)
        else:
            self._throw_away(size, due)
        while len(self._unread) < len(_END):
            self._unread += self._some(_LITTLE, due)
        if not self._unread.startswith(_END):
            raise _no_value()
        self._unread = self._unread[len(_END) :]
        return Fate.DONE if size == len(buffer) else Fate.CORRUPT

    def _fill(self, buffer: memoryview, due: float) -> None:
        come = len(some := self._unread[: len(buffer)])
        buffer[:come], self._unread = some, self._unread[come:]
        while come < len(buffer):
            self._arm(socket.SO_RCVTIMEO, due)
            # One call for all of it: each takes the interpreter's lock anew.
            more = self._socket.recv_into(buffer[come:], 0, socket.MSG_WAITALL)
            if not more:
                raise ConnectionError
            come += more

    def _line(self, due: float) -> bytes:
        while (end := self._unread.find(_END)) < 0:
            if len(self._unread) > _LONGEST_LINE:
                raise Failure(Fate.DOWN, "an answer that is no line")
            self._unread += self._some(_LITTLE, due)
        line, self._unread = self._unread[:end], self._unread[end + len(_END) :]
        return line

    def _throw_away(self, count: int, due: float) -> None:
        gone = min(count, len(self._unread))
        self._unread = self._unread[gone:]
        while gone < count:
            gone += len(self._some(min(_SCRAP, count - gone), due))

    def _some(self, most: int, due: float) -> bytes:
        self._arm(socket.SO_RCVTIMEO, due)
        if not (some := self._socket.recv(most)):
            raise ConnectionError
        return some

    def _send(self, data: bytes, due: float) -> None:
        self._arm(socket.SO_SNDTIMEO, due)
        with suppress(ConnectionError):  # what the server said before it hung up is read next
            self._socket.sendall(data)

    def _arm(self, option: int, due: float) -> None:
        """The next call on the socket ends in time, even if some bytes come now and then."""
        if time.monotonic() >= due:
            raise TimeoutError
        seconds, rest = divmod(left(due), 1)
        timeout = struct.pack("@ll", int(seconds), int(rest * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, option, timeout)


def _no_value() -> Failure:
    return Failure(Fate.DOWN, "an answer that is no value")


def _command(*words: bytes) -> bytes:
    parts = (b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
    return b"*%d\r\n%s" % (len(words), b"".join(parts))


def _words(line: bytes) -> str:
    return line[1:].decode(errors="replace")
