"""The link tells two schedulers what each has to say, in order, and who is there; whoever is
silent, says what nobody understands, or does not read, is disconnected, with a word that says
whether its process is gone or only does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import msgspec
import pytest

from lamina_kv.bench.ports import free_port
from lamina_kv.push import inbox
from lamina_kv.push import link as link_module
from lamina_kv.push.addresses import split_address
from lamina_kv.push.cards import MAX_END, MAX_ENDS, EngineCard, RankCard, SenderCard
from lamina_kv.push.complaints import MAX_REASON
from lamina_kv.push.handshake import (
    NONCE_BYTES,
    BrokenSealError,
    NoCipherError,
    Nonces,
    Seal,
    check_cipher,
    nonce,
    prove,
    proves,
)
from lamina_kv.push.handshake import Side as Proves
from lamina_kv.push.letters import Due, Fate, Letter, Lost, News, Opened
from lamina_kv.push.link import BACKLOG, CONNECTED, LAST_WORDS, Link, listen_at
from lamina_kv.push.messages import (
    LENGTH_BYTES,
    MAX_ANSWER,
    MAX_CLAIMED,
    MAX_DIGEST,
    MAX_GREETING,
    MAX_ID,
    MAX_MESSAGE,
    MAX_WELCOME,
    NO_EPOCH,
    VERSION,
    Announce,
    Attempt,
    BlockTable,
    Bound,
    Cancel,
    Challenge,
    Claim,
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

SILENCE = 1.0
PATIENCE = 60.0
NEVER = 600.0
"""A silence that no test lives to see."""


def card(incarnation: str) -> EngineCard:
    rank = RankCard(0, b"wire", 10, (), "end")
    return EngineCard(incarnation, b"model", False, (("full", 32, 0),), (rank,))


def sender(incarnation: str) -> SenderCard:
    return SenderCard(incarnation, False, ("end",))


def met(address: str, incarnation: str) -> Opened:
    return Opened(address, incarnation, sender(incarnation), "127.0.0.1")


WELCOME = Welcome(sender("P"))


class Side:
    """A link, and what it has said so far."""

    def __init__(
        self,
        incarnation: str,
        *,
        listen: bool = False,
        port: int = 0,
        token: str | None = None,
        silence: float = NEVER,
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        self.card = card(incarnation)
        address = f"127.0.0.1:{port}" if listen else None
        self.link = Link(
            self.card,
            servers=[] if address is None else listen_at(address),
            token=token,
            silence=silence,
            wake=wake,
        )
        self.heard: list[News] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.link.port}"

    def until(self, count: int) -> list[News]:
        """What it has said, once it is so much."""
        deadline = time.monotonic() + PATIENCE
        while len(self.heard) < count:
            self.heard += self.link.news()
            assert time.monotonic() < deadline, self.heard
            time.sleep(0.002)
        return self.heard


Make = Callable[..., Side]


@pytest.fixture
def make() -> Iterator[Make]:
    sides: list[Side] = []

    def make(incarnation: str, **options: object) -> Side:
        sides.append(Side(incarnation, **options))  # type: ignore[arg-type]
        return sides[-1]

    yield make
    for side in sides:
        side.link.close()
        assert not side.link._thread.is_alive()


class Raw:
    """A peer that says what a test tells it to."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(PATIENCE)

    def say(self, *messages: LinkMessage | bytes) -> None:
        """Say something, as one piece."""
        bodies = [each if isinstance(each, bytes) else encode(each) for each in messages]
        pieces = (len(body).to_bytes(LENGTH_BYTES, "little") + body for body in bodies)
        self.connection.sendall(b"".join(pieces))

    def hear(self) -> LinkMessage | None:
        """The next message that is no ping; None at the end."""
        while isinstance(message := self.next(), Ping):
            pass
        return message

    def next(self) -> LinkMessage | None:
        """The next message; None at the end."""
        size = self._read(LENGTH_BYTES)
        if size is None:
            return None
        return decode(self._read(int.from_bytes(size, "little")) or b"")

    def _read(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            try:
                part = self.connection.recv(size - len(data))
            except ConnectionError:
                return None
            if not part:
                return None
            data += part
        return data


@pytest.fixture
def dial() -> Iterator[Callable[[Side], Raw]]:
    sockets: list[socket.socket] = []

    def dial(side: Side) -> Raw:
        sockets.append(socket.create_connection(("127.0.0.1", side.link.port)))
        return Raw(sockets[-1])

    yield dial
    for each in sockets:
        each.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)
        yield server


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


HELLO = Hello(VERSION, bytes(NONCE_BYTES))


def introduce(raw: Raw, incarnation: str, *, secret: bytes = b"") -> LinkMessage | None:
    """Do what a decode engine does, and return the answer."""
    raw.say(HELLO)
    challenge = raw.hear()
    assert isinstance(challenge, Challenge)
    nonces = Nonces(HELLO.nonce, challenge.nonce)
    assert proves(challenge.proof, secret, Proves.PREFILL, nonces)
    raw.say(Proof(prove(secret, Proves.DECODE, nonces)))
    raw.say(Introduction(card(incarnation)))
    return raw.hear()


def challenge(raw: Raw, *, secret: bytes = b"", version: int = VERSION) -> None:
    """Say what a prefill engine does to a decode engine's first word."""
    hello = raw.hear()
    assert isinstance(hello, Hello)
    mine = nonce()
    proof = prove(secret, Proves.PREFILL, Nonces(hello.nonce, mine))
    raw.say(Challenge(version, mine, proof))


def welcome(raw: Raw, side: Side, incarnation: str = "P") -> None:
    """Do what a prefill engine does."""
    challenge(raw)
    assert isinstance(raw.hear(), Proof)
    assert raw.hear() == Introduction(side.card)
    raw.say(Welcome(sender(incarnation)))


