"""A far tier of one rank: its store, of which nothing is believed.

What is written is sealed first and what is read is verified, so that no store, however it fails,
brings bytes of anything but the chunk that was asked for. A call never raises: a store that does
has failed what it was asked for. Called from the threads of :mod:`lamina_kv.data.moving` only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from lamina_kv.plan import ChunkKey, TierName, TierReport
from lamina_kv.tiers.contract import Fate, Piece, Store, Traits
from lamina_kv.tiers.objects import seal, verify
from lamina_kv.tiers.once import Once

log = logging.getLogger("lamina_kv.data")

NO_ANSWER = "no_answer"
"""Why a question failed that the store could not answer."""

MOST_DAMAGED = 10_000
"""Chunks that were found damaged and are remembered until they are written again."""


class FarTier:
    """See the module.

    Args:
        name: the tier.
        store: where its chunks are.
        shard: number of the rank's part of each chunk.
        length: bytes of that part.
        timeout: seconds that a call of the store should take at most.

    Attributes:
        name: the tier.
    """

    def __init__(
        self, name: TierName, store: Store, *, shard: int, length: int, timeout: float
    ) -> None:
        self.name = name
        self._store = store
        self._shard = shard
        self._length = length
        self._timeout = timeout
        self._once = Once()
        self._damaged: set[ChunkKey] = set()

    @property
    def traits(self) -> Traits:
        """How its store is to be called."""
        return self._store.traits

    def report(self, *, keys: bool) -> TierReport:
        """What it holds; called before anything else, and may raise.

        Args:
            keys: whether whole keys are wanted, or marks are enough.
        """
        return TierReport(self.name, self._store.slots, self._store.stored(keys=keys))

    def find(self, keys: Sequence[ChunkKey]) -> tuple[bytes, str]:
        """Which chunks the store has: one byte for each, or none and why there is no answer."""
        present = b""

        def find() -> None:
            nonlocal present
            found = self._store.find(keys, self._timeout)
            if found is not None:
                present = bytes(map(bool, found))
                _require_one_each(len(present), len(keys))

        if reason := self._attempt("find", find):
            return b"", reason
        return present, NO_ANSWER if keys and not present else ""

    def probe(self) -> str:
        """Whether the store works now: empty if it does, else why not."""
        works = False

        def probe() -> None:
            nonlocal works
            works = bool(self._store.probe(self._timeout))

        return self._attempt("probe", probe) or ("" if works else NO_ANSWER)

    def read(self, pieces: Sequence[Piece]) -> list[str]:
        """Fill the buffers.

        Returns:
            For each piece a :class:`~lamina_kv.tiers.contract.Fate`, or the name of what the store
            raised. A piece is done if its buffer holds the chunk, whole.
        """

        def read() -> Iterable[Fate]:
            for piece, fate in zip(pieces, self._store.read(pieces, self._timeout), strict=True):
                if fate is Fate.DONE and not verify(
                    piece.buffer, piece.key, self._shard, self._length
                ):
                    fate = Fate.CORRUPT  # noqa: PLW2901 - the store's word is worth nothing
                if fate is Fate.CORRUPT:
                    self._note_damage(piece.key, piece.place)
                yield fate

        return self._fates("read", read, len(pieces))

    def write(self, pieces: Sequence[Piece]) -> list[str]:
        """Write what is in the buffers; returns what :meth:`read` does."""
        damaged = self._damaged
        told = [piece._replace(damaged=True) if piece.key in damaged else piece for piece in pieces]

        def write() -> Iterable[Fate]:
            for piece in told:
                seal(piece.buffer, piece.key, self._shard, self._length)
            for piece, fate in zip(told, self._store.write(told, self._timeout), strict=True):
                if fate is Fate.DONE:
                    damaged.discard(piece.key)
                yield fate

        return self._fates("write", write, len(pieces))

    def drop(self, slots: Sequence[int]) -> None:
        """Forget what these slots hold."""
        self._attempt("drop", lambda: self._store.drop(slots))

    def touch(self, uses: Sequence[tuple[ChunkKey, int]]) -> None:
        """Chunks, with their places, were of use."""
        self._attempt("touch", lambda: self._store.touch(uses))

    def close(self) -> None:
        """Release everything."""
        self._attempt("close", self._store.close)

    def _note_damage(self, key: ChunkKey, place: int) -> None:
        if len(self._damaged) < MOST_DAMAGED:
            self._damaged.add(key)
        if self._once.first(Fate.CORRUPT):
            log.warning(
                "tier %s: chunk %s in place %d is not what was written: it is forgotten and "
                "computed again. A few are normal after a power failure; more mean that something "
                "damages what is stored. Said once; `corrupt` in the tier's failures counts them",
                self.name,
                key.hex(),
                place,
            )

    def _fates(self, verb: str, call: Callable[[], Iterable[Fate]], count: int) -> list[str]:
        fates: list[Fate] = []

        def attempt() -> None:
            fates.extend(call())
            _require_one_each(len(fates), count)

        reason = self._attempt(verb, attempt)
        return [reason] * count if reason else [fate.value for fate in fates]

    def _attempt(self, verb: str, call: Callable[[], None]) -> str:
        """Call the store; returns the name of what it raised, empty if nothing."""
        try:
            call()
        except BaseException as error:  # however a call ends, somebody waits for its receipt
            if self._once.first(verb, type(error).__name__):
                log.exception(
                    "tier %s: its store raised in %s, which is a fault of the store. What it was "
                    "asked for has failed, and serving goes on; said once for each kind of error",
                    self.name,
                    verb,
                )
            return type(error).__name__
        return ""


def _require_one_each(answers: int, asked: int) -> None:
    if answers != asked:
        raise ValueError(f"{answers} answers for {asked} chunks")
