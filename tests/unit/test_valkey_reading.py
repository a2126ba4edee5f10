"""Values that are read from a socket: what a server may do to one who reads, answer by answer. The
servers are scripted; :mod:`test_valkey` has real ones."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest

from lamina_kv.tiers.contract import Fate
from lamina_kv.tiers.valkey import connection
from lamina_kv.tiers.valkey.address import parse
from lamina_kv.tiers.valkey.config import ValkeyConfig
from lamina_kv.tiers.valkey.connection import Failure, connect
from lamina_kv.tiers.valkey.reading import AHEAD_BYTES, SocketReading
from lamina_kv.values import MIB

SIZE = 5000
TIMEOUT = 30.0

Script = Callable[[socket.socket], object]
"""What a server does with a connection, which is closed afterwards."""


class Scripted:
    """A server that does with each connection what the next script says."""

    def __init__(self, scripts: list[Script]) -> None:
        self._scripts = scripts
        self._folder = tempfile.TemporaryDirectory(prefix="valkey-")
        path = str(Path(self._folder.name) / "socket")
        self.config = ValkeyConfig.model_validate({"url": f"unix://{path}"})
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self._folder.cleanup()

    def _serve(self) -> None:
        with suppress(OSError):
            for script in self._scripts:
                connection, _ = self._listener.accept()
                with connection, suppress(OSError):
                    script(connection)


Serve = Callable[..., SocketReading]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server and reads from it; both end with the test."""
    with ExitStack() as stack:

        def start(*scripts: Script) -> SocketReading:
            server = stack.enter_context(Scripted([*scripts]))
            reading = SocketReading(server.config)
            stack.callback(reading.close)
            return reading

        yield start


def command(connection: socket.socket) -> list[bytes]:
    """Receive one command and nothing behind it."""

    def line() -> bytes:
        said = b""
        while not said.endswith(b"\r\n"):
            if not (some := connection.recv(1)):
                raise ConnectionError
            said += some
        return said[:-2]

    words = []
    for _ in range(int(line()[1:])):
        line()
        words.append(line())
    return words


def logged_in(connection: socket.socket) -> None:
    assert command(connection)[:2] == [b"CLIENT", b"SETINFO"]
    connection.sendall(b"-ERR unknown subcommand\r\n")