ANNOUNCE = Announce(
    Attempt("push", 7), b"digest", 32, 95, 60.0, (BlockTable(1, (4, -1)), BlockTable(2, (9,)))
)


# -- what is said --------------------------------------------------------------------------------


def test_everything_arrives_in_order(make: Make) -> None:
    prefill, decode_side = make("P", listen=True), make("D")
    sent = [ANNOUNCE, *(Cancel(Attempt("other", n)) for n in range(200))]
    for message in sent:
        decode_side.link.send(Letter(prefill.address, message))
    heard = prefill.until(1 + len(sent))
    assert heard == [Opened("D", "D", decode_side.card), *(Letter("D", m) for m in sent)]

    answers: list[LinkMessage] = [Bound(Attempt("push", 7)), Failed(Attempt("push", 7), "no")]
    for answer in answers:
        prefill.link.send(Letter("D", answer))
    assert decode_side.until(3) == [
        met(prefill.address, "P"),
        *(Letter(prefill.address, answer) for answer in answers),
    ]


def test_several_decode_engines(make: Make) -> None:
    prefill, first, second = make("P", listen=True), make("D1"), make("D2")
    for side in (first, second):
        side.link.send(Letter(prefill.address, Cancel(Attempt(side.card.incarnation, 1))))
    assert len(prefill.until(4)) == 4
    prefill.link.send(Letter("D2", Bound(Attempt("D2", 1))))
    assert second.until(2)[1] == Letter(prefill.address, Bound(Attempt("D2", 1)))
    first.until(1)
    assert first.link.news() == []


def test_equal_tokens(make: Make) -> None:
    prefill, decode_side = make("P", listen=True, token="s"), make("D", token="s")
    decode_side.link.send(Letter(prefill.address, ANNOUNCE))
    assert prefill.until(2)[1] == Letter("D", ANNOUNCE)


def test_pings_keep_it_alive(make: Make) -> None:
    """Of two that have nothing to say, neither loses the other."""
    prefill, decode_side = make("P", listen=True, silence=SILENCE), make("D", silence=SILENCE)
    decode_side.link.send(Letter(prefill.address, ANNOUNCE))
    prefill.until(2)
    decode_side.until(1)
    time.sleep(3 * SILENCE)
    prefill.link.send(Letter("D", Bound(ANNOUNCE.attempt)))
    assert decode_side.until(2)[1] == Letter(prefill.address, Bound(ANNOUNCE.attempt))
    assert prefill.link.news() == []


def test_it_wakes_whoever_waits_for_news(make: Make) -> None:
    """Once, until the news are taken: an engine that runs looks anyway."""
    woken = threading.Semaphore(0)
    prefill = make("P", listen=True, wake=woken.release)
    decode_side = make("D")
    decode_side.link.send(Letter(prefill.address, ANNOUNCE))
    assert woken.acquire(timeout=PATIENCE)
    prefill.until(2)
    decode_side.link.send(Letter(prefill.address, Cancel(ANNOUNCE.attempt)))
    assert woken.acquire(timeout=PATIENCE)
    assert prefill.until(3)[2] == Letter("D", Cancel(ANNOUNCE.attempt))


def test_it_has_news_when_control_wants_to_be_asked(make: Make) -> None:
    woken = threading.Semaphore(0)
    side = make("P", wake=woken.release)
    side.link.remind(float("inf"))
    side.link.remind(NEVER)
    side.link.remind(0.01)
    side.link.remind(NEVER)
    assert woken.acquire(timeout=PATIENCE)
    assert side.link.news() == [Due()]


def test_what_is_cancelled_before_control_has_seen_it_never_was(make: Make) -> None:
    """An engine that hangs need not answer, because nothing was sent. Its prompt does not wait."""
    prefill, decode_side = make("P", listen=True), make("D")
    other = Attempt("other", 8)
    for message in (
        ANNOUNCE,
        msgspec.structs.replace(ANNOUNCE, attempt=other),
        Cancel(ANNOUNCE.attempt),
    ):
        decode_side.link.send(Letter(prefill.address, message))
    assert decode_side.until(2) == [
        met(prefill.address, "P"),
        Letter(prefill.address, Fenced(ANNOUNCE.attempt, clean=True)),
    ]
    assert prefill.until(3)[1:] == [
        Letter("D", msgspec.structs.replace(ANNOUNCE, attempt=other)),
        Letter("D", Cancel(Attempt("push", NO_EPOCH))),
    ]
    # What it has seen is its own to answer.
    for _ in range(3):
        decode_side.link.send(Letter(prefill.address, Cancel(other)))
    assert prefill.until(4)[3] == Letter("D", Cancel(other))
    assert decode_side.link.news() == []


