"""What a far tier is: an index in control and a store on each rank. No torch, no I/O.

A far tier may be slow, may fail, and may be shared with others who write and delete. No step
touches one. A chunk that is only far is moved into a near slot while its request waits without
blocks; what vanishes meanwhile makes the hit shorter.

Control keeps an :class:`Index` of each tier and the data room runs its :class:`Store`. They share
nothing but the tier's name, and slots where the tier has any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lamina_kv.plan import ChunkKey, StoredChunks
from lamina_kv.tiers.reuse import ALONE, Standing, Use

End = tuple[ChunkKey, ChunkKey | None]
"""A chunk at the end of a prefix that others do without, and the chunk in front of it."""


class Answer(Enum):
    """Whether a tier has a chunk, as far as control knows."""

    HERE = "here"
    UNKNOWN = "unknown"
    """The tier has not been asked, or has not answered: it may be there."""
    ABSENT = "absent"


class NoRoom(Enum):
    """Why a tier reserves no place for a chunk."""

    IN_USE = "in_use"
    """Nothing may go now: chunks are leased, or still being filled. Later something may."""
    WORTH_LESS = "worth_less"
    """Only what is worth more could go."""


class StoreError(RuntimeError):
    """A store cannot be opened as it is configured; the text names the key and says what to do."""


class Fate(StrEnum):
    """What became of one piece that a store was to read or write."""

    DONE = "done"
    GONE = "gone"
    """The chunk cannot be had from its place, now or later: it is not there, another one is, or
    the place cannot be read. It is forgotten. Says nothing against the store."""
    CORRUPT = "corrupt"
    """Bytes came, and not those that were written. The chunk is forgotten."""
    LATE = "late"
    """The store did not answer in time."""
    REFUSED = "refused"
    """The store is full, or does not let this user."""
    DOWN = "down"
    """The store does not answer at all, or only with errors. The chunk may still be there, and is
    not forgotten."""


@dataclass(frozen=True, slots=True)
class Traits:
    """How the data room is to call a store.

    Attributes:
        readers: threads that may read at once.
        batch: pieces that are best given in one call.
    """

    readers: int = 1
    batch: int = 32


@dataclass(frozen=True, slots=True)
class Tenant:
    """For whom a store is opened: one rank and everything but tokens that sets its chunks apart.

    Attributes:
        namespace: fingerprint of the model and all else that changes bytes, hexadecimal.
        description: what the fingerprint stands for, for people.
        rank: number of the rank's part; below it are those of other engines of one server.
        ranks: how many parts the server has, its engines' all together; None if nobody knows.
        object_bytes: bytes of each piece's buffer.
        shard: which part of a chunk the rank has: its number within its own engine, so that the
            replicas of a server, and its data-parallel ranks, find each other's chunks by key.
    """

    namespace: str
    description: Mapping[str, str]
    rank: int
    ranks: int | None
    object_bytes: int
    shard: int


class Piece(NamedTuple):
    """One chunk to be read or written.

    Attributes:
        key: its key.
        place: its slot in the store; 0 where that goes by key.
        buffer: the chunk's whole object, ``object_bytes`` of uint8 in a near slot, aligned to
            :data:`~lamina_kv.geometry.DIRECT_IO_ALIGNMENT`. Header and checksum are in it: the data
            room seals an object before it is written and verifies it after it was read.
        damaged: of a write: whether this rank has read the chunk from the store, and it was not
            what was written. A store by key keeps the first object of a key, and replaces this one,
            if it can.
    """

    key: ChunkKey
    place: int
    buffer: npt.NDArray[np.uint8]
    damaged: bool = False


class Store(Protocol):
    """A far tier of one rank. The data room calls it from threads of this tier only, never from a
    step: ``read``, ``find`` and ``probe`` from :attr:`Traits.readers` threads at once, everything
    else from one thread.

    :meth:`stored` says which of two sorts a store is. With slots, control assigns a slot to each
    chunk, evicts, and calls ``drop`` and never ``find``. By key, the store evicts by itself,
    ``find`` answers with a hint, and every place is 0.

    A call returns when it has ended, and ``timeout`` is what it should take at most. No byte is
    written into a buffer after the call has returned. A near slot stays reserved until then, so a
    call that hangs costs a thread and some slots, and no request.
    """

    @property
    def traits(self) -> Traits:
        """How it is to be called."""

    @property
    def slots(self) -> int:
        """Chunks that fit, at least 1; 0 where chunks are found by key."""

    def stored(self, *, keys: bool) -> StoredChunks | None:
        """What it holds when it is opened; None where chunks are found by key. Called once, before
        anything else.

        Args:
            keys: whether keys and last uses are wanted, too, or slots and marks are enough.
        """

    def find(self, keys: Sequence[ChunkKey], timeout: float) -> Sequence[bool] | None:
        """Which chunks it has; a hint. None if it could not tell."""

    def probe(self, timeout: float) -> bool:
        """Whether it works now: the cheapest call that fails while the store does not answer, is
        not there, or lets nobody in. Called about once a second while the tier is out of use, so
        that it is used again soon after. What has to be opened anew is opened here, and no request
        waits for that."""

    def read(self, pieces: Sequence[Piece], timeout: float) -> Sequence[Fate]:
        """Fill the buffers; never raises for what goes wrong with the store."""

    def write(self, pieces: Sequence[Piece], timeout: float) -> Sequence[Fate]:
        """Keep the chunks, visible to others and after a crash whole or not at all; never raises
        for what goes wrong with the store. What a slot held before is gone in any case."""

    def drop(self, slots: Sequence[int]) -> None:
        """Forget what these slots hold; nothing where chunks are found by key."""

    def touch(self, uses: Sequence[tuple[ChunkKey, int]]) -> None:
        """Chunks, with their places, were of use; best effort."""

    def close(self) -> None:
        """Release everything; no other call is under way. Idempotent."""


class Index(Protocol):
    """Control's half of a far tier; one writer, the scheduler's thread.

    Attributes:
        version: changes whenever a chunk that was here is not any more.
        arrivals: changes whenever more is known to be here or absent than before.
        on_change: called with every chunk of which :meth:`has` or :meth:`holds` may say something
            else than before; None while nobody listens.
    """

    version: int
    arrivals: int
    on_change: Callable[[ChunkKey], None] | None

    def find(self, key: ChunkKey) -> Answer:
        """Whether the tier has a chunk; one that is unknown is asked for, see :meth:`asks`."""

    def has(self, key: ChunkKey) -> bool:
        """Whether a chunk is here, as far as was ever known. Asks nobody."""

    def holds(self, key: ChunkKey) -> bool:
        """Whether a chunk is here, or is being written, as far as is known. Asks nobody."""

    def hold(self, key: ChunkKey) -> int:
        """Pin a chunk that is here until :meth:`release`; returns its place."""

    def release(self, place: int) -> None:
        """Take back one hold."""

    def room(self, key: ChunkKey, standing: Standing = ALONE, *, uses: int = 0) -> int | NoRoom:
        """Reserve a place for a chunk that is not held, evicting another one if need be.

        Args:
            key: the chunk.
            standing: where it stands.
            uses: how often another tier says that it was used.
        """

    def filled(self, key: ChunkKey) -> None:
        """A chunk was written to its reserved place: it is here now."""

    def abandoned(self, key: ChunkKey) -> None:
        """A chunk was not written to its reserved place: that is free again."""

    def lost(self, key: ChunkKey, place: int) -> None:
        """A chunk could not be delivered from a place, ever: forget it if it is still there."""

    def expect(self, chain: Sequence[ChunkKey], ends: Sequence[End] = ()) -> Iterator[None]:
        """A request that is yet to begin will use a prefix: what is here of it is given up after
        others, if that can be helped. Nothing is counted. A step each time, and arguments, as of
        :meth:`use_prefix`."""

    def use_prefix(
        self,
        chain: Sequence[ChunkKey],
        use: Use,
        ends: Sequence[End] = (),
        *,
        over: bool = False,
    ) -> Iterator[None]:
        """A prefix was of use, or what is here of it: its beginning is the youngest of all.

        Work is done as the iterator is drawn on, a step each time, so that the caller may stop and
        go on later.

        Args:
            chain: the prefix from its beginning: chunks none of which is of use without those in
                front of it. It may grow meanwhile at its end only.
            use: the use.
            ends: chunks of use beside the chain, and behind which chunk of it each stands: the last
                ones of windows, states.
            over: whether the request that makes this use has ended, too. It saves nothing more, so
                that what is not here of its prefix is missed.
        """

    def uses(self, key: ChunkKey) -> int:
        """How often a chunk that is here was used, if this index keeps account; else 0."""

    def touches(self) -> tuple[tuple[ChunkKey, int], ...]:
        """Chunks that were of use, with their places, some of those that were not yet told."""

    def drops(self) -> tuple[int, ...]:
        """Slots that the store has yet to forget, since the last call."""

    def asks(self) -> tuple[ChunkKey, ...]:
        """Chunks that :meth:`find` was asked for and did not know; the next question. None while
        there are none, or too many questions are unanswered."""

    def told(self, keys: Sequence[ChunkKey], present: Sequence[bool] | None) -> None:
        """An answer to one call of :meth:`asks`; None if there was none in time."""

    @property
    def pending(self) -> bool:
        """Whether there is anything to drop or to ask for."""

    @property
    def capacity(self) -> int:
        """Chunks that fit; 0 where chunks are found by key, and only the store knows."""

    @property
    def used(self) -> int:
        """Chunks that are here or being written, as far as control knows."""

    @property
    def pinned(self) -> int:
        """Of these, chunks that requests have pinned, if this index honours pins; else 0."""
