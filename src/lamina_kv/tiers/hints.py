"""What others said they have: an index of a store that finds chunks by key and evicts by itself.

Every entry is a hint of a certain age. A chunk may be gone when it is read, and may be there
although it was not before. So a hint is believed for a while and asked for anew after that, and a
chunk that was promised and could not be read is absent for a while.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Answer, End
from lamina_kv.tiers.reuse import ALONE, Standing, Use
from lamina_kv.tiers.touches import Touches

BELIEVED_SECONDS = 60.0
"""How long a store is believed to have a chunk. A wrong hint costs one read, a question costs a
round trip: of a store that keeps a chunk for an hour, one hint in a hundred is wrong."""

ABSENT_SECONDS = 10.0
"""How long a store is believed to lack a chunk, so that a queue of requests with a common prefix
asks once. What another engine saves meanwhile is computed again."""

GONE_SECONDS = 60.0
"""How long a chunk is absent that was promised and could not be read. The store may go on
promising it, and each promise delays a request."""

UNANSWERED_SECONDS = 1.0
"""How long a chunk is absent after the store did not answer a question about it in time."""

MOST_ASKED = 4096
"""Chunks of one question: more would hold up the scheduler for more than 10 ms. The next question
has the rest."""

MOST_UNANSWERED = 4
"""Questions that may be unanswered. What a tier that hangs is not asked any more waits here, and
not in its queue."""

HANGS_SECONDS = 1.0
"""A store hangs that has not answered the oldest of :data:`MOST_UNANSWERED` questions for so long.
Requests wait for answers for hundredths of a second: they have waited for these in vain."""

BOUND = 200_000
"""Chunks that are remembered: at 64 tokens each, 12.8 million tokens, in about 40 MB."""


class _Hint(NamedTuple):
    """What a store said of a chunk.

    Attributes:
        here: whether it has it.
        until: the moment, by the index's clock, from which nobody knows any more.
    """

    here: bool
    until: float


class HintIndex:
    """What a store said of chunks; an :class:`~lamina_kv.tiers.contract.Index`.

    Args:
        clock: monotonic seconds.
        bound: how many chunks are remembered, and how many questions wait to be asked.

    Attributes:
        version: chunks that were here and are not any more, so far.
        arrivals: answers, and chunks that were written, so far.
        on_change: see :class:`~lamina_kv.tiers.contract.Index`.
    """

    def __init__(self, clock: Callable[[], float], bound: int = BOUND) -> None:
        self.version = 0
        self.arrivals = 0
        self.on_change: Callable[[ChunkKey], None] | None = None
        self._clock = clock
        self._bound = bound
        self._hints: OrderedDict[ChunkKey, _Hint] = OrderedDict()  # least recently used first
        self._present = 0
        self._filling: set[ChunkKey] = set()
        self._touches = Touches()
        self._questions: dict[ChunkKey, None] = {}
        self._asked: set[ChunkKey] = set()
        self._unanswered: dict[ChunkKey, float] = {}  # first keys of questions; when, oldest first

    @property
    def capacity(self) -> int:
        """0: the store knows."""
        return 0

    @property
    def used(self) -> int:
        """Chunks that the store was last said to have, and those on their way to it."""
        return self._present + len(self._filling)

    @property
    def pinned(self) -> int:
        """0: a store gives up what it likes."""
        return 0

    # -- lookups -----------------------------------------------------------------------------

    def find(self, key: ChunkKey) -> Answer:
        """Whether the store has a chunk, if that is known; else it will be asked, and while it
        hangs has none."""
        answer = self._answer(key)
        if answer is not Answer.UNKNOWN:
            return answer
        if self._hangs:
            return Answer.ABSENT
        if key not in self._asked and len(self._questions) < self._bound:
            self._questions[key] = None
        return Answer.UNKNOWN

    def has(self, key: ChunkKey) -> bool:
        """Whether the store was last said to have a chunk, however long ago."""
        hint = self._hints.get(key)
        return hint is not None and hint.here

    def holds(self, key: ChunkKey) -> bool:
        """Whether the store is believed to have a chunk, or it is on its way there."""
        return key in self._filling or self._answer(key) is Answer.HERE

    def hold(self, key: ChunkKey) -> int:
        """Nothing can be held in a store of others; returns 0, the place of every chunk."""
        return 0

    def release(self, place: int) -> None:
        """The other half of :meth:`hold`."""

    # -- writes and losses -------------------------------------------------------------------

    def room(self, key: ChunkKey, standing: Standing = ALONE, *, uses: int = 0) -> int:
        """0: the store makes room by itself, and sees uses by itself.

        Raises:
            ValueError: if the chunk is held.
        """
        if self.holds(key):
            raise ValueError(f"the tier already holds chunk {key.hex()}")
        self._filling.add(key)
        return 0

    def filled(self, key: ChunkKey) -> None:
        """A chunk was written, so that the store has it now."""
        self._filling.discard(key)
        self.arrivals += 1
        self._note(key, True, BELIEVED_SECONDS)

    def abandoned(self, key: ChunkKey) -> None:
        """A chunk was not written."""
        self._filling.discard(key)
        self._changed(key)

    def lost(self, key: ChunkKey, place: int) -> None:
        """A chunk was promised and is gone, or damaged: it is absent for a while, whatever the
        store says meanwhile."""
        self._note(key, False, GONE_SECONDS)

    def drops(self) -> tuple[int, ...]:
        """None: the store has no slots."""
        return ()

    # -- use ---------------------------------------------------------------------------------

    def use_prefix(
        self,
        chain: Sequence[ChunkKey],
        use: Use,
        ends: Sequence[End] = (),
        *,
        over: bool = False,
    ) -> Iterator[None]:
        """Chunks were of use: what is known of them is remembered longer than other hints."""
        if not over:
            self._touches.add(chain, ends)
        return self.expect(chain, ends)

    def expect(self, chain: Sequence[ChunkKey], ends: Sequence[End] = ()) -> Iterator[None]:
        """What is known of chunks is remembered longer than other hints. Each of them is looked
        at."""
        for key in (*(end for end, _ in ends), *reversed(chain)):
            if key in self._hints:
                self._hints.move_to_end(key)
                yield

    def uses(self, key: ChunkKey) -> int:
        """0: that is the store's affair."""
        return 0

    def touches(self) -> tuple[tuple[ChunkKey, int], ...]:
        """Uses that the store has yet to hear of."""
        return self._touches.take(self._place)

    def _place(self, key: ChunkKey) -> int | None:
        hint = self._hints.get(key)
        return 0 if hint is not None and hint.here else None

    # -- questions ---------------------------------------------------------------------------

    def asks(self) -> tuple[ChunkKey, ...]:
        """Chunks that :meth:`find` did not know, :data:`MOST_ASKED` at most. Each is asked for
        once, until :meth:`told` has an answer or none."""
        if not self.pending:
            return ()
        questions = tuple(islice(self._questions, MOST_ASKED))
        for key in questions:
            del self._questions[key]
        self._asked.update(questions)
        self._unanswered[questions[0]] = self._clock()
        return questions

    def told(self, keys: Sequence[ChunkKey], present: Sequence[bool] | None) -> None:
        """Take in an answer.

        Args:
            keys: the chunks of one question.
            present: for each, whether the store has it; None if there was no answer in time.
        """
        self.arrivals += 1
        self._asked.difference_update(keys)
        self._unanswered.pop(keys[0], None)
        for index, key in enumerate(keys):
            if present is None:
                if self._answer(key) is Answer.UNKNOWN:
                    self._note(key, False, UNANSWERED_SECONDS)
            elif not present[index]:
                self._note(key, False, ABSENT_SECONDS)
            elif self._answer(key) is not Answer.ABSENT:  # it is gone, or was when it was read
                self._note(key, True, BELIEVED_SECONDS)

    @property
    def pending(self) -> bool:
        """Whether :meth:`asks` would return any."""
        return bool(self._questions) and len(self._unanswered) < MOST_UNANSWERED

    @property
    def _hangs(self) -> bool:
        if len(self._unanswered) < MOST_UNANSWERED:
            return False
        return self._clock() >= next(iter(self._unanswered.values())) + HANGS_SECONDS

    # -- hints -------------------------------------------------------------------------------

    def _answer(self, key: ChunkKey) -> Answer:
        hint = self._hints.get(key)
        if hint is None or hint.until <= self._clock():
            return Answer.UNKNOWN
        return Answer.HERE if hint.here else Answer.ABSENT

    def _note(self, key: ChunkKey, here: bool, seconds: float) -> None:
        """Believe something of a chunk for that long; forget the oldest hint if there are too
        many."""
        was_here = self._forget(key)
        self.version += was_here and not here
        self._hints[key] = _Hint(here, self._clock() + seconds)
        self._present += here
        if was_here != here:
            self._changed(key)
        if len(self._hints) > self._bound:
            oldest = next(iter(self._hints))
            if self._forget(oldest):
                self._changed(oldest)

    def _changed(self, key: ChunkKey) -> None:
        if self.on_change is not None:
            self.on_change(key)

    def _forget(self, key: ChunkKey) -> bool:
        """Forget what is known of a chunk; returns whether that was its being here."""
        hint = self._hints.pop(key, None)
        here = hint is not None and hint.here
        self._present -= here
        return here