def test_what_waits_for_control_is_bounded(
    make: Make, dial: Callable[[Side], Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it a peer is not listened to, nor taken for silent: it may be this engine that hangs.
    Others are heard."""
    monkeypatch.setattr(inbox, "MAX_LETTERS", 4)
    side = make("P", listen=True, silence=SILENCE)
    raw = dial(side)
    assert introduce(raw, "D") == WELCOME
    words: list[LinkMessage] = [Cancel(Attempt(f"push {n}", 1)) for n in range(10)]
    for word in words:
        raw.say(word)
    # This side speaks all the time, which is more than twice as long as a peer may be silent.
    for _ in range(3 * link_module.PINGS):
        assert raw.next() == Ping()
    assert len(side.link._inbox._news) == 1 + 4
    other = dial(side)
    assert introduce(other, "other") == WELCOME
    other.say(ANNOUNCE)
    heard = [item for item in side.until(13) if item.peer == "D"]
    assert heard == [Opened("D", "D", card("D")), *(Letter("D", word) for word in words)]


def test_has_news(make: Make) -> None:
    prefill, decode_side = make("P", listen=True), make("D")
    assert not prefill.link.has_news
    decode_side.link.send(Letter(prefill.address, ANNOUNCE))
    prefill.until(2)
    assert not prefill.link.has_news
    decode_side.link.close()
    deadline = time.monotonic() + PATIENCE
    while not prefill.link.has_news:
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -- who is not there, or not one of us ----------------------------------------------------------


def test_nobody_listens(make: Make) -> None:
    address = f"127.0.0.1:{free_port()}"
    side = make("D")
    side.link.send(Letter(address, ANNOUNCE))
    (lost,) = side.until(1)
    assert isinstance(lost, Lost)
    assert (lost.peer, lost.was_open, lost.fate) == (address, False, Fate.CLOSED)


def test_the_reason_of_a_failure_is_fit_for_a_line_of_the_log(
    make: Make, listener: socket.socket
) -> None:
    side = make("D")
    with announced(side, listener) as raw:
        raw.say(Failed(ANNOUNCE.attempt, "no\x1b[2J\nroom" + "x" * 3_000))
        _, letter = side.until(2)
        assert isinstance(letter, Letter)
        assert isinstance(letter.message, Failed)
        reason = letter.message.reason
        assert reason.startswith("no[2Jroomx")
        assert len(reason) <= MAX_REASON


def test_a_reason_is_no_longer_than_its_peer_reads(make: Make) -> None:
    prefill, decode_side = make("P", listen=True), make("D")
    decode_side.link.send(Letter(prefill.address, ANNOUNCE))
    prefill.until(2)
    prefill.link.send(Letter("D", Failed(ANNOUNCE.attempt, "no room" * 10_000)))
    letter = decode_side.until(2)[1]
    assert isinstance(letter, Letter)
    assert isinstance(letter.message, Failed)


@pytest.mark.parametrize("answer", [False, True])
def test_a_prefill_engine_says_nothing_long(
    make: Make, listener: socket.socket, answer: bool
) -> None:
    """What a decode engine would have to read, take apart, and keep."""
    side = make("D")
    side.link.send(Letter(address_of(listener), ANNOUNCE))
    connection, _ = listener.accept()
    with connection:
        raw = Raw(connection)
        if answer:
            welcome(raw, side)
        else:
            challenge(raw)
        limit = MAX_ANSWER if answer else MAX_WELCOME
        raw.connection.sendall((limit + 1).to_bytes(LENGTH_BYTES, "little"))
        lost = side.until(1 + answer)[-1]
        assert isinstance(lost, Lost)
        assert lost.reason == f"a message of {limit + 1} bytes"


@pytest.mark.parametrize(
    ("longest", "longer"),
    [
        (Claim(("x",) * MAX_CLAIMED, 1.0), Claim(("x",) * (MAX_CLAIMED + 1), 1.0)),
        (Claim(("x" * MAX_ID,), 1.0), Claim(("x" * (MAX_ID + 1),), 1.0)),
        (Cancel(Attempt("x" * MAX_ID, 1)), Cancel(Attempt("x" * (MAX_ID + 1), 1))),
        (
            Welcome(SenderCard("P", False, ("x" * MAX_END,) * MAX_ENDS)),
            Welcome(SenderCard("P", False, ("x" * MAX_END,) * (MAX_ENDS + 1))),
        ),
        (
            Welcome(SenderCard("P", False, ("x" * MAX_END,))),
            Welcome(SenderCard("P", False, ("x" * (MAX_END + 1),))),
        ),
        (
            msgspec.structs.replace(ANNOUNCE, digest=bytes(MAX_DIGEST)),
            msgspec.structs.replace(ANNOUNCE, digest=bytes(MAX_DIGEST + 1)),
        ),
    ],
    ids=["claim", "claimed", "push", "ends", "end", "digest"],
)
def test_lists_and_names_have_an_end(longest: LinkMessage, longer: LinkMessage) -> None:
    assert decode(encode(longest)) == longest
    assert not isinstance(longest, Welcome) or len(encode(longest)) <= MAX_WELCOME
    with pytest.raises(MalformedMessageError):
        decode(encode(longer))


def test_nested_words_are_no_message(make: Make, dial: Callable[[Side], Raw]) -> None:
    side = make("P", listen=True)
    nested = b"\x94" + msgspec.msgpack.encode("delivered") + b"\x91" * 3000 + b"\x00"
    with pytest.raises(MalformedMessageError):
        decode(nested)
    raw = dial(side)
    raw.say(nested)
    assert raw.hear() is None
    assert introduce(dial(side), "D") == WELCOME


def test_a_host_that_is_not_known(make: Make) -> None:
    side = make("D")
    side.link.send(Letter("nowhere.invalid:1", ANNOUNCE))
    (lost,) = side.until(1)
    assert isinstance(lost, Lost)
    assert (lost.was_open, lost.fate) == (False, Fate.UNKNOWN)


def test_a_resolver_that_is_slow_says_nothing_of_a_peer(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = make("D", silence=SILENCE / 4)

    async def wait(*_: object, **__: object) -> None:
        await asyncio.sleep(NEVER)

    monkeypatch.setattr(side.link._loop, "getaddrinfo", wait)
    side.link.send(Letter("prefill.example:1", ANNOUNCE))
    (lost,) = side.until(1)
    assert isinstance(lost, Lost)
    assert (lost.was_open, lost.fate) == (False, Fate.UNKNOWN)
    assert "not resolved within" in lost.reason


@pytest.mark.parametrize(
    ("error", "fate"),
    [
        (errno.ECONNREFUSED, Fate.CLOSED),
        (errno.ECONNRESET, Fate.CLOSED),
        (errno.ETIMEDOUT, Fate.UNREACHABLE),
        (errno.EHOSTUNREACH, Fate.UNREACHABLE),
        (errno.EMFILE, Fate.UNKNOWN),
        (errno.EADDRNOTAVAIL, Fate.UNKNOWN),
        (errno.ENETUNREACH, Fate.UNKNOWN),
        (errno.ENOBUFS, Fate.UNKNOWN),
    ],
)
def test_what_an_error_says_of_a_peer(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: int, fate: Fate
) -> None:
    async def connect(*_: object) -> None:
        raise OSError(error, "no")

    monkeypatch.setattr(link_module, "_connect", connect)
    side = make("D")
    side.link.send(Letter("127.0.0.1:1", ANNOUNCE))
    (lost,) = side.until(1)
    assert isinstance(lost, Lost)
    assert lost.fate is fate


def test_a_name_of_several_addresses(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    side, port = make("D"), free_port()

    async def found(*_: object, **__: object) -> list[object]:
        hosts = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.2"))
        return [(family, socket.SOCK_STREAM, 0, "", (host, port)) for family, host in hosts]

    monkeypatch.setattr(side.link._loop, "getaddrinfo", found)
    side.link.send(Letter(f"prefill:{port}", ANNOUNCE))
    (lost,) = side.until(1)
    assert isinstance(lost, Lost)
    assert lost.fate is Fate.CLOSED


def test_many_may_wait_for_a_process_that_is_stopped() -> None:
    """As many as the system allows. Linux tells it as `tcpi_sacked` of a listening socket."""
    with open("/proc/sys/net/core/somaxconn") as file:
        most = min(BACKLOG, int(file.read()))
    (server,) = listen_at("127.0.0.1:0")
    link = Link(card("P"), servers=[server], token=None, silence=NEVER)
    try:
        (bound,) = (sock for made in link._servers for sock in made.sockets)
        info = bound.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        assert int.from_bytes(info[28:32], sys.byteorder) == most
    finally:
        link.close()


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".com"])
def test_a_host_that_is_none(make: Make, host: str) -> None:
    side = make("D")
    side.link.send(Letter(f"{host}:1", ANNOUNCE))
    (lost,) = side.until(1)
    assert isinstance(lost, Lost)
    assert "is not a host" in lost.reason
    assert (lost.was_open, lost.unsent) == (False, (ANNOUNCE.attempt,))


def test_a_letter_to_a_decode_engine_that_is_gone(make: Make) -> None:
    side = make("P", listen=True)
    side.link.send(Letter("D", Bound(ANNOUNCE.attempt)))
    other = make("D")
    other.link.send(Letter(side.address, ANNOUNCE))
    assert side.until(2)[1] == Letter("D", ANNOUNCE)


@pytest.mark.parametrize(("mine", "theirs"), [("a", "b"), ("a", None), (None, "b"), ("ä", "a")])
def test_another_token(
    make: Make, mine: str | None, theirs: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode_side = make("P", listen=True, token=mine), make("D", token=theirs)
    decode_side.link.send(Letter(prefill.address, ANNOUNCE))
    (lost,) = decode_side.until(1)
    assert lost == Lost(
        prefill.address,
        "push.token differs",
        was_open=False,
        fate=Fate.CLOSED,
        announced=ANNOUNCE.attempt.epoch,
        unsent=(ANNOUNCE.attempt,),
    )
    assert prefill.link.news() == []


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (Hello(VERSION + 1, HELLO.nonce), f"speaks version {VERSION}"),
        (Hello(VERSION, b"short"), "expected hello"),
        (Ping(), "expected hello"),
        (Introduction(card("D")), "expected hello"),
    ],
    ids=["version", "nonce", "ping", "introduction"],
)
def test_the_wrong_first_word(
    make: Make, dial: Callable[[Side], Raw], first: LinkMessage, words: str
) -> None:
    side = make("P", listen=True)
    raw = dial(side)
    raw.say(first)
    answer = raw.hear()
    assert isinstance(answer, Refused)
    assert words in answer.reason
    assert raw.hear() is None
    assert side.link.news() == []


@pytest.mark.parametrize("how", ["no secret", "reflected", "of another connection"])
def test_who_has_no_secret_is_refused(make: Make, dial: Callable[[Side], Raw], how: str) -> None:
    """And has learnt nothing that would help next time."""
    side = make("P", listen=True, token="secret")
    raw, other = dial(side), dial(side)
    proofs = []
    for each in (other, raw):
        each.say(HELLO)
        answer = each.hear()
        assert isinstance(answer, Challenge)
        proofs.append(
            {
                "no secret": prove(b"", Proves.DECODE, Nonces(HELLO.nonce, answer.nonce)),
                "reflected": answer.proof,
                "of another connection": prove(
                    b"secret", Proves.DECODE, Nonces(HELLO.nonce, answer.nonce)
                ),
            }[how]
        )
    raw.say(Proof(proofs[0]))
    raw.say(Introduction(card("D")))
    assert raw.hear() == Refused("push.token differs")
    assert raw.hear() is None
    assert side.link.news() == []


def test_what_a_stranger_may_say_is_short(
    make: Make, dial: Callable[[Side], Raw], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody reads, or takes apart, what is longer. It is said once."""
    side = make("P", listen=True)
    before, after = dial(side), dial(side)
    before.connection.sendall((MAX_GREETING + 1).to_bytes(LENGTH_BYTES, "little"))
    assert before.hear() is None
    after.say(HELLO)
    assert isinstance(after.hear(), Challenge)
    after.connection.sendall((MAX_GREETING + 1).to_bytes(LENGTH_BYTES, "little"))
    assert after.hear() is None
    (said,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "somebody who is no decode engine" in said.getMessage()


def test_strangers_leave_room_for_others(
    make: Make, dial: Callable[[Side], Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "MAX_STRANGERS", 2)
    side = make("P", listen=True)
    known = dial(side)
    assert introduce(known, "D") == WELCOME
    strangers = [dial(side) for _ in range(2)]
    for stranger in strangers:
        stranger.say(HELLO)
        assert isinstance(stranger.hear(), Challenge)
    assert introduce(dial(side), "other") == WELCOME
    assert strangers[0].hear() is None
    known.say(ANNOUNCE)
    assert Letter("D", ANNOUNCE) in side.until(3)


def test_a_listener_without_the_secret_learns_nothing(make: Make, listener: socket.socket) -> None:
    side = make("D", token="secret")
    side.link.send(Letter(address_of(listener), ANNOUNCE))
    connection, _ = listener.accept()
    with connection:
        raw = Raw(connection)
        challenge(raw, secret=b"guess")
        assert raw.hear() == Refused("push.token differs")
        assert raw.hear() is None
    (lost,) = side.until(1)
    assert isinstance(lost, Lost)
    assert (lost.was_open, lost.unsent) == (False, (ANNOUNCE.attempt,))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Challenge(VERSION + 1, b"", b""), f"version {VERSION + 1}"),
        (Bound(Attempt("push", 1)), "expected challenge, not bound"),
        (Refused("no\n" + "o" * 1000), "it refuses: noooo"),
        (b"\x91\xa3wha", "not a message"),
        (WELCOME, "expected challenge"),
    ],
    ids=["version", "order", "refused", "garbage", "welcome"],
)
def test_the_wrong_answer(
    make: Make, listener: socket.socket, answer: LinkMessage | bytes, words: str
) -> None:
    side = make("D")
    side.link.send(Letter(address_of(listener), ANNOUNCE))
    connection, _ = listener.accept()
    with connection:
        raw = Raw(connection)
        assert isinstance(raw.hear(), Hello)
        raw.say(answer)
        (lost,) = side.until(1)
        assert isinstance(lost, Lost)
        assert words in lost.reason
        assert len(lost.reason) < 300
        assert not lost.was_open
        assert raw.hear() is None


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        (MAX_MESSAGE + 1).to_bytes(LENGTH_BYTES, "little"),
        (3).to_bytes(LENGTH_BYTES, "little") + b"\xc1\xc1\xc1",
        (2).to_bytes(LENGTH_BYTES, "little") + b"\x91\xa0",
        (0).to_bytes(LENGTH_BYTES, "little"),
    ],
    ids=["http", "length", "garbage", "tag", "nothing"],
)
@pytest.mark.parametrize("after_hello", [False, True])
def test_what_nobody_understands(
    make: Make, dial: Callable[[Side], Raw], data: bytes, after_hello: bool
) -> None:
    """It costs its sender the connection, and nobody else anything."""
    side = make("P", listen=True)
    good, bad = dial(side), dial(side)
    assert introduce(good, "good") == WELCOME
    if after_hello:
        assert introduce(bad, "bad") == WELCOME
    side.until(1 + after_hello)
    bad.connection.sendall(data)
    assert bad.hear() is None
    good.say(ANNOUNCE)
    expected = 4 if after_hello else 2
    heard = side.until(expected)
    assert Letter("good", ANNOUNCE) in heard
    assert [item.peer for item in heard if isinstance(item, Lost)] == ["bad"] * after_hello


