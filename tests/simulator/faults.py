"""What goes wrong: the weather, and the tiers and the transport that it rains on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from lamina.data.load_pipeline import BadChunks, Piece, RowSource
from lamina.data.movers import Fence
from lamina.data.tiers.disk import DiskTier
from lamina.data.tiers.disk_slab import Extent
from lamina.plan import ChunkKey, Receipt, TransferReceipt

WRITE_TIME = 0.5
"""Deadlines that the write of a stalled load into the engine takes at most."""


class InjectedError(OSError):
    """The weather's own."""


@dataclass(frozen=True)
class Weather:
    """Probabilities of what can go wrong.

    Attributes:
        bad: of a row of a piece, that some of its chunks cannot be read.
        error: of a row of a piece, that reading it raises.
        slow: of a job, that it takes up to a few deadlines.
        hang: of a job, that it takes for ever.
        late: of a rank's receipts, that they are held back for a step.
        twice: of a receipt, that it is delivered again.
        stale: of a step, that a receipt of long ago is delivered again.
        shuffled: of a delivery, that the receipts in it change places.
        overtaken: of a receipt, that it is held back and later ones are not.
        write_error: of a call that changes the disk, that it raises.
    """

    bad: float = 0.0
    error: float = 0.0
    slow: float = 0.0
    hang: float = 0.0
    late: float = 0.0
    twice: float = 0.0
    stale: float = 0.0
    shuffled: float = 0.0
    overtaken: float = 0.0
    write_error: float = 0.0

    @classmethod
    def draw(cls, random: Random) -> Weather:
        """Any weather; fair more often than not."""

        def chance(rain: float) -> float:
            return rain * random.random() if random.random() < 0.3 else 0.0

        return cls(
            bad=chance(0.3),
            error=chance(0.2),
            slow=chance(0.3),
            hang=chance(0.05),
            late=chance(0.5),
            twice=chance(0.5),
            stale=chance(0.5),
            shuffled=chance(1.0),
            overtaken=chance(0.5),
            write_error=chance(0.5),
        )


class Sky:
    """The present weather, and the dice.

    Args:
        random: the dice.
        deadline: the unit of slowness, in seconds.
        slow_loads: whether loads can be slow, too: then they can fail.

    Attributes:
        weather: may be changed at any time.
        deadline: the unit of slowness, in seconds.
    """

    def __init__(self, random: Random, deadline: float, slow_loads: bool) -> None:
        self.weather = Weather()
        self.random = random
        self.deadline = deadline
        self._slow_loads = slow_loads

    def strikes(self, probability: float) -> bool:
        """Whether something of that probability happens now."""
        return probability > 0 and self.random.random() < probability

    def delay(self, pool: str) -> float:
        """How long a job takes, in seconds."""
        if pool.startswith("load") and not self._slow_loads:
            return 0.0
        if self.strikes(self.weather.hang):
            return math.inf
        if self.strikes(self.weather.slow):
            return self.random.random() * 3 * self.deadline
        return 0.0


class RainySource:
    """A tier that loses chunks or raises.

    Args:
        inner: the tier.
        sky: decides.
        blocks_per_chunk: blocks in a chunk.
        fallible: whether this tier may fail at all.
        check: called with what is about to be written into the engine, once that was admitted.
        stall: called where a job may take its time: without an argument where there is no telling
            how long, else with seconds.
    """

    def __init__(
        self,
        inner: RowSource,
        sky: Sky,
        blocks_per_chunk: int,
        fallible: bool,
        check: Callable[[Piece], None],
        stall: Callable[..., None],
    ) -> None:
        self._inner = inner
        self._stall = stall
        self._sky = sky
        self._per_chunk = blocks_per_chunk
        self._fallible = fallible
        self._check = check

    def load_row(
        self, row: int, piece: Piece, after: Fence, admit: Callable[[], bool]
    ) -> Fence | None:
        """See :class:`~lamina.data.load_pipeline.RowSource`."""
        sky = self._sky
        self._stall()
        if self._fallible and sky.strikes(sky.weather.error):
            raise InjectedError("the tier is gone")
        bad: set[int] = set()
        rest = piece
        if self._fallible and sky.strikes(sky.weather.bad):
            chunks = range(len(piece.keys))
            bad = set(sky.random.sample(chunks, sky.random.randint(1, len(chunks))))
            good = ~np.isin(piece.pages // self._per_chunk, list(bad))
            rest = replace(piece, pages=piece.pages[good], blocks=piece.blocks[good])

        def checked() -> bool:
            granted = admit()
            if granted:
                self._stall(sky.random.random() * sky.deadline * WRITE_TIME)
                self._check(rest)
            return granted

        try:
            fence = self._inner.load_row(row, rest, after, checked)
        except BadChunks as error:
            damaged = bad.union(error.damaged)
            raise BadChunks(
                sorted(bad.union(error.indices)), sorted(damaged), error.reason
            ) from error
        if bad:
            raise BadChunks(sorted(bad), sorted(bad), "rain")
        return fence


class RainyDisk:
    """A disk tier that refuses to be changed now and then.

    Args:
        inner: the tier; whatever is not defined here is its own.
        sky: decides.
    """

    def __init__(self, inner: DiskTier, sky: Sky) -> None:
        self._inner = inner
        self._sky = sky

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def _rain(self) -> None:
        if self._sky.strikes(self._sky.weather.write_error):
            raise InjectedError("the disk is full")

    def begin(self, slots: Sequence[int]) -> None:
        """See :class:`~lamina.data.tiers.disk.DiskTier`."""
        self._rain()
        self._inner.begin(slots)

    def write_row(self, row: int, slots: Sequence[int], extents: Sequence[Extent]) -> None:
        """See :class:`~lamina.data.tiers.disk.DiskTier`."""
        self._rain()
        self._inner.write_row(row, slots, extents)

    def commit(self, chunks: Sequence[tuple[int, ChunkKey]]) -> None:
        """See :class:`~lamina.data.tiers.disk.DiskTier`."""
        self._rain()
        self._inner.commit(chunks)


class Mail:
    """Carries one rank's receipts to control: late, twice, out of order, years later.

    Args:
        sky: decides.
    """

    def __init__(self, sky: Sky) -> None:
        self._sky = sky
        self._queue: list[TransferReceipt] = []
        self._old: deque[TransferReceipt] = deque(maxlen=200)

    @property
    def is_empty(self) -> bool:
        """Whether everything was delivered."""
        return not self._queue

    def exchange(self, receipt: Receipt) -> Receipt:
        """Take in what the rank has to say now; returns what control is told now."""
        sky, weather = self._sky, self._sky.weather
        self._queue += receipt.transfers
        now, self._queue = self._queue, []
        if sky.strikes(weather.late):
            cut = sky.random.randint(0, len(now))
            now, self._queue = now[:cut], now[cut:]
        if weather.overtaken:
            held = [item for item in now if sky.strikes(weather.overtaken)]
            now = [item for item in now if item not in held]
            self._queue = held + self._queue
        self._old.extend(now)
        now += [item for item in now if sky.strikes(weather.twice)]
        if self._old and sky.strikes(weather.stale):
            now.append(sky.random.choice(self._old))
        if sky.strikes(weather.shuffled):
            sky.random.shuffle(now)
        return Receipt(receipt.rank, tuple(now))
