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
import functools
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeVar

from msgspec.structs import replace

from lamina_kv.push.addresses import split_address
from lamina_kv.push.cards import EngineCard, SenderCard
from lamina_kv.push.complaints import Complaints, printable
from lamina_kv.push.handshake import (
    NONCE_BYTES,
    BrokenSealError,
    Nonces,
    Seal,
    Side,
    nonce,
    prove,
    proves,
)
from lamina_kv.push.inbox import Inbox, Mailbox, Take
from lamina_kv.push.letters import Fate, Letter, Lost, News, Opened, PeerName
from lamina_kv.push.messages import (
    LENGTH_BYTES,
    MAX_ANSWER,
    MAX_GREETING,
    MAX_MESSAGE,
    MAX_WELCOME,
    NO_EPOCH,
    VERSION,
    Announce,
    Challenge,
    Failed,
    Fenced,
    Goodbye,
    Hello,
    Introduction,
    LinkMessage,
    MalformedMessageError,
    Ping,
    Proof,
    Refused,
    Welcome,
    decode,
    encode,
)

log = logging.getLogger("lamina_kv.push")

T = TypeVar("T")

MAX_QUEUED = 64 << 20
"""Bytes that wait for a peer that does not read; beyond it the connection is closed."""

PINGS = 4
"""Pings in the time after which silence means that a peer is gone."""


MAX_KEEPALIVE = 32767
"""Seconds; Linux allows no more between two looks at a connection."""

LAST_WORDS = 1.0
"""Seconds for peers to hear what was said before the link is closed, and to hang up."""

BACKLOG = 4096
"""Connections that wait to be taken up while this process is stopped or has no time; the kernel
allows `net.core.somaxconn`. Whoever finds no place there cannot tell a stopped process from a
machine that is gone."""

MAX_STRANGERS = 64
"""Connections of which nobody knows yet whose they are."""

ANOTHER_TOKEN = "push.token differs"
CONNECTED = "it is connected already: name a prefill engine by one address everywhere"

_NO_SUCH_ADDRESS = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
"""A name may stand for an address of a family that this machine does not have."""


class LinkClosedError(Exception):
    """A connection is over; says why."""


class RefusedError(LinkClosedError):
    """This side does not talk to a peer; says why."""


class GoodbyeError(LinkClosedError):
    """A peer has ended.

    Args:
        goodbye: what it has said last.
    """

    def __init__(self, goodbye: Goodbye) -> None:
        super().__init__("it has ended")
        self.goodbye = goodbye


class PeerSilentError(LinkClosedError):
    """Nothing has come from a peer for too long."""


