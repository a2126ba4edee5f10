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

import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from glide_shared.exceptions import RequestError

from lamina_kv.tiers.contract import Fate
from lamina_kv.tiers.valkey.config import ValkeyConfig
from lamina_kv.tiers.valkey.connection import (
    CLIENT_NAME,
    TOO_LONG,
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

_LONGEST_LINE = 1 << 16
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
            client.exists([name])

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
        with self._lock:
            wire = self._idle.pop() if self._idle else None
        if wire is not None:
            try:
                return self._read(wire, names, buffers, due)
            except Ended:
                pass  # while it was idle, perhaps, as servers do
        return self._read(Wire(self._config, due), names, buffers, due)

    def probe(self, name: bytes, timeout: float) -> None:
        """See the protocol."""
        self.read([name], [memoryview(bytearray(1))], timeout)

    def close(self) -> None:
        """See the protocol."""
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _read(
        self, wire: Wire, names: Sequence[bytes], buffers: Sequence[memoryview], due: float
    ) -> list[Fate]:
        try:
            fates = wire.read(names, buffers, due)
        except BaseException:
            wire.close()
            self.close()  # what is wrong with one may be wrong with those made before it, too
            raise
        with self._lock:
            self._idle.append(wire)
        return fates


class Ended(Failure):
    """The server has ended the connection."""

    def __init__(self) -> None:
        super().__init__(Fate.DOWN, "the connection has ended")


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
        self._due = due
        secret = password(config)
        self._socket = connect(config.url, due)
        try:
            self._socket.settimeout(None)  # the kernel's timeouts hold for a whole value
            if not config.url.socket:
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._log_in(config.url.user, secret, config.url.database)
        except BaseException:
            self.close()
            raise

    def read(self, names: Sequence[bytes], buffers: Sequence[memoryview], due: float) -> list[Fate]:
        """See :class:`Reading`."""
        self._due = due
        ahead = max(1, AHEAD_BYTES // len(buffers[0]))
        # A value that is no string is none to MGET, and an error to GET.
        asked = [_command(b"MGET", name) for name in names]
        fates = []
        with self._answering("no answer in time"):
            self._send(b"".join(asked[:ahead]))
            for number, buffer in enumerate(buffers, ahead):
                fates.append(self._value(buffer))
                if number < len(asked):
                    self._send(asked[number])
        return fates

    def close(self) -> None:
        """Close it. Idempotent."""
        self._socket.close()

    # -- inside ------------------------------------------------------------------------------------

    def _log_in(self, user: str, secret: str, database: int) -> None:
        needed = []
        if user or secret:
            needed.append(_command(b"AUTH", *(word.encode() for word in (user, secret) if word)))
        if database:
            needed.append(_command(b"SELECT", b"%d" % database))
        name = _command(b"CLIENT", b"SETINFO", b"LIB-NAME", CLIENT_NAME.encode())
        with self._answering("no connection in time"):
            self._send(b"".join([*needed, name]))
            for _ in needed:
                if (line := self._line())[:1] == b"-":
                    raise said(_words(line))
            self._line()  # old servers know no such names, and some users may not tell one

    @contextmanager
    def _answering(self, late: str) -> Iterator[None]:
        """What an error of the socket's is for a chunk."""
        try:
            yield
        except (TimeoutError, BlockingIOError) as error:
            raise Failure(Fate.LATE, late) from error
        except OSError as error:
            raise Ended from error

    def _value(self, buffer: memoryview) -> Fate:
        line = self._line()
        if line == b"*1":
            line = self._line()
        if line[:1] == b"-":
            raise said(_words(line))
        if line[:1] != b"$" or not line[1:].removeprefix(b"-").isdigit():
            raise Failure(Fate.DOWN, "an answer that is no value")
        if (size := int(line[1:])) < 0:
            return Fate.GONE
        if size != len(buffer):
            self._throw_away(size + 2)
            return Fate.CORRUPT
        self._fill(buffer)
        self._throw_away(2)
        return Fate.DONE

    def _fill(self, buffer: memoryview) -> None:
        come = len(some := self._unread[: len(buffer)])
        buffer[:come], self._unread = some, self._unread[come:]
        while come < len(buffer):
            self._arm(socket.SO_RCVTIMEO)
            # One call for all of it: each takes the interpreter's lock anew.
            more = self._socket.recv_into(buffer[come:], 0, socket.MSG_WAITALL)
            if not more:
                raise Ended
            come += more

    def _line(self) -> bytes:
        while (end := self._unread.find(b"\r\n")) < 0:
            if len(self._unread) > _LONGEST_LINE:
                raise Failure(Fate.DOWN, "an answer that is no line")
            self._unread += self._some(64)  # of a value as little as can be: it is copied
        line, self._unread = self._unread[:end], self._unread[end + 2 :]
        return line

    def _throw_away(self, count: int) -> None:
        gone = min(count, len(self._unread))
        self._unread = self._unread[gone:]
        while gone < count:
            gone += len(self._some(min(_SCRAP, count - gone)))

    def _some(self, most: int) -> bytes:
        self._arm(socket.SO_RCVTIMEO)
        if not (some := self._socket.recv(most)):
            raise Ended
        return some

    def _send(self, data: bytes) -> None:
        self._arm(socket.SO_SNDTIMEO)
        self._socket.sendall(data)

    def _arm(self, option: int) -> None:
        """The next call on the socket ends in time, even if some bytes come now and then."""
        if time.monotonic() >= self._due:
            raise TimeoutError
        seconds, rest = divmod(left(self._due), 1)
        timeout = struct.pack("@ll", int(seconds), int(rest * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, option, timeout)


def _command(*words: bytes) -> bytes:
    parts = (b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
    return b"*%d\r\n%s" % (len(words), b"".join(parts))


def _words(line: bytes) -> str:
    return line[1:].decode(errors="replace")
