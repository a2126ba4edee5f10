"""From a scheduler to the ranks of its engine, beside the plans: destinations, while a step runs.

Each rank listens at a socket of its machine and says where in its first report. The scheduler calls
all ranks once. If it cannot reach one, such as one of another machine, it goes without: a plan
carries the same.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from queue import SimpleQueue

import msgspec

from lamina_kv.plan import Binding

log = logging.getLogger("lamina_kv.push")

GREETING = 2.0
"""Seconds that a rank waits for each word of a caller's proof. Meanwhile it hears no other caller,
but the scheduler's process may be busy."""

MAX_BINDING = 64 << 20
"""Bytes; one of a million blocks has a sixth of that."""

STRANGER = (AuthenticationError, EOFError, OSError, AssertionError, ValueError)
"""What comes of an end that does not have the key, or says nothing; ``multiprocessing`` asserts the
form of what it hears."""

_SECONDS = struct.Struct("ll")


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a rank listens.

    Attributes:
        address: path of its socket, which is there until it was called.
        key: whoever has it may say where prompts go.
    """

    address: str
    key: bytes


def encode_binding(binding: Binding) -> bytes:
    """A destination as bytes."""
    return msgspec.msgpack.encode(binding)


def decode_binding(data: bytes) -> Binding:
    """The destination that :func:`encode_binding` was given.

    Raises:
        msgspec.MsgspecError: if it is none.
    """
    return msgspec.msgpack.decode(data, type=Binding)


def answer(connected: socket.socket, key: bytes) -> Iterator[Binding]:
    """Greet whoever has called.

    Args:
        connected: its connection, which is closed if that fails.
        key: what it must have.

    Returns:
        What it will say, until it ends, or is not understood.

    Raises:
        STRANGER: if it does not have it.
    """
    connection = Connection(connected.detach())
    try:
        _limit(connection, GREETING)
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        _limit(connection, 0.0)
    except BaseException:
        connection.close()
        raise
    return _hear(connection)


def _hear(scheduler: Connection) -> Iterator[Binding]:
    with scheduler:
        while True:
            try:
                yield decode_binding(scheduler.recv_bytes(MAX_BINDING))
            except (EOFError, OSError):
                return
            except msgspec.MsgspecError as error:
                log.warning("the scheduler is not understood, and heard in plans alone: %s", error)
                return


def call(place: RankPlace) -> Connection:
    """Call a rank, and wait until it answers.

    Raises:
        STRANGER: if it is not there, or does not have the key.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.connect(place.address)
    except BaseException:
        connected.close()
        raise
    connection = Connection(connected.detach())
    try:
        answer_challenge(connection, place.key)
        deliver_challenge(connection, place.key)
    except BaseException:
        connection.close()
        raise
    return connection


def _limit(connection: Connection, seconds: float) -> None:
    """Wait no longer for what the other end says; 0 for ever."""
    limit = _SECONDS.pack(int(seconds), int(seconds % 1 * 1e6))
    borrowed = socket.socket(fileno=connection.fileno())
    try:
        borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    finally:
        borrowed.detach()


class RanksCaller:
    """The scheduler's end; see the module. Its thread calls the ranks and tells them.

    Args:
        places: where each rank listens; None for one that does not.
    """

    def __init__(self, places: Sequence[RankPlace | None]) -> None:
        self._places = [place for place in places if place is not None]
        self._is_open = False
        self._said: SimpleQueue[Binding | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lamina-ranks", daemon=True)
        if len(self._places) == len(places):
            self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether every rank is reached. Any thread may ask."""
        return self._is_open

    def send(self, binding: Binding) -> None:
        """Tell every rank. Returns at once; what does not arrive is in the next plan."""
        self._said.put(binding)

    def close(self) -> None:
        """Say no more. Idempotent."""
        self._is_open = False
        self._said.put(None)

    def _run(self) -> None:
        with ExitStack() as connected:
            try:
                ranks = [connected.enter_context(call(place)) for place in self._places]
            except STRANGER as error:
                log.info(
                    "a rank is not reached beside plans (%r): what is announced while a step runs "
                    "leaves after the step",
                    error,
                )
                return
            self._is_open = True
            try:
                while (binding := self._said.get()) is not None:
                    data = encode_binding(binding)
                    for rank in ranks:
                        rank.send_bytes(data)
            except OSError as error:
                log.warning(
                    "a rank is not reached beside plans any more (%r): what is announced while a "
                    "step runs leaves after the step",
                    error,
                )
            finally:
                self._is_open = False