@dataclass(slots=True, eq=False)
class Connection:
    """One connection.

    Attributes:
        peer: the other side's name, once it is known.
        writer: where messages go.
        box: what has come on it and waits for control.
        queued: messages that wait for the connection to be made.
        announced: see :class:`~lamina_kv.push.letters.Lost`.
        unsent: what waits, as one piece, until the kernel has taken what was said before. From
            Python 3.12 on asyncio adds up all pieces that it keeps at every write: thousands of
            messages to a peer that does not read would keep the link's thread busy for minutes.
        sending: hands on what is unsent, while there is some.
        full: whether it was closed because too much waited for the peer.
        ended: whether this side has nothing more to say.
        ours: seals what is said, if there is a secret to do so, once both have proved it.
        theirs: opens what is heard.
    """

    peer: str
    writer: asyncio.StreamWriter | None = None
    box: Mailbox = field(default_factory=Mailbox)
    queued: list[LinkMessage] = field(default_factory=list)
    announced: int = NO_EPOCH
    unsent: bytearray = field(default_factory=bytearray)
    sending: asyncio.Task[None] | None = None
    full: bool = False
    ended: bool = False
    ours: Seal | None = None
    theirs: Seal | None = None

    def seal(self, secret: bytes, ours: Side, theirs: Side, nonces: Nonces) -> None:
        """Both sides have proved the secret: what follows is sealed."""
        if secret:
            self.ours, self.theirs = Seal(secret, ours, nonces), Seal(secret, theirs, nonces)

    def open(self, greeted: Connection) -> None:
        """The connection is made: what waited for it goes out."""
        self.writer, self.ours, self.theirs = greeted.writer, greeted.ours, greeted.theirs
        queued, self.queued = self.queued, []
        for message in queued:
            self.say(message)

    def say(self, message: LinkMessage) -> None:
        """Send a message, or keep it until the connection is made."""
        if self.writer is None:
            self.queued.append(message)
            return
        if self.full or self.ended:
            return
        data = encode(message)
        if self.ours is not None:
            data = self.ours.close(data)
        frame = len(data).to_bytes(LENGTH_BYTES, "little") + data
        waiting = len(self.unsent) + self.writer.transport.get_write_buffer_size()
        if not waiting:
            self.writer.write(frame)
        elif waiting + len(frame) > MAX_QUEUED:
            self.full = True
            self.writer.transport.abort()
        else:
            self.unsent += frame
            if self.sending is None:
                self.sending = asyncio.get_running_loop().create_task(self._send_rest(self.writer))

    async def _send_rest(self, writer: asyncio.StreamWriter) -> None:
        try:
            while self.unsent:
                await _taken(writer)
                rest, self.unsent = self.unsent, bytearray()
                writer.write(rest)
        except OSError:
            self.unsent.clear()  # nobody is there to take it
        finally:
            self.sending = None

    async def said(self) -> None:
        """Wait until this side's kernel has taken what was said. The connection stays open: of one
        that is closed while words wait, and aborted when they have gone, asyncio raises an
        AttributeError."""
        if self.sending is not None:
            await self.sending
        if self.writer is not None:
            with contextlib.suppress(OSError):
                await _taken(self.writer)

    async def end(self) -> None:
        """Say nothing more, and wait until the peer has hung up. Who closes a connection on which
        something has come that he has not read takes back what the peer has not heard."""
        await self.said()
        assert self.writer is not None
        self.ended = True
        with contextlib.suppress(OSError):
            self.writer.write_eof()
            await self.writer.wait_closed()


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
                server = socket.create_server((name, port), family=family, backlog=BACKLOG)
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
        take: see :class:`~lamina_kv.push.inbox.Inbox`.
    """

    def __init__(
        self,
        card: EngineCard,
        *,
        servers: Sequence[socket.socket],
        token: str | None,
        silence: float,
        wake: Callable[[], object] = lambda: None,
        take: Take = lambda peer, announce: False,
    ) -> None:
        self._card = card
        self._secret = (token or "").encode()
        self._silence = silence
        self._inbox = Inbox(wake, take)
        self._reminder = -inf
        self._dialled: dict[str, Connection] = {}
        self._accepted: dict[str, Connection] = {}
        self._met: set[str] = set()
        self._strangers: dict[Connection, None] = {}
        self._complaints = Complaints(log)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ends = False
        self._goodbye: Callable[[PeerName], Goodbye] | None = None
        self._loop = asyncio.new_event_loop()
        self.port = int(servers[0].getsockname()[1]) if servers else 0
        self._servers = [
            self._loop.run_until_complete(
                asyncio.start_server(self._accept, sock=server, backlog=BACKLOG)
            )
            for server in servers
        ]
        self._thread = threading.Thread(target=self._run, name="lamina-link", daemon=True)
        self._thread.start()

    # -- the scheduler's thread --------------------------------------------------------------

    def send(self, letter: Letter) -> None:
        """Say something to a peer: a prefill engine by its address, which is dialled if need be, or
        a decode engine by its incarnation. Returns at once; what cannot be delivered becomes
        :class:`~lamina_kv.push.letters.Lost`."""
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

    def close(self, goodbye: Callable[[PeerName], Goodbye] | None = None) -> None:
        """Say what was to be said, close every connection and stop. Idempotent.

        Args:
            goodbye: the last word to a decode engine, which is said to each that is connected,
                whether control has heard of it or not. Called by the link's thread. None for none.
        """
        if self._thread.is_alive():
            self._goodbye = goodbye
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(self._silence + LAST_WORDS)

    # -- the link's thread -------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._say_last_words())
            for task in self._tasks:
                task.cancel()
            gathered = asyncio.gather(*self._tasks, return_exceptions=True)
            self._loop.run_until_complete(gathered)
            self._loop.close()

    async def _say_last_words(self) -> None:
        """Wait until peers have heard what was said, but not for those that hear nothing."""
        self._ends = True
        for server in self._servers:
            server.close()  # whoever dials from here on finds nobody, and has announced nothing
        for connection in self._accepted.values():
            if self._goodbye is not None:
                connection.say(self._goodbye(connection.peer))
        words = (
            *(connection.end() for connection in self._accepted.values()),
            *(connection.said() for connection in self._dialled.values()),
        )
        said = [self._loop.create_task(each) for each in words]
        if said:
            _, late = await asyncio.wait(said, timeout=LAST_WORDS)
            for task in late:
                task.cancel()

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, letter: Letter) -> None:
        if (connection := self._accepted.get(letter.peer)) is not None:
            connection.say(_fit_for_a_log(letter.message))
            return
        try:
            split_address(letter.peer)
        except ValueError:
            return  # a decode engine that is gone: it was reported as lost
        connection = self._dialled.get(letter.peer)
        if connection is None:
            connection = self._dialled[letter.peer] = Connection(letter.peer)
            self._spawn(self._dial(connection))
        if isinstance(letter.message, Announce):
            connection.announced = letter.message.attempt.epoch
        connection.say(letter.message)

    async def _dial(self, connection: Connection) -> None:
        """A connection to a prefill engine, from its beginning to its end."""
        was_open, reason, fate = False, "closed", Fate.CLOSED
        goodbye: Goodbye | None = None
        writer: asyncio.StreamWriter | None = None
        try:
            places = await self._look_up(connection.peer)
            reader, opened = await self._in_time(_open(places, self._silence))
            writer = opened
            greeted = Connection(connection.peer, opened)
            card = await self._meet_prefill(reader, greeted, connection)
            was_open = True
            self._met.add(connection.peer)
            machine = str(opened.get_extra_info("peername")[0])
            news = Opened(connection.peer, card.incarnation, card, machine)
            self._inbox.opened(connection.box, news)
            connection.open(greeted)
            await self._converse(reader, connection, MAX_ANSWER)
        except (OSError, LinkClosedError, MalformedMessageError) as error:
            reason, fate = str(error) or self._no_answer, _fate(error)
            goodbye = error.goodbye if isinstance(error, GoodbyeError) else None
        finally:
            if writer is not None:
                writer.transport.abort()
            if self._dialled.get(connection.peer) is connection:
                del self._dialled[connection.peer]
            self._report(connection, reason, fate, was_open=was_open, goodbye=goodbye)

    async def _look_up(self, address: str) -> list[Place]:
        """Where a name leads. A resolver that is slow says nothing of who is there.

        Raises:
            OSError: if it leads nowhere, or nobody says so in time.
        """
        try:
            return await self._in_time(_look_up(address))
        except TimeoutError:
            raise OSError(f"its name was not resolved within {self._silence:g} s") from None

    def _report(
        self,
        connection: Connection,
        reason: str,
        fate: Fate,
        *,
        was_open: bool = False,
        goodbye: Goodbye | None = None,
    ) -> None:
        """A prefill engine is lost, and what waited to be said to it."""
        queued, connection.queued = connection.queued, []
        unsent = tuple(m.attempt for m in queued if isinstance(m, Announce))
        lost = Lost(connection.peer, reason, was_open, fate, connection.announced, unsent, goodbye)
        self._inbox.lost(connection.box, lost, forget=False)  # it may have fenced something

    @property
    def _no_answer(self) -> str:
        return f"no answer within {self._silence:g} s"

    async def _meet_prefill(
        self, reader: asyncio.StreamReader, connection: Connection, dialled: Connection
    ) -> SenderCard:
        """Who listens at an address; it has proved that it is one of us.

        One that is known and may be stopped is waited for, however long: as long as its kernel
        keeps the connection, its process is there, and every further one would take a place from
        those that wait for it.

        Args:
            reader: what it says.
            connection: what is said to it.
            dialled: what others have to say to it meanwhile.

        Raises:
            LinkClosedError: if it has not.
        """

        def late() -> None:
            if dialled.queued:
                self._report(dialled, self._no_answer, Fate.SILENT)

        late_one = late if connection.peer in self._met else None
        mine = nonce()
        connection.say(Hello(VERSION, mine))
        match await self._hear(reader, connection, MAX_GREETING, late_one):
            case Challenge(version) if version != VERSION:
                raise LinkClosedError(f"it speaks version {version}, not {VERSION}")
            case Challenge(_, theirs, proof):
                nonces = Nonces(decode=mine, prefill=theirs)
            case other:
                raise LinkClosedError(_unexpected(other, "challenge"))
        if len(theirs) != NONCE_BYTES or not proves(proof, self._secret, Side.PREFILL, nonces):
            connection.say(Refused(ANOTHER_TOKEN))
            raise LinkClosedError(ANOTHER_TOKEN)
        connection.say(Proof(prove(self._secret, Side.DECODE, nonces)))
        connection.seal(self._secret, Side.DECODE, Side.PREFILL, nonces)
        connection.say(Introduction(self._card))
        match await self._hear(reader, connection, MAX_WELCOME, late_one):
            case Welcome(card):
                return card
            case other:
                raise LinkClosedError(_unexpected(other, "welcome"))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection from a decode engine, from its beginning to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        connection = Connection("", writer)
        reason = "closed"
        try:
            card = await self._meet_decode(reader, connection)
            if self._ends:
                return
            peer = connection.peer = card.incarnation
            self._accepted[peer] = connection
            self._inbox.opened(connection.box, Opened(peer, peer, card))
            connection.say(Welcome(SenderCard.of(self._card)))
            await self._converse(reader, connection, MAX_MESSAGE)
        except RefusedError as refusal:
            self._complaints.warn(f"a decode engine was refused: {refusal}")
            connection.say(Refused(str(refusal)))
            with contextlib.suppress(TimeoutError):
                await self._in_time(connection.said())
        except MalformedMessageError as error:
            reason = str(error)
            if not connection.peer:
                self._complaints.warn(
                    f"somebody who is no decode engine has connected: {printable(reason)}"
                )
        except (OSError, LinkClosedError) as error:
            reason = str(error)
        except asyncio.CancelledError:
            pass  # this side ends; asyncio's server would complain of a task that was cancelled
        finally:
            writer.close()
            if connection.peer:
                del self._accepted[connection.peer]
                writer.transport.abort()
                lost = Lost(connection.peer, reason, was_open=True, fate=Fate.CLOSED)
                self._inbox.lost(connection.box, lost, forget=True)

    async def _meet_decode(
        self, reader: asyncio.StreamReader, connection: Connection
    ) -> EngineCard:
        """Who has dialled; it has proved that it is one of us.

        Raises:
            RefusedError: if it has not, or is connected already.
            LinkClosedError: if it does not want to talk to this side.
        """
        with self._among_strangers(connection):
            match await self._hear(reader, connection, MAX_GREETING):
                case Hello(version) if version != VERSION:
                    raise RefusedError(f"this side speaks version {VERSION}, not {version}")
                case Hello(_, theirs) if len(theirs) == NONCE_BYTES:
                    nonces = Nonces(decode=theirs, prefill=nonce())
                case other:
                    raise RefusedError(_unexpected(other, "hello"))
            mine = prove(self._secret, Side.PREFILL, nonces)
            connection.say(Challenge(VERSION, nonces.prefill, mine))
            match await self._hear(reader, connection, MAX_GREETING):
                case Proof(proof) if proves(proof, self._secret, Side.DECODE, nonces):
                    connection.seal(self._secret, Side.PREFILL, Side.DECODE, nonces)
                case Proof() | Refused():
                    raise RefusedError(ANOTHER_TOKEN)
                case other:
                    raise RefusedError(_unexpected(other, "proof"))
        match await self._hear(reader, connection, MAX_MESSAGE):
            # A colon is for addresses, which this side would dial.
            case Introduction(card) if not card.incarnation or ":" in card.incarnation:
                raise RefusedError("it does not say which run of an engine it is")
            case Introduction(card) if card.incarnation in self._accepted:
                raise RefusedError(CONNECTED)
            case Introduction(card):
                return card
            case other:
                raise RefusedError(_unexpected(other, "introduction"))

    @contextlib.contextmanager
    def _among_strangers(self, connection: Connection) -> Iterator[None]:
        """While nobody knows whether it is one of ours. If there are too many of those, the one
        that has been there longest must go: it takes no time to prove."""
        self._strangers[connection] = None
        if len(self._strangers) > MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            assert oldest.writer is not None
            oldest.writer.transport.abort()
        try:
            yield
        finally:
            self._strangers.pop(connection, None)

    async def _hear(
        self,
        reader: asyncio.StreamReader,
        connection: Connection,
        limit: int,
        late: Callable[[], None] | None = None,
    ) -> LinkMessage:
        """What a peer says that this side waits for.

        Raises:
            PeerSilentError: if it says nothing.
            LinkClosedError: if it will not.
        """
        try:
            message, _ = await self._in_time(_read(reader, limit, connection.theirs), late)
        except TimeoutError as error:
            raise self._silent(connection, error, self._no_answer) from None
        return message

    async def _converse(
        self, reader: asyncio.StreamReader, connection: Connection, limit: int
    ) -> None:
        """Take in messages, of ``limit`` bytes at most, until the connection is over."""
        pings = self._loop.create_task(self._ping(connection))
        try:
            while True:
                await self._room(connection.box)
                try:
                    message, size = await self._in_time(_read(reader, limit, connection.theirs))
                except TimeoutError as error:
                    why = f"silent for {self._silence:g} s"
                    raise self._silent(connection, error, why) from None
                except (OSError, LinkClosedError):
                    if connection.full:
                        raise PeerSilentError("it does not read what it is told") from None
                    raise
                if isinstance(message, Ping):
                    continue
                if isinstance(message, Goodbye):
                    raise GoodbyeError(message)
                letter = Letter(connection.peer, _fit_for_a_log(message))
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

    def _silent(self, connection: Connection, error: TimeoutError, why: str) -> Exception:
        """Nothing has come from a peer for too long: its process is stopped, or hangs, as long as
        its kernel takes what it is told."""
        assert connection.writer is not None
        its = connection.writer.get_extra_info("socket")
        if error.errno == errno.ETIMEDOUT or not _acknowledges(its, self._silence / 2):
            return TimeoutError(errno.ETIMEDOUT, "its machine does not answer")
        return PeerSilentError(why)

    async def _in_time(
        self, waited_for: Coroutine[object, object, T], late: Callable[[], None] | None = None
    ) -> T:
        """What comes of it, if that takes no longer than the silence. Time for which this process
        itself was stopped counts as little: it says nothing about a peer, whose words may be here.

        Args:
            waited_for: what it is.
            late: called each time that the silence has passed, instead of giving up.

        Raises:
            TimeoutError: if it takes longer.
        """
        task = self._loop.create_task(waited_for)
        try:
            while True:
                for _ in range(PINGS):
                    await asyncio.wait({task}, timeout=self._silence / PINGS)
                    if task.done():
                        return task.result()
                if late is None:
                    raise TimeoutError
                late()
        finally:
            task.cancel()

    async def _ping(self, connection: Connection) -> None:
        while True:
            await asyncio.sleep(self._silence / PINGS)
            connection.say(Ping())


class Reader(asyncio.StreamReader):
    """What has come on a connection. How that ends is heard behind all that was said on it before:
    a peer's last words decide until when blocks are held.

    Attributes:
        error: with which it has ended; None if it has not, or in good order.
    """

    error: Exception | None = None

    def set_exception(self, exc: Exception) -> None:
        """The connection has ended with an error."""
        self.error = exc
        self.feed_eof()


class _ReaderProtocol(asyncio.StreamReaderProtocol):
    """Hears all that was said on a connection: one that ends because something could not be said on
    it may still have something to hear."""

    def __init__(
        self, reader: Reader, connected: socket.socket, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(reader, loop=loop)
        self._heard, self._connected = reader, connected

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        if exc is not None:
            with contextlib.suppress(OSError):
                while data := self._connected.recv(1 << 16):
                    self._heard.feed_data(data)
        super().connection_lost(exc)


async def _taken(writer: asyncio.StreamWriter) -> None:
    """Wait until this side's kernel has taken what was written.

    Raises:
        OSError: if the connection has ended before.
    """
    writer.transport.set_write_buffer_limits(high=0)
    await writer.drain()


def _fate(error: Exception) -> Fate:
    """What an error says of a peer."""
    match error:
        case PeerSilentError():
            return Fate.SILENT
        case ConnectionError() | LinkClosedError() | MalformedMessageError():
            return Fate.CLOSED
        case TimeoutError() | OSError(errno=errno.EHOSTUNREACH | errno.EHOSTDOWN):
            return Fate.UNREACHABLE
    return Fate.UNKNOWN


_LEAST_KNOWN = (Fate.UNKNOWN, Fate.CLOSED, Fate.UNREACHABLE)


def _acknowledges(connected: socket.socket, seconds: float) -> bool:
    """Whether the kernel at the other end takes what is sent there, or says that it has no room;
    not if it has said nothing of it for so many seconds."""
    info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    unacknowledged, milliseconds = _TCP_INFO.unpack(info)
    return not unacknowledged or milliseconds < seconds * 1000


_TCP_INFO = struct.Struct("=24x I 28x I")
"""Of Linux's `tcp_info`: `tcpi_unacked` and `tcpi_last_ack_recv`."""


