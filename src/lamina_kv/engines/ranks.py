"""Ranks that have a scheduler each, and must all decide alike.

An engine may run the same scheduler on every rank instead of one that tells the others. Then each
has a planner, and all planners have to come to the same plans: they are fed with the same calls,
the same receipts and the same time, which is told between the ranks here, and every plan is
compared before it is carried out. What differs is an error on all of them, and no wrong token.
"""

from __future__ import annotations

import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from typing import Any, Generic, NoReturn, Self, TypeVar

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from lamina_kv.data.replicas import Gather

PATIENCE = timedelta(seconds=120)
"""How long a rank waits for the others. Less than transformers waits (300 s), so that what has
happened is said by whoever knows it."""

_SHORT = 1024
"""Bytes that are told at once; a longer word is announced first."""

T = TypeVar("T")

_meetings: Counter[tuple[int, ...]] = Counter()
"""How often processes have come together, by their global ranks: each time has its own names."""


class RanksError(RuntimeError):
    """Ranks do not decide alike any more, or one of them is gone. None can go on without the
    others."""


@dataclass(frozen=True, slots=True)
class _Word(Generic[T]):
    """What a rank says.

    Attributes:
        occasion: where in its life it is.
        seconds: its clock.
        said: what the others are to know.
    """

    occasion: str
    seconds: float
    said: T


class Ranks:
    """See the module. Every method is called on all ranks together, but :meth:`clock` and
    :meth:`close`. After an error there is nothing but that error.

    Args:
        rank: this one.
        gather: how ranks speak.
        engine: a number that no other engine of the job has.
        neighbours: how many processes of the job run on this machine.
    """

    def __init__(self, rank: int, gather: Gather, engine: int = 0, neighbours: int = 1) -> None:
        self.rank = rank
        self.engine = engine
        self.neighbours = neighbours
        self._gather = gather
        self._error: RanksError | None = None
        self._seconds = time.monotonic()
        self.count = len(self.tell("coming together", rank))

    @classmethod
    def alone(cls) -> Self:
        """A rank without others."""
        if not distributed.is_initialized():
            return cls(0, lambda word: [word])
        return cls(0, lambda word: [word], distributed.get_rank(), _neighbours())

    @classmethod
    def among(cls, members: Sequence[int]) -> Self:
        """A rank of an engine that runs in several processes of ``torch.distributed``.

        Args:
            members: their global ranks, in the order of their ranks.

        Raises:
            RanksError: if they do not come together.
        """
        rank = members.index(distributed.get_rank())
        return cls(rank, _meet(rank, tuple(members)), min(members), _neighbours())

    @property
    def first_part(self) -> int:
        """Number of the first rank's part of a chunk; the other ranks' follow. No rank of another
        engine of the job has one of these numbers."""
        return self.engine * self.count

    def tell(self, occasion: str, word: T) -> list[T]:
        """What every rank has to say, by rank. It is also what the time is told by.

        Args:
            occasion: where in its life the rank is; for all of them the same.
            word: anything that can be pickled.

        Raises:
            RanksError: if a rank is gone or somewhere else.
        """
        if self._error is not None:
            raise self._error
        try:
            words = self._gather(_Word(occasion, time.monotonic(), word))
        except RuntimeError as error:
            self._fail(
                f"rank {self.rank} has no news of the others, {occasion}: one of them has ended "
                f"or is stuck, see what it says ({error})"
            )
        if len({w.occasion for w in words}) > 1:
            places = "; ".join(f"rank {rank}: {w.occasion}" for rank, w in enumerate(words))
            self._fail(
                f"ranks are at different places, to which different calls have led: {places}"
            )
        self._seconds = words[0].seconds
        return [w.said for w in words]

    def first(self, occasion: str, word: T) -> T:
        """What the first rank says, for all of them; see :meth:`tell`."""
        return self.tell(occasion, word)[0]

    def agree(self, occasion: str, value: object) -> None:
        """Make sure that all ranks have the same; see :meth:`tell`.

        Args:
            occasion: see there; names the value in the error, too.
            value: something whose ``repr`` says all that matters.

        Raises:
            RanksError: if they do not.
        """
        if self.count == 1:
            return
        text = repr(value)
        if len(set(self.tell(occasion, blake2b(text.encode(), digest_size=16).digest()))) == 1:
            return
        said = self.tell(occasion, text)
        rank = next(rank for rank, other in enumerate(said) if other != said[0])
        self._fail(
            f"{occasion}, rank {rank} differs from rank 0: {_difference(said[rank], said[0])}"
        )

    def together(self, occasion: str, attempt: Callable[[], T]) -> T:
        """Do something that may fail on all ranks, or on none: no rank waits for what never comes.

        Args:
            occasion: see :meth:`tell`.
            attempt: what is done.

        Returns:
            What ``attempt`` did.

        Raises:
            Exception: what ``attempt`` has raised.
            RanksError: if it has raised on another rank.
        """
        failure: Exception | None = None
        try:
            result = attempt()
        except Exception as error:
            failure = error
        word = "" if failure is None else f"{type(failure).__name__}: {failure}"
        words = self.tell(occasion, word)
        if failure is not None:
            raise failure
        if any(words):
            said = "; ".join(f"rank {rank}: {word}" for rank, word in enumerate(words) if word)
            self._fail(f"another rank has failed, {occasion}: {said}")
        return result

    def clock(self) -> float:
        """Monotonic seconds; with others, those of the first rank when they last spoke."""
        return time.monotonic() if self.count == 1 else self._seconds

    def close(self) -> None:
        """No word will follow; the others learn of it when they wait for one."""
        if self.count > 1:
            self._gather = _nobody

    def _fail(self, text: str) -> NoReturn:
        self._error = RanksError(text)
        raise self._error