# -- who sits between two that have the secret -----------------------------------------------------


class Relay:
    """Hands on what two sides say, keeps it, and may change it."""

    def __init__(self, listener: socket.socket, port: int) -> None:
        self.heard: list[bytes] = []
        self.change: Callable[[bytes], bytes] = lambda data: data
        decode_side, _ = listener.accept()
        self.sockets = [decode_side, socket.create_connection(("127.0.0.1", port))]
        for source, target in (self.sockets, self.sockets[::-1]):
            threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.heard.append(data)
                target.sendall(self.change(data))
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.sockets:
            each.close()


def test_who_hands_on_what_others_say_learns_nothing(make: Make, listener: socket.socket) -> None:
    prefill = make("a prefill engine", listen=True, token="s3cret")
    decode_side = make("a decode engine", token="s3cret")
    decode_side.link.send(Letter(address_of(listener), ANNOUNCE))
    with Relay(listener, prefill.link.port) as relay:
        assert prefill.until(2)[1] == Letter("a decode engine", ANNOUNCE)
        decode_side.until(1)
        said = b"".join(relay.heard)
        assert said
        for word in (b"s3cret", b"engine", b"wire", b"end", b"digest", b"announce"):
            assert word not in said


def test_what_is_changed_on_its_way_ends_the_connection(
    make: Make, listener: socket.socket
) -> None:
    prefill = make("P", listen=True, token="s3cret")
    decode_side = make("D", token="s3cret")
    decode_side.link.send(Letter(address_of(listener), ANNOUNCE))
    with Relay(listener, prefill.link.port) as relay:
        prefill.until(2)
        relay.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
        decode_side.link.send(Letter(address_of(listener), Cancel(ANNOUNCE.attempt)))
        lost = prefill.until(3)[2]
        assert isinstance(lost, Lost)
        assert lost.reason == "what it says is not what it has sealed"