def _fit_for_a_log(message: LinkMessage) -> LinkMessage:
    """A message whose reason, if it has one, is short: on either side, as a peer reads no more."""
    if isinstance(message, Failed):
        return replace(message, reason=printable(message.reason))
    return message


def _unexpected(message: LinkMessage, expected: str) -> str:
    """What to say of the wrong word."""
    if isinstance(message, Refused):
        return f"it refuses: {printable(message.reason)}"
    return f"expected {expected}, not {type(message).__name__.lower()}"


Place = tuple[int, tuple[object, ...]]
"""A family of addresses, and an address of it."""


async def _look_up(address: str) -> list[Place]:
    """The addresses that a name stands for.

    Raises:
        OSError: if there are none.
    """
    host, port = split_address(address)
    look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        try:
            found = look_up(flags=socket.AI_NUMERICHOST)
        except socket.gaierror:  # a name: others do not wait until it is resolved
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except ValueError as error:  # what is no name of a host, such as a..b
        raise OSError(f"{host!r} is not a host: {error}") from None
    return [(family, place) for family, *_, place in found]


async def _open(places: Sequence[Place], silence: float) -> tuple[Reader, asyncio.StreamWriter]:
    """A connection to one of several addresses.

    Raises:
        OSError: if there is none; of several errors the one that says most of who is there.
    """
    errors: list[OSError] = []
    for family, place in places:
        try:
            return await _connect(family, place, silence)
        except OSError as error:
            errors.append(error)
    raise max(errors, key=lambda error: _LEAST_KNOWN.index(_fate(error)))


