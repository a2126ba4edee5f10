"""All engines that the file of ``--engines`` names, and those that are found as it says."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from lamina_kv.push.proxy.discovery.listing import Listing, read_listing
from lamina_kv.push.proxy.discovery.places import Found, Place, Source, SourceError
from lamina_kv.push.proxy.settings import SettingsError

log = logging.getLogger("lamina_kv.push.proxy")

_SETTLE_SECONDS = 0.1
PAUSE = 5.0
"""Seconds before a source is asked again that could not be asked."""


class _Last:
    """What was said last, which is not said again as long as it stays so."""

    def __init__(self) -> None:
        self._said = ""

    def is_news(self, text: str) -> bool:
        """Whether a text is another one than the last; from now on it is the last."""
        news, self._said = text != self._said, text
        return news

    def clear(self) -> None:
        """All is well: whatever is wrong next is news."""
        self._said = ""


class Discovery:
    """See the module. Belongs to one event loop.

    Args:
        file: of ``--engines``.
        interval: seconds between two looks at it. It is read as a whole and not watched: a mounted
            ConfigMap is replaced by a link, which no watch of a file sees.
        pause: seconds before a source is asked again that could not be asked.

    Attributes:
        settled: set when every source has said something.

    Raises:
        SettingsError: if the file cannot be used.
    """

    def __init__(self, file: Path, interval: float, pause: float = PAUSE) -> None:
        self.settled = asyncio.Event()
        self._file = file
        self._interval = interval
        self._pause = pause
        self._text = _read(file)
        self._listing = _understand(file, self._text)
        self._watches: dict[Source, asyncio.Task[None]] = {}
        self._known: dict[Source, tuple[Place, ...]] = {}
        self._replaced: dict[Source, frozenset[Source]] = {}
        self._mistakes = _Last()

    @property
    def places(self) -> tuple[Place, ...]:
        """All that are known. What the file says of an engine itself goes before what a source
        says of it, so that one that was found can be drained."""
        named = dict.fromkeys(self._listing.places)
        current = [source for source in self._known if source not in self._replaced]
        for sources in (current, [*self._replaced]):
            urls = {place.url for place in named}
            for source in sources:
                places = self._known.get(source, ())
                named.update((place, None) for place in places if place.url not in urls)
        return (*named,)

    async def run(self, found: Found) -> None:
        """Report all places whenever they may have changed, until cancelled.

        Args:
            found: called at once, and then again.
        """
        stale, trouble = True, _Last()
        try:
            while True:
                try:
                    if stale:
                        self._follow(found)
                    stale = False
                    await asyncio.sleep(self._interval)
                    stale = await self._reread()
                    trouble.clear()
                except Exception as error:
                    if trouble.is_news(repr(error)):
                        log.exception(
                            "--engines: %s: its engines stay; another try follows", self._file
                        )
                    stale = True
                    await asyncio.sleep(self._interval)
        finally:
            for watch in self._watches.values():
                watch.cancel()

    def _follow(self, found: Found) -> None:
        """Watch the sources that the file names now, and no others. Engines of one that was
        replaced stay until those that stand there instead have said something."""
        wanted = self._listing.sources
        new, gone = wanted - self._watches.keys(), self._watches.keys() - wanted
        self._replaced = {
            source: (self._replaced.get(source, frozenset()) & wanted)
            | {other for other in new if other.role is source.role}
            for source in (gone | self._replaced.keys()) - wanted
        }
        for source in gone:
            self._watches.pop(source).cancel()
        for source in new:

            def came(places: tuple[Place, ...], source: Source = source) -> None:
                if source in self._watches:
                    self._known[source] = places
                    self._report(found)

            self._watches[source] = asyncio.create_task(follow(source, came, self._pause))
        self._report(found)

    def _report(self, found: Found) -> None:
        over = [old for old, new in self._replaced.items() if new <= self._known.keys()]
        for source in over:
            del self._replaced[source]
            self._known.pop(source, None)
        found(self.places)
        if self._known.keys() >= self._listing.sources:
            self.settled.set()

    async def _reread(self) -> bool:
        """Whether the file says something else. One that cannot be used changes nothing."""
        try:
            text = await asyncio.to_thread(_read, self._file)
            if text == self._text:
                self._mistakes.clear()
                return False
            # It may be half written.
            await asyncio.sleep(_SETTLE_SECONDS)
            if text != await asyncio.to_thread(_read, self._file):
                return False
            self._listing = _understand(self._file, text)
        except SettingsError as error:
            if self._mistakes.is_news(str(error)):
                log.warning("%s. The engines stay as they were: mend the file", error)
            return False
        self._text = text
        self._mistakes.clear()
        return True


async def follow(source: Source, found: Found, pause: float) -> None:
    """Watch a source until cancelled, whatever happens. What is wrong is said once, until the
    source has found something or something else is wrong.

    Args:
        source: finds engines.
        found: see :meth:`Source.watch`.
        pause: seconds before it is asked again when it could not be.
    """
    trouble = _Last()

    def came(places: tuple[Place, ...]) -> None:
        found(places)
        trouble.clear()

    while True:
        try:
            await source.watch(came)
        except SourceError as error:
            if trouble.is_news(str(error)):
                log.warning("%s engines: %s. Those that are known stay", source.role.value, error)
        except Exception as error:
            if trouble.is_news(repr(error)):
                log.exception("%s: a watch has failed and begins anew. Its engines stay", source)
        await asyncio.sleep(pause)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise SettingsError((f"--engines: {file}: {error.strerror}",)) from error
    except UnicodeDecodeError as error:
        raise SettingsError((f"--engines: {file}: not text: {error}",)) from error


def _understand(file: Path, text: str) -> Listing:
    try:
        return read_listing(text)
    except SettingsError as error:
        problems = (f"--engines: {file}: {problem}" for problem in error.problems)
        raise SettingsError((*problems,)) from error