def test_without_the_library_that_seals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(NoCipherError, match=r"lamina-kv\[push\]"):
        check_cipher()


def test_a_sealed_message_counts_once_and_in_its_turn() -> None:
    nonces = Nonces(nonce(), nonce())
    ours, theirs = (Seal(b"secret", Proves.DECODE, nonces) for _ in range(2))
    first, second, third = (ours.close(b"word") for _ in range(3))
    assert len({first, second, third}) == 3
    assert theirs.open(first) == b"word"
    for wrong in (first, third, b"", Seal(b"secret", Proves.PREFILL, nonces).close(b"word")):
        other = Seal(b"secret", Proves.DECODE, nonces)
        other.open(first)
        with pytest.raises(BrokenSealError):
            other.open(wrong)
    assert theirs.open(second) == b"word"


# -- who falls silent, or goes -------------------------------------------------------------------


@contextmanager
def announced(side: Side, listener: socket.socket) -> Iterator[Raw]:
    """A peer that has been found, and has heard of a push; it goes when the block ends."""
    side.link.send(Letter(address_of(listener), ANNOUNCE))
    connection, _ = listener.accept()
    with connection:
        raw = Raw(connection)
        welcome(raw, side)
        assert raw.hear() == ANNOUNCE
        yield raw


def test_a_peer_that_takes_no_notice(make: Make, listener: socket.socket) -> None:
    """Its kernel takes the connection; whoever is there may be stopped."""
    side = make("D", silence=SILENCE)
    side.link.send(Letter(address_of(listener), ANNOUNCE))
    (lost,) = side.until(1)
    assert isinstance(lost, Lost)
    assert (lost.was_open, lost.fate) == (False, Fate.SILENT)


