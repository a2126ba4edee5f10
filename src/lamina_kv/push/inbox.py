"""What has come from other engines, and control has not taken up yet.

The link's thread puts it here, and wakes the engine. The scheduler's thread takes all of it when it
steps: at once, or after a long step, or never, if the engine's device hangs. So there is a bounded
amount of each connection, and whatever control need not see does not wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from lamina_kv.push.letters import Due, Letter, Lost, News, Opened, PeerName
from lamina_kv.push.messages import NO_EPOCH, Announce, Attempt, Cancel, LinkMessage

MAX_LETTERS = 4096
"""Messages of one connection that may wait for control. In a step of a second, a decode engine
announces far fewer."""

MAX_BYTES = 16 << 20
"""Bytes of them. An announcement has a few for each block of its prompt."""


@dataclass(slots=True, eq=False)
class Mailbox:
    """What waits of one connection.

    Attributes:
        sizes: bytes of each message, by its number.
        size: bytes of all.
        opened: number of the word that the connection was made, until control has it.
        announced: numbers of announcements.
        cancelled: attempts whose cancellation waits.
        resume: called by the scheduler's thread when there is room again.
    """

    sizes: dict[int, int] = field(default_factory=dict)
    size: int = 0
    opened: int | None = None
    announced: dict[Attempt, int] = field(default_factory=dict)
    cancelled: set[Attempt] = field(default_factory=set)
    resume: Callable[[], None] | None = None

    def add(self, number: int, message: LinkMessage, size: int) -> None:
        """A message waits."""
        self.sizes[number] = size
        self.size += size
        match message:
            case Announce(attempt):
                self.announced[attempt] = number
            case Cancel(attempt):
                self.cancelled.add(attempt)

    def take_back(self, attempt: Attempt) -> int | None:
        """The number of an announcement that waits, and does not any more."""
        number = self.announced.pop(attempt, None)
        if number is not None:
            self.size -= self.sizes.pop(number)
        return number

    def empty(self) -> None:
        """Nothing waits any more."""
        self.size, self.opened, self.resume = 0, None, None
        for numbers in (self.sizes, self.announced, self.cancelled):
            numbers.clear()


Take = Callable[[PeerName, Announce], bool]


def _nothing_is_offered(_: PeerName, __: Announce) -> bool:
    return False


class Inbox:
    """See the module. Safe to use from any thread.

    Args:
        wake: called when something has come and nothing was there before.
        take: offered every announcement, with its peer's name. Says whether it is being sent, and
            control knows of it. Called by the link's thread.
    """

    def __init__(self, wake: Callable[[], object], take: Take = _nothing_is_offered) -> None:
        self._wake = wake
        self._take = take
        self._lock = threading.Lock()
        self._news: dict[int, News] = {}
        self._filled: set[Mailbox] = set()
        self._next = 0

    def __bool__(self) -> bool:
        return bool(self._news)

    def take(self) -> list[News]:
        """Everything that has come since the last call, in order."""
        if not self._news:
            return []
        with self._lock:
            news, self._news = list(self._news.values()), {}
            resumes = [box.resume for box in self._filled if box.resume is not None]
            for box in self._filled:
                box.empty()
            self._filled.clear()
        for resume in resumes:
            resume()
        return news

    def due(self) -> None:
        """A moment has come at which control wanted to be asked."""
        with self._lock:
            self._put(Due())

    def opened(self, box: Mailbox, opened: Opened) -> None:
        """A connection was made."""
        with self._lock:
            box.opened = self._put(opened)
            self._filled.add(box)

    def lost(self, box: Mailbox, lost: Lost, *, forget: bool) -> None:
        """A connection is over.

        Args:
            box: what waits of it.
            lost: what control is told.
            forget: whether nothing matters any more that the peer has said.
        """
        with self._lock:
            if forget:
                for number in box.sizes:
                    del self._news[number]
                never = box.opened
                box.empty()
                if never is not None:  # as far as control knows
                    del self._news[never]
                    return
            self._put(lost)

    def letter(self, box: Mailbox, letter: Letter, size: int) -> Attempt | None:
        """A peer has said something.

        Args:
            box: what waits of its connection.
            letter: what was said.
            size: bytes of it.

        Returns:
            The attempt that is cancelled before control has seen it: nothing of it was sent, and
            its peer may be told so. None for anything else.
        """
        never: Attempt | None = None
        with self._lock:
            if isinstance(letter.message, Cancel):
                attempt = letter.message.attempt
                if attempt in box.cancelled:
                    return None  # asked again
                if (number := box.take_back(attempt)) is not None:
                    del self._news[number]
                    never = attempt
                    # Its prompt may be here, and must not wait for a destination.
                    letter = Letter(letter.peer, Cancel(Attempt(attempt.push, NO_EPOCH)))
            if (
                isinstance(letter.message, Announce)
                # Control knows the connection: if it is lost, what is sent is stopped.
                and box.opened is None
                and self._take(letter.peer, letter.message)
            ):
                return None
            box.add(self._put(letter), letter.message, size)
            self._filled.add(box)
        return never

    def is_full(self, box: Mailbox, resume: Callable[[], None]) -> bool:
        """Whether nothing more of a connection should be read. If so, ``resume`` is called once
        there is room."""
        with self._lock:
            full = len(box.sizes) >= MAX_LETTERS or box.size >= MAX_BYTES
            if full:
                box.resume = resume
            return full

    def _put(self, news: News) -> int:
        self._next += 1
        self._news[self._next] = news
        if len(self._news) == 1:
            self._wake()
        return self._next
