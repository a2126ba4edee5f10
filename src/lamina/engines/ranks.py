"""Ranks that have a scheduler each, and must all decide alike.

An engine may run the same scheduler on every rank instead of one that tells the others. Then each
has a planner, and all planners have to come to the same plans: they are fed with the same calls,
the same receipts and the same time, which is told between the ranks here, and every plan is
compared before it is carried out. What differs is an error on all of them, and no wrong token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Self, TypeVar

from torch import distributed

from lamina.data.replicas import Gather

PATIENCE = timedelta(seconds=120)
"""How long a rank waits for the others. Less than transformers waits (300 s), so that what has
happened is said by whoever knows it."""

T = TypeVar("T")


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
    """See the module. Every method but :meth:`close` is called on all ranks together.

    Args:
        rank: this one.
        gather: how ranks speak.
        global_rank: its number among all processes of the job, in which other engines may run.
        neighbours: how many of those run on this machine.
    """

    def __init__(
        self, rank: int, gather: Gather, global_rank: int = 0, neighbours: int = 1
    ) -> None:
        self.rank = rank
        self.global_rank = global_rank
        self.neighbours = neighbours
        self._gather = gather
        self._group: Any = None
        self._seconds = time.monotonic()
        self.count = len(self.tell("start", rank))

    @classmethod
    def alone(cls) -> Self:
        """A rank without others."""
        if not distributed.is_initialized():
            return cls(0, lambda word: [word])
        return cls(0, lambda word: [word], distributed.get_rank(), _neighbours())

    @classmethod
    def among(cls, members: Sequence[int]) -> Self:
        """A rank of an engine that runs in several processes of ``torch.distributed``. They get a
        process group of their own: the engine's is busy with other words.

        Args:
            members: their global ranks, in the order of their ranks.

        Raises:
            RanksError: if they do not come together.
        """
        own = distributed.get_rank()
        group = distributed.new_group(
            list(members),
            timeout=PATIENCE,
            backend="gloo",
            use_local_synchronization=len(members) < distributed.get_world_size(),
        )

        def gather(word: T) -> list[T]:
            words: list[Any] = [None] * len(members)
            distributed.all_gather_object(words, word, group=group)
            return words

        ranks = cls(members.index(own), gather, own, _neighbours())
        ranks._group = group
        return ranks

    def tell(self, occasion: str, word: T) -> list[T]:
        """What every rank has to say, by rank. It is also what the time is told by.

        Args:
            occasion: where in its life the rank is; for all of them the same.
            word: anything that can be pickled.

        Raises:
            RanksError: if a rank is gone or somewhere else.
        """
        try:
            words = self._gather(_Word(occasion, time.monotonic(), word))
        except RuntimeError as error:
            raise RanksError(
                f"rank {self.rank} has no news of the others, {occasion}: one of them has ended "
                f"or is stuck, see what it says ({error})"
            ) from error
        elsewhere = [f"rank {rank}: {w.occasion}" for rank, w in enumerate(words)]
        if len({w.occasion for w in words}) > 1:
            raise RanksError(
                f"ranks are at different places, which calls that differ have led to: "
                f"{'; '.join(elsewhere)}"
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
        said = self.tell(occasion, repr(value))
        for rank, other in enumerate(said):
            if other != said[0]:
                raise RanksError(
                    f"{occasion}, rank {rank} differs from rank 0: {_difference(other, said[0])}"
                )

    def clock(self) -> float:
        """Monotonic seconds; with others, those of the first rank when they last spoke."""
        return time.monotonic() if self.count == 1 else self._seconds

    def close(self) -> None:
        """No word will follow."""
        group, self._group = self._group, None
        if group is not None and distributed.is_initialized():
            distributed.destroy_process_group(group)


def _neighbours() -> int:
    """Processes of the job on this machine; its launcher says so, or there is one machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", distributed.get_world_size()))


def _difference(one: str, other: str) -> str:
    """Where two texts begin to differ, shortly."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    start = max(0, (min(len(one), len(other)) if at is None else at) - 40)
    return f"...{one[start : start + 100]}... and ...{other[start : start + 100]}..."