def until_closed(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def bulk(value: bytes) -> bytes:
    return b"*1\r\n$%d\r\n%s\r\n" % (len(value), value)


def some_bytes(size: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(size)


def buffers(count: int, size: int = SIZE) -> list[memoryview]:
    """Buffers, full of sevens."""
    return [np.full(size, 7, np.uint8).data for _ in range(count)]


def names(count: int) -> list[bytes]:
    return [b"name-%d" % i for i in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_answers_come_in_any_pieces(serve: Serve, seed: int) -> None:
    random = Random(seed)
    kinds = {
        Fate.DONE: bulk(some_bytes(SIZE)),
        Fate.GONE: b"*1\r\n$-1\r\n",
        Fate.CORRUPT: bulk(some_bytes(random.choice([0, 1, SIZE - 1, SIZE + 1, 200_000]))),
    }
    expected = random.choices([*kinds], k=8)
    answers = b"".join(kinds[fate] for fate in expected)

    def script(connection: socket.socket) -> None:
        logged_in(connection)
        assert [command(connection) for _ in expected] == [[b"MGET", n] for n in names(8)]
        at = 0
        while at < len(answers):
            size = random.choice([1, 2, 3, 5, 63, 64, 65, SIZE, 100_000])
            connection.sendall(answers[at : at + size])
            at += size
        until_closed(connection)

    asked = buffers(8)
    assert serve(script).read(names(8), asked, TIMEOUT) == expected
    whole = some_bytes(SIZE)
    for fate, buffer in zip(expected, asked, strict=True):
        assert bytes(buffer) == (whole if fate is Fate.DONE else bytes([7]) * SIZE)


def test_little_is_asked_for_ahead(serve: Serve) -> None:
    """A server copies all answers that it is asked for before it sends the first."""
    waiting: list[int] = []

    def script(connection: socket.socket) -> None:
        logged_in(connection)
        for _ in range(3):
            command(connection)
            connection.setblocking(False)
            with suppress(BlockingIOError):
                waiting.append(len(connection.recv(1, socket.MSG_PEEK)))
            connection.setblocking(True)
            connection.sendall(bulk(bytes(AHEAD_BYTES)))
        until_closed(connection)

    large = buffers(3, AHEAD_BYTES)
    assert serve(script).read(names(3), large, TIMEOUT) == [Fate.DONE] * 3
    assert not waiting


def test_bytes_that_trickle_end_with_the_timeout_and_none_comes_later(serve: Serve) -> None:
    over = threading.Event()

    def script(connection: socket.socket) -> None:
        logged_in(connection)
        command(connection)
        connection.sendall(b"*1\r\n$%d\r\n" % size)
        while not over.wait(0.0001):
            connection.sendall(b"x")

    (buffer,) = buffers(1, size := 1 << 20)
    with pytest.raises(Failure) as caught:
        serve(script).read(names(1), [buffer], 0.3)
    assert caught.value.fate is Fate.LATE
    before = bytes(buffer)
    time.sleep(0.1)
    assert bytes(buffer) == before
    over.set()


def test_a_call_that_connects_has_one_timeout(serve: Serve) -> None:
    """Half a second to log in, and as much for the value, are too much for three quarters."""

    def script(connection: socket.socket) -> None:
        time.sleep(0.5)
        logged_in(connection)
        command(connection)
        time.sleep(0.5)
        connection.sendall(bulk(bytes(SIZE)))

    with pytest.raises(Failure) as caught:
        serve(script).read(names(1), buffers(1), 0.75)
    assert caught.value.fate is Fate.LATE


@pytest.mark.parametrize("sent", [b"", b"*1\r\n$5000\r\nabc"], ids=["nothing", "a part"])
def test_a_server_that_ended_an_idle_connection_is_asked_again(serve: Serve, sent: bytes) -> None:
    def answered(connection: socket.socket) -> None:
        logged_in(connection)
        command(connection)
        connection.sendall(bulk(some_bytes(SIZE)))

    def ended(connection: socket.socket) -> None:
        answered(connection)
        with suppress(ConnectionError):
            command(connection)
        connection.sendall(sent)

    reading = serve(ended, answered)
    for _ in range(2):
        asked = buffers(1)
        assert reading.read(names(1), asked, TIMEOUT) == [Fate.DONE]
        assert bytes(asked[0]) == some_bytes(SIZE)


def test_one_that_ends_every_connection_is_down(serve: Serve) -> None:
    with pytest.raises(Failure) as caught:
        serve(logged_in, logged_in).read(names(1), buffers(1), TIMEOUT)
    assert caught.value.fate is Fate.DOWN


@pytest.mark.parametrize(
    ("answer", "fate"),
    [
        (b"-LOADING the dataset\r\n", Fate.DOWN),
        (b"-NOPERM no permissions\r\n", Fate.REFUSED),
        (b"*1\r\n-ERR no\r\n", Fate.DOWN),
        (b"+OK\r\n", Fate.DOWN),
        (b"*1\r\n$12x\r\n", Fate.DOWN),
        (b"*1\r\n$\r\n", Fate.DOWN),
        (b"*1\r\n$-7\r\n", Fate.DOWN),
        (b"*1\r\n$" + b"9" * 5000 + b"\r\n", Fate.DOWN),
        (b"*1\r\n$%d\r\n%sxy" % (SIZE, bytes(SIZE)), Fate.DOWN),
        (b"*1\r\n$3\r\nabcxy", Fate.DOWN),
        (b"x" * 100_000, Fate.DOWN),
    ],
)
def test_what_is_no_value_fails_and_a_new_connection_is_made(
    serve: Serve, answer: bytes, fate: Fate
) -> None:
    def wrong(connection: socket.socket) -> None:
        logged_in(connection)
        command(connection)
        connection.sendall(answer)
        until_closed(connection)

    def right(connection: socket.socket) -> None:
        logged_in(connection)
        command(connection)
        connection.sendall(bulk(bytes(SIZE)))
        until_closed(connection)

    reading = serve(wrong, right)
    with pytest.raises(Failure) as caught:
        reading.read(names(2), buffers(2), TIMEOUT)
    assert caught.value.fate is fate
    assert reading.read(names(1), buffers(1), TIMEOUT) == [Fate.DONE]


@pytest.mark.parametrize("size", [SIZE + 2 * MIB, 10**12])
@pytest.mark.parametrize("last", [False, True])
def test_a_value_that_is_far_too_long_ends_its_connection_and_not_the_batch(
    serve: Serve, size: int, last: bool
) -> None:
    def endless(connection: socket.socket) -> None:
        logged_in(connection)
        command(connection)
        connection.sendall(bulk(some_bytes(SIZE)) + b"*1\r\n$%d\r\nabc" % size)
        until_closed(connection)

    def right(connection: socket.socket) -> None:
        logged_in(connection)
        assert command(connection)[1] == (b"again" if last else b"name-2")
        connection.sendall(bulk(some_bytes(SIZE)))
        until_closed(connection)

    reading = serve(endless, right)
    wanted = [Fate.DONE, Fate.CORRUPT] + ([] if last else [Fate.DONE])
    assert reading.read(names(len(wanted)), buffers(len(wanted)), TIMEOUT) == wanted
    if last:
        assert reading.read([b"again"], buffers(1), TIMEOUT) == [Fate.DONE]


@pytest.mark.parametrize("at_once", [True, False])
def test_what_a_server_says_before_it_hangs_up_is_the_reason(serve: Serve, at_once: bool) -> None:
    def full(connection: socket.socket) -> None:
        if not at_once:
            command(connection)
        connection.sendall(b"-ERR max number of clients reached\r\n")

    reading = serve(full)
    with pytest.raises(Failure, match="max number of clients") as caught:
        reading.read(names(1), buffers(1), TIMEOUT)
    assert caught.value.fate is Fate.DOWN
    assert "maxclients" in caught.value.advice


def test_what_a_server_said_before_its_first_value_is_no_reason_later(serve: Serve) -> None:
    def script(connection: socket.socket) -> None:
        logged_in(connection)
        command(connection)
        connection.sendall(bulk(bytes(SIZE)))

    with pytest.raises(Failure, match="the connection has ended"):
        serve(script).read(names(2), buffers(2), TIMEOUT)


def test_a_user_who_may_not_tell_a_name_is_no_reason(serve: Serve) -> None:
    """Those of docs/stores.md may not."""

    def script(connection: socket.socket) -> None:
        command(connection)
        connection.sendall(b"-NOPERM User lamina has no permissions to run 'client|setinfo'\r\n")

    with pytest.raises(Failure, match="the connection has ended"):
        serve(script).read(names(1), buffers(1), TIMEOUT)


def test_one_of_a_cluster_is_said_once_whatever_the_slot(serve: Serve) -> None:
    def script(connection: socket.socket) -> None:
        logged_in(connection)
        connection.sendall(b"-MOVED 3999 10.0.0.1:6379\r\n")

    with pytest.raises(Failure) as caught:
        serve(script).read(names(1), buffers(1), TIMEOUT)
    assert caught.value.fate is Fate.REFUSED
    assert "3999" not in caught.value.words
    assert "cluster: true" in caught.value.advice


def test_a_name_that_no_host_can_have_is_a_failure() -> None:
    with pytest.raises(Failure, match="no host can have that name"):
        connect(parse("valkey://cache..internal:6379"), time.monotonic() + TIMEOUT)


def test_the_addresses_of_a_name_share_one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones swallow what is sent to them; time is that of the clock which they turn."""
    clock, asked = [100.0], []

    def swallow(family: int, place: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(place)
        if place[0] == "listens":
            return ours
        clock[0] += timeout
        raise TimeoutError("timed out")

    def addresses(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 6379)) for a in found]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    monkeypatch.setattr(connection, "_connect", swallow)
    monkeypatch.setattr(connection.time, "monotonic", lambda: clock[0])
    url = ValkeyConfig.model_validate({"url": "valkey://many"}).url
    with socket.socket() as ours:
        found = ["hole", "hole", "hole"]
        with pytest.raises(Failure, match="timed out"):
            connection.connect(url, 101.0)
        assert clock[0] == pytest.approx(101.0)
        found = ["hole", "hole", "listens"]
        assert connection.connect(url, 102.0) is ours
        assert clock[0] < 102.0