async def _connect(
    family: int, place: tuple[object, ...], silence: float
) -> tuple[Reader, asyncio.StreamWriter]:
    """A connection that ends when the machine at its other end does, although nothing is said."""
    connecting = socket.socket(family, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        seconds = min(max(1, round(silence)), MAX_KEEPALIVE)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            connecting.setsockopt(socket.IPPROTO_TCP, option, seconds)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PINGS)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connecting, place)
        reader = Reader(loop=loop)
        protocol = _ReaderProtocol(reader, connecting, loop)
        transport, _ = await loop.create_connection(lambda: protocol, sock=connecting)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
    except BaseException:
        connecting.close()
        raise


async def _read(
    reader: asyncio.StreamReader, limit: int, seal: Seal | None
) -> tuple[LinkMessage, int]:
    """A message of no more than ``limit`` bytes, and its bytes."""
    try:
        size = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
        if size > limit:
            raise MalformedMessageError(f"a message of {size} bytes")
        data = await reader.readexactly(size)
        return decode(data if seal is None else seal.open(data)), size
    except asyncio.IncompleteReadError as error:
        if isinstance(reader, Reader) and reader.error is not None:
            raise reader.error from error
        raise LinkClosedError("the other side has closed the connection") from error
    except BrokenSealError as error:
        raise LinkClosedError(str(error)) from error
