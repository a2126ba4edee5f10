"""What a transport promises, kept by NIXL between two processes: every byte arrives where it was
sent and nowhere else, "done" means that the peer has it, a peer that is gone fails cleanly and at
once, and an end that is closed neither reads nor takes anything any more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from lamina_kv.push.transports.base import Peer, Region, Spans, TransportError, Write, WriteState
from lamina_kv.push.transports.nixl import NixlTransport

if find_spec("nixl") is None:
    pytest.skip("NIXL is not installed: pip install lamina-kv[push]", allow_module_level=True)

SIZE = 16 << 20
"""Bytes of memory at each end: many times what is on the way to a peer that does not read."""
PATIENCE = 60.0
"""Seconds after which something that is to happen does not."""
WIRES = ("all", "tcp")
"""Values of ``UCX_TLS``: whatever there is between processes of one machine, and the network."""

Memory = npt.NDArray[np.uint8]


def _region(memory: Memory) -> Region:
    return Region(memory.ctypes.data, memory.nbytes)


def _spans(base: int, *stretches: tuple[int, int]) -> Spans:
    return np.array([(base + offset, length) for offset, length in stretches], np.uint64)


def _until(happened: Callable[[], bool]) -> bool:
    """Whether it happens within :data:`PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def _end_of(write: Write) -> WriteState:
    _until(lambda: write.state() is not WriteState.MOVING)
    return write.state()


class Far:
    """The far end, in a process of its own (this file, run as a program)."""

    def __init__(self, wire: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "UCX_TLS": wire},
        )
        self.base, self.description = self.ask("end")

    def ask(self, what: str, argument: Any = None) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        body = msgspec.msgpack.encode((what, argument))
        stdin.write(len(body).to_bytes(4, "little") + body)
        stdin.flush()
        return msgspec.msgpack.decode(stdout.read(int.from_bytes(stdout.read(4), "little")))

    def memory(self) -> Memory:
        return np.frombuffer(self.ask("memory"), np.uint8)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


class Pair:
    """An end here, connected to one there."""

    def __init__(self, wire: str) -> None:
        self.memory = np.random.default_rng(7).integers(0, 256, SIZE, np.uint8)
        self.base = self.memory.ctypes.data
        self.end = NixlTransport([_region(self.memory)])
        self.far = Far(wire)
        self.peer = self.end.connect(self.far.description)

    def write(self, *stretches: tuple[int, int, int]) -> Write:
        """Each: offset here, offset there, length."""
        return self.end.write(
            self.peer,
            _spans(self.base, *((here, length) for here, _, length in stretches)),
            _spans(self.far.base, *((there, length) for _, there, length in stretches)),
        )

    def stuck(self) -> Write:
        """A write of everything that cannot end, because the peer was stopped."""
        assert _end_of(self.write((0, 0, 1))) is WriteState.DONE
        self.far.signal(signal.SIGSTOP)
        return self.write((0, 0, SIZE))


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", request.param)
        pair = Pair(request.param)
        yield pair
        pair.far.kill()
        pair.end.close()


both_wires = pytest.mark.parametrize("pair", WIRES, indirect=True)
network = pytest.mark.parametrize("pair", ["tcp"], indirect=True)


@both_wires
def test_every_byte_arrives_where_it_was_sent_and_nowhere_else(pair: Pair) -> None:
    expected = np.zeros(SIZE, np.uint8)
    scattered = [(index * 8192, (index * 37 % 512) * 4096, 4096) for index in range(512)]
    odd = [(1, SIZE // 2 + 3, 1), (5, SIZE // 2 + 5, 4097)]
    for stretches in (scattered, odd, [(SIZE // 8, SIZE // 4, SIZE // 8)]):
        write = pair.write(*stretches)
        for here, there, length in stretches:
            expected[there : there + length] = pair.memory[here : here + length]
        assert _end_of(write) is WriteState.DONE
        # The far end is asked once the write is done, so that what is done must be there.
        np.testing.assert_array_equal(pair.far.memory(), expected)


@both_wires
def test_notices_arrive_once_and_say_who_sent_them(pair: Pair) -> None:
    bodies = [b"", b"x", bytes(range(256)) * 16]
    for body in bodies:
        pair.end.notify(pair.peer, body)
    me = pair.far.ask("connect", pair.end.describe())
    seen: list[tuple[str, bytes]] = []

    def all_there() -> bool:
        pair.end.notices()
        seen.extend((peer, body) for peer, body in pair.far.ask("notices"))
        return len(seen) >= len(bodies)

    assert _until(all_there)
    assert sorted(seen) == sorted((me, body) for body in bodies)
    pair.far.ask("notify", b"back")
    answers: list[tuple[Peer, bytes]] = []

    def answered() -> bool:
        answers.extend((notice.peer, notice.body) for notice in pair.end.notices())
        return bool(answers)

    assert _until(answered)
    assert answers == [(pair.peer, b"back")]


@both_wires
def test_a_killed_peer_fails_at_once_and_its_successor_is_another(pair: Pair) -> None:
    assert _end_of(pair.write((0, 0, 4096))) is WriteState.DONE
    pair.far.kill()
    # The first write may leave before the connection is known to be broken.
    assert _end_of(pair.write((0, 0, SIZE))) is WriteState.FAILED
    assert _end_of(pair.write((0, 0, 4096))) is WriteState.FAILED
    with pytest.raises(TransportError, match="gone"):
        pair.end.notify(pair.peer, b"x")
    dead, pair.far = pair.far, Far(os.environ["UCX_TLS"])
    restarted = pair.end.connect(pair.far.description)
    assert restarted != pair.peer
    pair.peer = restarted
    assert _end_of(pair.write((0, 0, SIZE))) is WriteState.DONE
    np.testing.assert_array_equal(pair.far.memory(), pair.memory)
    fresh = NixlTransport([_region(pair.memory)])
    try:
        write = fresh.write(
            fresh.connect(dead.description), _spans(pair.base, (0, 1)), _spans(dead.base, (0, 1))
        )
    except TransportError:
        pass
    else:
        assert _end_of(write) is WriteState.FAILED
    fresh.close()


@network
def test_a_write_to_a_peer_that_is_killed_meanwhile_fails(pair: Pair) -> None:
    write = pair.stuck()
    assert write.state() is WriteState.MOVING
    pair.far.kill()
    assert _end_of(write) is WriteState.FAILED


@network
def test_a_stopped_peer_neither_ends_a_write_nor_holds_up_close(pair: Pair) -> None:
    write = pair.stuck()
    assert not any(write.state() is not WriteState.MOVING for _ in range(1000))
    pair.end.close()
    assert write.state() is WriteState.FAILED
    sent = pair.memory.copy()
    pair.memory[:] = ~sent
    pair.far.signal(signal.SIGCONT)
    # Whatever still arrives was read before the end was closed.
    there = pair.far.memory()
    assert (there[there != sent] == 0).all()


@both_wires
def test_a_slow_peer_gets_everything_in_the_end(pair: Pair) -> None:
    write = pair.stuck()
    pair.far.signal(signal.SIGCONT)
    assert _end_of(write) is WriteState.DONE
    np.testing.assert_array_equal(pair.far.memory(), pair.memory)


@network
def test_nothing_arrives_at_an_end_that_was_closed(pair: Pair) -> None:
    assert _end_of(pair.write((0, 0, 1))) is WriteState.DONE
    pair.far.ask("rest")
    write = pair.write((0, 0, SIZE))
    assert write.state() is WriteState.MOVING
    description = pair.far.ask("reopen")
    assert _end_of(write) is WriteState.FAILED
    assert not pair.far.memory().any()
    pair.peer = pair.end.connect(description)
    assert _end_of(pair.write((0, 0, SIZE))) is WriteState.DONE


@network
def test_what_is_wrong_is_refused_before_anything_begins(pair: Pair) -> None:
    here, there = _spans(pair.base, (0, 8)), _spans(pair.far.base, (0, 8))
    with pytest.raises(TransportError, match="not connected"):
        pair.end.write(Peer("nobody"), here, there)
    with pytest.raises(TransportError, match="not connected"):
        pair.end.notify(Peer("nobody"), b"")
    for description in (b"", b"\xc1", msgspec.msgpack.encode(("other", "a", (), b""))):
        with pytest.raises(TransportError, match="another transport"):
            pair.end.connect(description)
    damaged = msgspec.msgpack.decode(pair.far.description)
    damaged[1], damaged[3] = "someone", damaged[3][: len(damaged[3]) // 2]
    with pytest.raises(TransportError, match="someone"):
        pair.end.connect(msgspec.msgpack.encode(damaged))
    with pytest.raises(ValueError, match="equal lengths"):
        pair.end.write(pair.peer, here, _spans(pair.far.base, (0, 9)))
    with pytest.raises(ValueError, match="equal lengths"):
        pair.end.write(pair.peer, here[:0], there[:0])
    with pytest.raises(ValueError, match="registered"):
        pair.end.write(pair.peer, here, _spans(pair.far.base, (SIZE - 4, 8)))
    with pytest.raises(ValueError, match="registered"):
        pair.end.write(pair.peer, _spans(pair.base, (-8, 8)), there)
    assert pair.end.connect(pair.far.description) == pair.peer
    pair.end.close()
    pair.end.close()
    for call in (lambda: pair.end.write(pair.peer, here, there), pair.end.notices):
        with pytest.raises(TransportError, match="closed"):
            call()


def _serve() -> None:
    """The far end: answers questions, and lets its transport move along."""
    memory = np.zeros(SIZE, np.uint8)
    end = NixlTransport([_region(memory)])
    peer = Peer("")
    inbox: list[tuple[str, bytes]] = []
    resting = False
    os.set_blocking(0, False)
    pending = b""
    while True:
        if not resting:
            inbox += [(notice.peer, notice.body) for notice in end.notices()]
        try:
            data = os.read(0, 1 << 20)
        except BlockingIOError:
            time.sleep(0.0005)
            continue
        if not data:
            os._exit(0)
        pending += data
        length = int.from_bytes(pending[:4], "little")
        if len(pending) < 4 + length:
            continue
        body, pending = pending[4 : 4 + length], pending[4 + length :]
        what, argument = msgspec.msgpack.decode(body)
        answer: Any = None
        match what:
            case "end":
                answer = (memory.ctypes.data, end.describe())
            case "memory":
                answer = memory.tobytes()
            case "connect":
                answer = peer = end.connect(argument)
            case "notify":
                end.notify(peer, argument)
            case "notices":
                answer, inbox = inbox, []
            case "rest":
                resting = True
            case "reopen":
                end.close()
                memory[:] = 0
                end, resting = NixlTransport([_region(memory)]), False
                answer = end.describe()
        reply = msgspec.msgpack.encode(answer)
        sys.stdout.buffer.write(len(reply).to_bytes(4, "little") + reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
