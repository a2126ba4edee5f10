"""Why a prompt was not found further: what the first chunk is that its hit lacks.

Remembered are chunks that tiers have evicted, the chunks that hits have lacked, and the tokens that
prompts began with; of each the last :data:`MOST`, some 15 MB together. So an answer is about what
this process has seen: another version of the engine, or another model, is another namespace, and
what is stored there counts as never seen.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import TypeVar

from lamina_kv.control.requests import RequestRecord
from lamina_kv.keys import Epoch
from lamina_kv.plan import ChunkKey

MOST = 1 << 15

T = TypeVar("T")


class Reason(StrEnum):
    """Why a chunk was not there; the value is its word in metrics."""

    EVICTED = "evicted"
    """A tier had it, and gave it up for others: a larger one would have it."""
    OTHER_SALT = "other_salt"
    """A prompt that began with the same tokens had another ``cache_salt``, or another adapter."""
    OTHER_WEIGHTS = "other_weights"
    """A prompt that began with the same tokens was computed by other weights."""
    NOT_KEPT = "not_kept"
    """A request lacked it before, and it was not kept since: its save is not over, was held back
    or has failed."""
    NEVER_SEEN = "never_seen"
    """This process has not seen it, or no longer knows."""


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a hit is not longer.

    Attributes:
        reason: of the first chunk that it lacks.
        seconds: for how long that chunk has been evicted; 0 for another reason.
    """

    reason: Reason
    seconds: float = 0.0

    def __str__(self) -> str:
        """For a log line."""
        if self.reason is Reason.EVICTED:
            return f"evicted {self.seconds:.0f} s ago"
        return _WORDS[self.reason]


_WORDS = {
    Reason.OTHER_SALT: "seen with another cache_salt or adapter",
    Reason.OTHER_WEIGHTS: "seen with other weights",
    Reason.NOT_KEPT: "seen before, and not kept",
    Reason.NEVER_SEEN: "never seen",
}


class Misses:
    """See the module. A part of the planner.

    Args:
        chunk_tokens: tokens of one chunk.
        clock: monotonic seconds.
        most: what is remembered of each kind.
    """

    def __init__(self, chunk_tokens: int, clock: Callable[[], float], most: int = MOST) -> None:
        self._chunk_tokens = chunk_tokens
        self._clock = clock
        self._most = most
        self._evicted: dict[bytes, float] = {}
        self._lacked: dict[bytes, None] = {}
        self._began: dict[bytes, tuple[bytes, Epoch]] = {}

    def evicted(self, key: ChunkKey) -> None:
        """A tier has given up a chunk for another one."""
        self._remember(self._evicted, _short(key), self._clock())

    def why(self, record: RequestRecord, lacked: Sequence[ChunkKey]) -> Miss | None:
        """Why a request was not found further, and remember what it lacked.

        Args:
            record: the request.
            lacked: the chunk that would make its hit longer, of every cache group that does not
                have it; none if the hit is as long as it may be.
        """
        began = self._beginning(record)
        if not lacked:
            return None
        miss = self._reason(lacked, began, record.chain.groups[0][0] in lacked)
        for key in lacked:
            self._remember(self._lacked, _short(key), None)
        return miss

    def _reason(
        self, lacked: Sequence[ChunkKey], began: tuple[bool, bool], nothing_found: bool
    ) -> Miss:
        moments = [self._evicted[k] for key in lacked if (k := _short(key)) in self._evicted]
        if moments:
            return Miss(Reason.EVICTED, max(0.0, self._clock() - max(moments)))
        if any(_short(key) in self._lacked for key in lacked):
            return Miss(Reason.NOT_KEPT)
        other_salt, other_weights = began
        if nothing_found and other_salt:
            return Miss(Reason.OTHER_SALT)
        if nothing_found and other_weights:
            return Miss(Reason.OTHER_WEIGHTS)
        return Miss(Reason.NEVER_SEEN)

    def _beginning(self, record: RequestRecord) -> tuple[bool, bool]:
        """Whether the last prompt that began with the same chunk of tokens had another salt or
        adapter, and whether other weights; and remember this one."""
        tokens = record.view.tokens()[: self._chunk_tokens]
        if len(tokens) < self._chunk_tokens:
            return False, False
        name = blake2b(array("q", tokens).tobytes(), digest_size=8).digest()
        mine = record.view.root_extra, record.chain.epoch
        last = self._began.get(name, mine)
        self._remember(self._began, name, mine)
        return last[0] != mine[0], last[1] != mine[1]

    def _remember(self, known: dict[bytes, T], name: bytes, value: T) -> None:
        known.pop(name, None)  # so that it is the youngest
        known[name] = value
        if len(known) > self._most:
            del known[next(iter(known))]


def _short(key: ChunkKey) -> bytes:
    """Enough of a key to tell a few thousand apart, and a fifth of the memory."""
    return key[:8]