def test_a_peer_that_falls_silent(make: Make, listener: socket.socket) -> None:
    side = make("D", silence=SILENCE)
    with announced(side, listener) as raw:
        opened, lost = side.until(2)
        assert opened == met(address_of(listener), "P")
        assert isinstance(lost, Lost)
        assert (lost.was_open, lost.fate) == (True, Fate.SILENT)
        assert raw.hear() is None


def test_one_connection_waits_for_a_peer_that_is_stopped(
    make: Make, listener: socket.socket
) -> None:
    """However often it is asked: a queue that is full tells nobody who is there. What is said to
    it meanwhile is lost, and it goes on with the connection that waits."""
    side = make("D", silence=SILENCE / 4)
    with announced(side, listener):
        side.until(2)
        address = address_of(listener)
        for number in range(3):
            attempt = Attempt("push", 100 + number)
            side.link.send(Letter(address, msgspec.structs.replace(ANNOUNCE, attempt=attempt)))
            lost = side.until(3 + number)[-1]
            assert isinstance(lost, Lost)
            assert (lost.was_open, lost.fate, lost.unsent) == (False, Fate.SILENT, (attempt,))
        side.link.send(Letter(address, Cancel(ANNOUNCE.attempt)))
        connection, _ = listener.accept()
        with connection:
            raw = Raw(connection)
            welcome(raw, side)
            while not isinstance(side.heard[-1], Opened):
                side.until(len(side.heard) + 1)
            listener.settimeout(0)
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_a_stopped_peer_that_is_killed(make: Make, listener: socket.socket) -> None:
    side = make("D", silence=SILENCE / 4)
    with announced(side, listener):
        side.until(2)
        side.link.send(Letter(address_of(listener), Cancel(ANNOUNCE.attempt)))
        assert getattr(side.until(3)[-1], "fate", None) is Fate.SILENT
        listener.close()
        assert getattr(side.until(4)[-1], "fate", None) is Fate.CLOSED


def test_a_stranger_who_is_silent_is_not_waited_for(make: Make, listener: socket.socket) -> None:
    """Requests may name any address."""
    side = make("D", silence=SILENCE / 4)
    side.link.send(Letter(address_of(listener), ANNOUNCE))
    connection, _ = listener.accept()
    with connection:
        side.until(1)
        assert Raw(connection).hear() == Hello(VERSION, ANY)
        assert Raw(connection).hear() is None


@pytest.mark.parametrize(
    ("unacknowledged", "milliseconds", "takes"), [(0, 9000, True), (3, 100, True), (3, 900, False)]
)
def test_a_machine_that_takes_nothing(unacknowledged: int, milliseconds: int, takes: bool) -> None:
    info = bytearray(60)
    info[24:28] = unacknowledged.to_bytes(4, sys.byteorder)
    info[56:60] = milliseconds.to_bytes(4, sys.byteorder)
    connected: Any = SimpleNamespace(getsockopt=lambda *_: bytes(info))
    assert link_module._acknowledges(connected, 0.5) is takes


