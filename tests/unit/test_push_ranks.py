"""Ranks hear destinations from their own scheduler and from nobody else, and without that way
everything goes on by plans.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lamina_kv.data.push_listener import PushListener
from lamina_kv.data.threads import Threads
from lamina_kv.plan import Binding, PeerOrder, PushOrder, PushPages, TransferId
from lamina_kv.push import ranks
from lamina_kv.push.ranks import RankPlace, RanksCaller, call

PATIENCE = 30.0
BINDING = Binding(
    PeerOrder("D", b"\x00card"),
    PushOrder(
        TransferId(3),
        "D",
        7,
        (PushPages(0, (1, 2), (3, 4)), PushPages(1, (), ())),
        computed=False,
        last=True,
        patience=30.0,
    ),
)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.001)


class Rank:
    """A rank that listens, and what it has heard."""

    def __init__(self) -> None:
        self.heard: list[Binding] = []
        self.listener = PushListener(self.heard.append, Threads())

    @property
    def place(self) -> RankPlace:
        return self.listener.place

    @property
    def is_there(self) -> bool:
        return Path(self.place.address).parent.exists()


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank()
    yield rank
    rank.listener.close()
    until(lambda: not rank.is_there)


def test_every_rank_hears_and_the_sockets_are_gone(rank: Rank) -> None:
    other = Rank()
    caller = RanksCaller([rank.place, other.place])
    until(lambda: caller.is_open)
    for _ in range(2):
        caller.send(BINDING)
    for each in (rank, other):
        until(lambda each=each: len(each.heard) == 2)
        assert each.heard == [BINDING, BINDING]
        until(lambda each=each: not each.is_there)
    caller.close()
    assert not caller.is_open


def test_nobody_else_of_this_machine_maycall(rank: Rank) -> None:
    mode = stat.S_IMODE(os.stat(Path(rank.place.address).parent).st_mode)
    assert mode == 0o700


@pytest.mark.parametrize("stranger", ["another key", "garbage", "silent", "gone"])
def test_a_stranger_is_not_heard_and_keeps_nobody_from_calling(
    rank: Rank, stranger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "GREETING", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as his:
        if stranger == "another key":
            with pytest.raises(ranks.STRANGER):
                call(RankPlace(rank.place.address, b"guess"))
        else:
            his.connect(rank.place.address)
            if stranger == "garbage":
                his.sendall(b"\x00\x00\x00\x08garbage!" * 10)
            if stranger == "gone":
                his.close()
        caller = RanksCaller([rank.place])
        until(lambda: caller.is_open)
    caller.send(BINDING)
    until(lambda: rank.heard)
    caller.close()


def test_a_scheduler_that_is_not_understood_is_not_heard_any_more(rank: Rank) -> None:
    scheduler: Connection = call(rank.place)
    with scheduler:
        scheduler.send_bytes(b"\xc1")
        with pytest.raises(EOFError):
            scheduler.recv_bytes()
    assert not rank.heard


def test_a_rank_that_is_gone_leaves_everything_to_plans(rank: Rank) -> None:
    other = Rank()
    other.listener.close()
    until(lambda: not other.is_there)
    caller = RanksCaller([rank.place, other.place])
    caller._thread.join(PATIENCE)
    assert not caller.is_open
    caller.send(BINDING)  # harms nobody


def test_a_rank_that_ends_later_closes_the_way(rank: Rank) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        address = f"{rank.place.address}-other"
        server.bind(address)
        server.listen()
        caller = RanksCaller([RankPlace(address, b"key")])
        connected, _ = server.accept()
        its = ranks.answer(connected, b"key")
    Path(address).unlink()
    until(lambda: caller.is_open)
    del its
    deadline = time.monotonic() + PATIENCE
    while caller.is_open:
        assert time.monotonic() < deadline
        caller.send(BINDING)
        time.sleep(0.001)


def test_ranks_that_do_not_listen_are_not_called(rank: Rank) -> None:
    assert not RanksCaller([rank.place, None]).is_open
    assert rank.is_there
