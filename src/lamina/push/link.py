"""The link: connections between the schedulers of two engines, on a thread of their own.

A decode engine dials the prefill engines that its requests name; a prefill engine listens. Messages
on a connection are in order. A peer that is silent for too long, says what nobody understands, or
lets too much queue up is disconnected, and both sides give up what they had under way with each
other.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import logging
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeVar

from lamina.push.cards import EngineCard
from lamina.push.inbox import Inbox, Mailbox
from lamina.push.letters import Fate, Letter, Lost, News, Opened
from lamina.push.messages import (
    LENGTH_BYTES,
    MAX_MESSAGE,
    VERSION,
    Announce,
    Fenced,
    Hello,
    LinkMessage,
    MalformedMessageError,
    Ping,
    Refused,
    Welcome,
    decode,
    encode,
)

log = logging.getLogger("lamina.push")

T = TypeVar("T")

MAX_QUEUED = 64 << 20
"""Bytes that wait for a peer that does not read; beyond it the connection is closed."""

PINGS = 4
"""Pings in the time after which silence means that a peer is gone."""


_NO_SUCH_ADDRESS = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
"""A name may stand for an address of a family that this machine does not have."""


class LinkClosedError(Exception):
    """A connection is over; says why."""


class PeerSilentError(LinkClosedError):
    """Nothing has come from a peer for too long."""


@dataclass(slots=True)
class Connection:
    """One connection.

    Attributes:
        peer: the other side's name, once it is known.
        writer: where messages go.
        box: what has come on it and waits for control.
        queued: messages that wait for the connection to be made.
        full: whether it was closed because too much waited for the peer.
    """

    peer: str
    writer: asyncio.StreamWriter | None = None
    box: Mailbox = field(default_factory=Mailbox)
    queued: list[LinkMessage] = field(default_factory=list)
    full: bool = False

    def open(self, writer: asyncio.StreamWriter) -> None:
        """The connection is made: what waited for it goes out."""
        self.writer = writer
        queued, self.queued = self.queued, []
        for message in queued:
            self.say(message)

    def say(self, message: LinkMessage) -> None:
        """Send a message, or keep it until the connection is made."""
        if self.writer is None:
            self.queued.append(message)
            return
        if self.full:
            return
        data = encode(message)
        self.writer.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        transport = self.writer.transport
        if transport.get_write_buffer_size() > MAX_QUEUED:
            self.full = True
            transport.abort()


def listen_at(address: str) -> list[socket.socket]:
    """Sockets that listen at an address: whoever connects waits until a link takes it up. There is
    one for each address that the host's name stands for and this machine has, all with one port.

    Raises:
        OSError: if nobody can listen there.
    """
    host, port = split_address(address)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    listening: list[socket.socket] = []
    missing: OSError | None = None
    with contextlib.ExitStack() as opened:
        for family, (name, *_) in dict.fromkeys((family, place) for family, *_, place in found):
            try:
                server = socket.create_server((name, port), family=family)
            except OSError as error:
                if error.errno not in _NO_SUCH_ADDRESS:
                    raise
                missing = error
                continue
            listening.append(opened.enter_context(server))
            port = server.getsockname()[1]
        if missing is not None and not listening:
            raise missing
        opened.pop_all()
    return listening


class Link:
    """See the module.

    Args:
        card: who this engine is.
        servers: where it listens, see :func:`listen_at`; none to dial only.
        token: a secret that both sides must have; None for none.
        silence: seconds without a word after which a peer is gone.
        wake: called by the link's thread when there are news.
    """

    def __init__(
        self,
        card: EngineCard,
        *,
        servers: Sequence[socket.socket],
        token: str | None,
        silence: float,
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        self._card = card
        self._token = token or ""
        self._silence = silence
        self._inbox = Inbox(wake)
        self._reminder = -inf
        self._dialled: dict[str, Connection] = {}
        self._accepted: dict[str, Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self.port = int(servers[0].getsockname()[1]) if servers else 0
        self._servers = [
            self._loop.run_until_complete(asyncio.start_server(self._accept, sock=server))
            for server in servers
        ]
        self._thread = threading.Thread(target=self._run, name="lamina-link", daemon=True)
        self._thread.start()

    # -- the scheduler's thread --------------------------------------------------------------

    def send(self, letter: Letter) -> None:
        """Say something to a peer: a prefill engine by its address, which is dialled if need be, or
        a decode engine by its incarnation. Returns at once; what cannot be delivered becomes
        :class:`~lamina.push.letters.Lost`."""
        self._loop.call_soon_threadsafe(self._send, letter)

    def news(self) -> list[News]:
        """What has happened since the last call."""
        return self._inbox.take()

    @property
    def has_news(self) -> bool:
        """Whether :meth:`news` would say anything."""
        return bool(self._inbox)

    def remind(self, seconds: float) -> None:
        """Have news after so many seconds, if not before."""
        now = time.monotonic()
        if seconds < inf and not now < self._reminder <= now + seconds:
            self._reminder = now + seconds
            self._loop.call_soon_threadsafe(self._loop.call_at, self._reminder, self._inbox.due)

    def close(self) -> None:
        """Close every connection and stop. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(self._silence)

    # -- the link's thread -------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            for task in self._tasks:
                task.cancel()
            gathered = asyncio.gather(*self._tasks, return_exceptions=True)
            self._loop.run_until_complete(gathered)
            for server in self._servers:
                server.close()
            self._loop.close()

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, letter: Letter) -> None:
        if (connection := self._accepted.get(letter.peer)) is not None:
            connection.say(letter.message)
            return
        try:
            split_address(letter.peer)
        except ValueError:
            return  # a decode engine that is gone: it was reported as lost
        connection = self._dialled.get(letter.peer)
        if connection is None:
            connection = self._dialled[letter.peer] = Connection(letter.peer)
            self._spawn(self._dial(connection))
        connection.say(letter.message)

    async def _dial(self, connection: Connection) -> None:
        """A connection to a prefill engine, from its beginning to its end."""
        was_open, reason, fate = False, "closed", Fate.CLOSED
        writer: asyncio.StreamWriter | None = None
        try:
            host, port = split_address(connection.peer)
            reader, opened = await self._in_time(asyncio.open_connection(host, port))
            writer = opened
            Connection(connection.peer, opened).say(Hello(VERSION, self._token, self._card))
            answer, _ = await self._in_time(_read(reader))
            welcome = _welcome(answer)
            was_open = True
            self._inbox.opened(connection.box, Opened(connection.peer, welcome.incarnation))
            connection.open(opened)
            await self._converse(reader, connection)
        except TimeoutError:
            reason = f"no answer within {self._silence:g} s"
            fate = Fate.UNREACHABLE if writer is None else Fate.SILENT
        except (OSError, LinkClosedError, MalformedMessageError) as error:
            reason, fate = str(error), _fate(error)
        finally:
            if writer is not None:
                writer.transport.abort()
            if self._dialled.get(connection.peer) is connection:
                del self._dialled[connection.peer]
            unsent = tuple(m.attempt for m in connection.queued if isinstance(m, Announce))
            lost = Lost(connection.peer, reason, was_open, fate, unsent)
            self._inbox.lost(connection.box, lost, forget=False)  # it may have fenced something

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection from a decode engine, from its beginning to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        connection = Connection("", writer)
        reason = "closed"
        try:
            hello, _ = await self._in_time(_read(reader))
            if refusal := self._refusal(hello):
                log.warning("a decode engine was refused: %s", refusal)
                connection.say(Refused(refusal))
                await writer.drain()
                return
            assert isinstance(hello, Hello)
            peer = hello.card.incarnation
            if (former := self._accepted.pop(peer, None)) is not None:
                self._lose(former, "it has connected anew")
            connection.peer = peer
            self._accepted[peer] = connection
            self._inbox.opened(connection.box, Opened(peer, peer, hello.card))
            connection.say(Welcome(VERSION, self._card.incarnation))
            await self._converse(reader, connection)
        except TimeoutError:
            reason = "no hello in time"
        except (OSError, LinkClosedError, MalformedMessageError) as error:
            reason = str(error)
        except asyncio.CancelledError:
            pass  # this side ends; asyncio's server would complain of a task that was cancelled
        finally:
            writer.close()
            if connection.peer and self._accepted.get(connection.peer) is connection:
                del self._accepted[connection.peer]
                self._lose(connection, reason)

    def _lose(self, connection: Connection, reason: str) -> None:
        if connection.writer is not None:
            connection.writer.transport.abort()
        lost = Lost(connection.peer, reason, was_open=True, fate=Fate.CLOSED)
        self._inbox.lost(connection.box, lost, forget=True)

    def _refusal(self, hello: LinkMessage) -> str:
        if not isinstance(hello, Hello):
            return f"expected hello, not {type(hello).__name__}"
        if hello.version != VERSION:
            return f"this side speaks version {VERSION}, not {hello.version}"
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            return "push.token differs"
        return ""

    async def _converse(self, reader: asyncio.StreamReader, connection: Connection) -> None:
        """Take in messages until the connection is over."""
        pings = self._loop.create_task(self._ping(connection))
        try:
            while True:
                await self._room(connection.box)
                try:
                    message, size = await self._in_time(_read(reader))
                except TimeoutError:
                    raise PeerSilentError(f"silent for {self._silence:g} s") from None
                except (OSError, LinkClosedError):
                    if connection.full:
                        raise PeerSilentError("it does not read what it is told") from None
                    raise
                if isinstance(message, Ping):
                    continue
                letter = Letter(connection.peer, message)
                if (never := self._inbox.letter(connection.box, letter, size)) is not None:
                    connection.say(Fenced(never, clean=True))
        finally:
            pings.cancel()

    async def _room(self, box: Mailbox) -> None:
        """Wait until control has taken up enough of what a peer has said. That says nothing about
        the peer, however long it takes."""
        room = asyncio.Event()

        def resume() -> None:
            self._loop.call_soon_threadsafe(room.set)

        while self._inbox.is_full(box, resume):
            await room.wait()
            room.clear()

    async def _in_time(self, waited_for: Coroutine[object, object, T]) -> T:
        """What comes of it, if that takes no longer than the silence. Time for which this process
        itself was stopped counts as little: it says nothing about a peer, whose words may be here.

        Raises:
            TimeoutError: if it takes longer.
        """
        task = self._loop.create_task(waited_for)
        try:
            for _ in range(PINGS):
                await asyncio.wait({task}, timeout=self._silence / PINGS)
                if task.done():
                    return task.result()
        finally:
            task.cancel()
        raise TimeoutError

    async def _ping(self, connection: Connection) -> None:
        while True:
            await asyncio.sleep(self._silence / PINGS)
            connection.say(Ping())


def _fate(error: Exception) -> Fate:
    if isinstance(error, PeerSilentError):
        return Fate.SILENT
    refused = isinstance(error, ConnectionError | LinkClosedError | MalformedMessageError)
    return Fate.CLOSED if refused else Fate.UNREACHABLE


def _welcome(answer: LinkMessage) -> Welcome:
    match answer:
        case Welcome(version) if version == VERSION:
            return answer
        case Welcome(version):
            raise LinkClosedError(f"it speaks version {version}, not {VERSION}")
        case Refused(reason):
            raise LinkClosedError(f"it refuses: {reason}")
    raise LinkClosedError(f"it said {type(answer).__name__} first")


async def _read(reader: asyncio.StreamReader) -> tuple[LinkMessage, int]:
    """A message, and its bytes."""
    try:
        size = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
        if size > MAX_MESSAGE:
            raise MalformedMessageError(f"a message of {size} bytes")
        return decode(await reader.readexactly(size)), size
    except asyncio.IncompleteReadError as error:
        raise LinkClosedError("the other side has closed the connection") from error


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        ValueError: if it is not of that form.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 <= int(port) < 1 << 16):
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)