def test_a_peer_whose_machine_is_gone(
    make: Make, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_acknowledges", lambda *_: False)
    side = make("D", silence=SILENCE / 4)
    with announced(side, listener):
        _, lost = side.until(2)
        assert isinstance(lost, Lost)
        assert (lost.was_open, lost.fate) == (True, Fate.UNREACHABLE)


def test_who_was_stopped_itself_does_not_blame_its_peer(
    make: Make, listener: socket.socket
) -> None:
    """What the peer has said meanwhile is there, and has not been read."""
    side = make("D", silence=SILENCE)
    with announced(side, listener) as raw:
        goes_on = threading.Event()

        def stop() -> None:
            time.sleep(2 * SILENCE)
            goes_on.set()

        side.link._loop.call_soon_threadsafe(stop)
        while not goes_on.wait(SILENCE / 10):
            raw.say(Ping())
        raw.say(Bound(ANNOUNCE.attempt))
        address = address_of(listener)
        assert side.until(2) == [
            met(address, "P"),
            Letter(address, Bound(ANNOUNCE.attempt)),
        ]


def test_a_peer_whose_process_ends(make: Make, listener: socket.socket) -> None:
    side = make("D")
    with announced(side, listener):
        pass
    _, lost = side.until(2)
    assert isinstance(lost, Lost)
    assert (lost.was_open, lost.fate) == (True, Fate.CLOSED)


def test_a_decode_engine_that_falls_silent(make: Make, dial: Callable[[Side], Raw]) -> None:
    side = make("P", listen=True, silence=SILENCE)
    mute, raw = dial(side), dial(side)
    assert introduce(raw, "D") == WELCOME
    side.until(1)
    assert raw.hear() is None
    assert mute.hear() is None
    assert [type(item) for item in side.until(2)] == [Opened, Lost]
    assert side.link.news() == []


def test_a_peer_is_dialled_again(make: Make) -> None:
    """Another incarnation at the same address is told apart."""
    decode_side, first = make("D"), make("P1", listen=True, port=free_port())
    address = first.address
    decode_side.link.send(Letter(address, ANNOUNCE))
    first.until(2)
    first.link.close()
    assert [type(item) for item in decode_side.until(2)] == [Opened, Lost]
    second = Link(card("P2"), servers=listen_at(address), token=None, silence=NEVER)
    try:
        decode_side.link.send(Letter(address, Cancel(ANNOUNCE.attempt)))
        assert decode_side.until(3)[2] == met(address, "P2")
    finally:
        second.close()


def test_the_first_connection_of_an_incarnation_is_the_only_one(
    make: Make, dial: Callable[[Side], Raw]
) -> None:
    """Nobody takes another's place; it is free when the other has gone."""
    side = make("P", listen=True)
    first, second, third = dial(side), dial(side), dial(side)
    assert introduce(first, "D") == WELCOME
    assert introduce(second, "D") == Refused(CONNECTED)
    assert second.hear() is None
    side.link.send(Letter("D", Bound(ANNOUNCE.attempt)))
    assert first.hear() == Bound(ANNOUNCE.attempt)
    first.connection.close()
    assert [type(item) for item in side.until(2)] == [Opened, Lost]
    assert introduce(third, "D") == WELCOME
    side.link.send(Letter("D", Bound(ANNOUNCE.attempt)))
    assert third.hear() == Bound(ANNOUNCE.attempt)


@pytest.mark.parametrize("name", ["", "127.0.0.1:9300"])
def test_an_engine_without_a_name_is_refused(
    make: Make, dial: Callable[[Side], Raw], name: str
) -> None:
    """Letters to an address would go there."""
    side = make("P", listen=True)
    assert isinstance(introduce(dial(side), name), Refused)
    assert side.link.news() == []


def test_a_peer_that_does_not_read(
    make: Make, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for it is bounded; then it is disconnected. It may be stopped."""
    monkeypatch.setattr(link_module, "MAX_QUEUED", 1 << 20)
    side = make("D")
    address = address_of(listener)
    side.link.send(Letter(address, Cancel(ANNOUNCE.attempt)))
    connection, _ = listener.accept()
    with connection:
        raw = Raw(connection)
        welcome(raw, side)
        assert raw.hear() == Cancel(ANNOUNCE.attempt)
        big = msgspec.structs.replace(ANNOUNCE, digest=bytes(1 << 20))
        for _ in range(64):
            side.link.send(Letter(address, big))
        _, lost = side.until(2)
        assert isinstance(lost, Lost)
        assert (lost.was_open, lost.fate) == (True, Fate.SILENT)


def test_close_ends_every_connection(make: Make) -> None:
    decode_side, before = make("D"), set(threading.enumerate())
    prefill = make("P", listen=True, port=free_port())
    decode_side.link.send(Letter(prefill.address, ANNOUNCE))
    prefill.until(2)
    prefill.link.close()
    prefill.link.close()
    assert set(threading.enumerate()) <= before
    lost = decode_side.until(2)[1]
    assert isinstance(lost, Lost)
    assert (lost.was_open, lost.fate) == (True, Fate.CLOSED)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", prefill.link.port))


def test_what_was_said_before_the_end_is_heard(make: Make) -> None:
    prefill, decode_side = make("P", listen=True), make("D")
    decode_side.link.send(Letter(prefill.address, ANNOUNCE))
    prefill.until(2)
    words = [Bound(Attempt("x" * MAX_ID, n)) for n in range(2000)]
    for word in words:
        prefill.link.send(Letter("D", word))
    prefill.link.close()
    *heard, lost = decode_side.until(2 + len(words))[1:]
    assert heard == [Letter(prefill.address, word) for word in words]
    assert isinstance(lost, Lost)


def test_what_waits_for_a_slow_network_is_heard_before_the_end(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the system's buffers take; and asyncio has no complaint afterwards. Asyncio never
    has two pieces to keep, as it would add them up at every write."""
    kept: list[int] = []

    def write(writer: asyncio.StreamWriter, data: bytes) -> None:
        kept.append(writer.transport.get_write_buffer_size())
        writer.transport.write(data)

    monkeypatch.setattr(asyncio.StreamWriter, "write", write)
    side = make("P", listen=True)
    words = 8 << 20
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.connect(("127.0.0.1", side.link.port))
        assert introduce(Raw(connection), "D") == WELCOME
        message = Bound(Attempt("x" * MAX_ID, 1))
        size = LENGTH_BYTES + len(encode(message))
        for _ in range(words // size):
            side.link.send(Letter("D", message))
        heard = 0

        def read() -> None:
            nonlocal heard
            time.sleep(LAST_WORDS / 4)
            while data := connection.recv(1 << 20):
                heard += len(data)

        reading = threading.Thread(target=read)
        reading.start()
        side.link.close()
        reading.join(PATIENCE)
    assert heard == words // size * size
    assert caplog.messages == []
    assert set(kept) == {0}


GOODBYE = Goodbye(3, (7, 9))


def ended(address: str) -> Lost:
    """A prefill engine has said so, to which one push was announced."""
    epoch = ANNOUNCE.attempt.epoch
    return Lost(address, ANY, True, Fate.CLOSED, announced=epoch, goodbye=GOODBYE)


def test_who_ends_says_a_last_word_to_each_decode_engine(make: Make) -> None:
    """Whether control has looked or not."""
    prefill, decode_side, other = make("P", listen=True), make("D"), make("D2")
    for side in (decode_side, other):
        side.link.send(Letter(prefill.address, ANNOUNCE))
        side.until(1)
    prefill.link.send(Letter("D", Bound(ANNOUNCE.attempt)))
    prefill.link.close({"D": GOODBYE, "D2": Goodbye(NO_EPOCH, ())}.__getitem__)
    _, bound, lost = decode_side.until(3)
    assert bound == Letter(prefill.address, Bound(ANNOUNCE.attempt))
    assert lost == ended(prefill.address)
    assert other.until(2)[1] == replace(lost, goodbye=Goodbye(NO_EPOCH, ()))


def test_what_is_announced_behind_a_goodbye_is_announced_to_nobody(
    make: Make, listener: socket.socket
) -> None:
    """It goes to whoever listens next."""
    side, address = make("D"), address_of(listener)
    with announced(side, listener) as raw:
        raw.say(GOODBYE)
        assert raw.hear() is None
    assert side.until(2)[1] == ended(address)
    later = msgspec.structs.replace(ANNOUNCE, attempt=Attempt("later", 8))
    side.link.send(Letter(address, later))
    connection, _ = listener.accept()
    with connection:
        raw = Raw(connection)
        welcome(raw, side, "P2")
        assert raw.hear() == later
    lost = side.until(4)[-1]
    assert isinstance(lost, Lost)
    assert (lost.announced, lost.goodbye) == (8, None)


def test_who_ends_reads_on_until_its_peer_has_hung_up(
    make: Make, dial: Callable[[Side], Raw]
) -> None:
    """A system takes back words that were not heard, if their speaker closes a connection on which
    something has come that he has not read. Nobody else is let in meanwhile."""
    side = make("P", listen=True)
    raw = dial(side)
    assert introduce(raw, "D") == WELCOME
    stranger = dial(side)
    stranger.say(HELLO)
    answered = stranger.hear()
    assert isinstance(answered, Challenge)
    closing = threading.Thread(target=side.link.close, args=(lambda peer: GOODBYE,))
    closing.start()
    assert raw.hear() == GOODBYE
    assert raw.hear() is None
    for _ in range(100):
        raw.say(ANNOUNCE)
    proof = prove(b"", Proves.DECODE, Nonces(HELLO.nonce, answered.nonce))
    stranger.say(Proof(proof))
    stranger.say(Introduction(card("D2")))
    assert stranger.hear() is None
    with pytest.raises(ConnectionRefusedError):
        dial(side)
    raw.connection.shutdown(socket.SHUT_WR)
    closing.join(PATIENCE)
    assert raw.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


@pytest.mark.parametrize("says", [False, True])
def test_what_was_said_before_a_connection_broke_is_heard(
    make: Make, listener: socket.socket, says: bool
) -> None:
    """And not only its beginning: a fence may be the last of it. Also if the break shows first in
    what this side says."""
    side, address = make("D"), address_of(listener)
    words = [Bound(Attempt("push", n)) for n in range(20)]
    busy, goes_on = threading.Event(), threading.Event()
    with announced(side, listener) as raw:
        side.until(1)

        def hang() -> None:
            busy.set()
            goes_on.wait(PATIENCE)

        side.link._loop.call_soon_threadsafe(hang)
        assert busy.wait(PATIENCE)
        raw.say(*words)
        reset = struct.pack("ii", 1, 0)
        raw.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    for _ in range(2 * says):
        side.link.send(Letter(address, Cancel(ANNOUNCE.attempt)))
    goes_on.set()
    *heard, lost = side.until(2 + len(words))[1:]
    assert heard == [Letter(address, word) for word in words]
    assert isinstance(lost, Lost)
    assert lost.fate is Fate.CLOSED


def test_an_address_in_use(make: Make) -> None:
    side = make("P", listen=True)
    with pytest.raises(OSError, match=r"[Aa]ddress already in use"):
        Link(side.card, servers=listen_at(side.address), token=None, silence=NEVER)


def test_it_listens_at_every_address_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may stand for addresses of both families, or for one that this machine lacks."""
    names = ["192.0.2.1", "127.0.0.1", "127.0.0.2", "127.0.0.1"]

    def found(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        stream = socket.AF_INET, socket.SOCK_STREAM, 6, ""
        return [(*stream, (name, port)) for name in names]

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", found)
        servers = listen_at("name:0")
        del names[1:]
        with pytest.raises(OSError, match=r"[Cc]annot assign"):
            listen_at("name:0")
    link = Link(card("P"), servers=servers, token=None, silence=NEVER)
    dialling = [Link(card(f"D{n}"), servers=[], token=None, silence=NEVER) for n in range(2)]
    try:
        for each, name in zip(dialling, ("127.0.0.1", "127.0.0.2"), strict=True):
            each.send(Letter(f"{name}:{link.port}", Cancel(Attempt("p", 1))))
        opened: set[str] = set()
        deadline = time.monotonic() + PATIENCE
        while len(opened) < 2:
            opened |= {item.peer for item in link.news() if isinstance(item, Opened)}
            assert time.monotonic() < deadline, opened
            time.sleep(0.002)
    finally:
        for each in (*dialling, link):
            each.close()


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("host:1", "host", 1), ("[::1]:65535", "::1", 65535), ("127.0.0.1:0", "127.0.0.1", 0)],
)
def test_addresses(address: str, host: str, port: int) -> None:
    assert split_address(address) == (host, port)


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:x", "host:65536", "host:-1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_address(address)