def _meet(rank: int, members: tuple[int, ...]) -> Gather:
    """How processes speak that call this together. It is a group of their own, because the engine's
    is busy with other words, and one that torch has no name for: names of groups that are a part of
    a job depend on how many groups there are, and those of the engine's would change."""
    meeting = _meetings[members]
    _meetings[members] += 1
    name = f"lamina/{'-'.join(map(str, members))}/{meeting}"
    store = PrefixStore(name, _get_default_store())
    try:
        # The group itself would try for much longer.
        store.set(str(rank), "here")
        store.wait([str(other) for other in range(len(members))], PATIENCE)
        group: Any = distributed.ProcessGroupGloo(store, rank, len(members), timeout=PATIENCE)
    except RuntimeError as error:
        raise RanksError(
            f"rank {rank} has waited for the other ones, processes {members}, and one has not "
            f"come: see what it says ({error})"
        ) from error

    def gather(word: T) -> list[T]:
        said = pickle.dumps(word)
        heads = _exchange(group, len(members), len(said).to_bytes(8, "big") + said[:_SHORT], _SHORT)
        sizes = [int.from_bytes(head[:8], "big") for head in heads]
        if max(sizes) > _SHORT:
            heads = _exchange(group, len(members), bytes(8) + said, max(sizes))
        words: list[T] = [
            pickle.loads(head[8 : 8 + size]) for head, size in zip(heads, sizes, strict=True)
        ]
        return words

    return gather


def _exchange(group: Any, count: int, said: bytes, longest: int) -> list[bytes]:
    """What each rank says in 8 bytes and up to ``longest`` more."""
    own = torch.zeros(8 + longest, dtype=torch.uint8)
    own[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    heard = [torch.empty_like(own) for _ in range(count)]
    group.allgather([heard], [own]).wait()
    return [each.numpy().tobytes() for each in heard]


def _nobody(word: T) -> list[T]:
    raise RuntimeError("this rank was closed")


def _neighbours() -> int:
    """Processes of the job on this machine; its launcher says so, or there is one machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", distributed.get_world_size()))


def _difference(one: str, other: str) -> str:
    """Where two texts begin to differ, shortly."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    start = max(0, (min(len(one), len(other)) if at is None else at) - 40)
    return f"...{one[start : start + 100]}... and ...{other[start : start + 100]}..."
