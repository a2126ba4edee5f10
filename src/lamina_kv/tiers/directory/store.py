"""One rank's chunks in a shared directory: one immutable file for each."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Fate, Piece, StoreError, Tenant, Traits
from lamina_kv.tiers.directory.config import DirectoryConfig
from lamina_kv.tiers.directory.fan import Fan
from lamina_kv.tiers.directory.files import read_object
from lamina_kv.tiers.directory.layout import NAMESPACE
from lamina_kv.tiers.directory.present import which_exist
from lamina_kv.tiers.directory.root import NO_ROOM, READ_ONLY, UNREACHABLE, Root, RootLost
from lamina_kv.tiers.names import ABOUT, object_path
from lamina_kv.tiers.once import Once

log = logging.getLogger("lamina_kv.tiers")

TRAITS = Traits(readers=4, batch=4)
"""Several streams, as one seldom fills a network; small batches, as each of them is one after the
other."""

FIND_THREADS = 4
LEAST_FOUND = 64
"""Keys that are worth a thread of their own."""

TOUCH_SECONDS = 600.0
"""How often the use of a chunk is written down at most. A sweeper frees what has not been used for
hours; a prompt of 500 chunks that is used all the time costs one call a second."""

MOST_TOUCHED = 1 << 17
"""Chunks of which it is remembered when they were touched, in about 20 MB."""

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_SOMETHING_ELSE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)

_CURES = {
    Fate.REFUSED: "nothing is written until that changes: see that this user may write there, and "
    "that there is room (`lamina-kv sweep`)",
    Fate.LATE: "the tier is tried again from time to time: see how loaded its server is",
    Fate.DOWN: "the tier is tried again from time to time: see whether its server, and the mount "
    "on this machine, are there",
}


def open_store(config: DirectoryConfig, tenant: Tenant) -> DirectoryStore:
    """Open a rank's part of a shared directory. One that cannot be reached, or that is new and has
    no room, is opened all the same, with a warning, and is used once it can be.

    Args:
        config: the tier.
        tenant: for whom.

    Raises:
        StoreError: if the directory cannot be used: it is another thing's, of another format, or
            not this user's to use.
    """
    if not NAMESPACE.fullmatch(tenant.namespace):
        raise ValueError(f"a namespace's fingerprint is hexadecimal, not {tenant.namespace!r}")
    root = Root(config.path)
    store = DirectoryStore(config, tenant, root)
    problem = "does not answer"
    try:
        ready = store.prepare()
    except StoreError as error:
        store.close()
        raise StoreError(f"{config.key('path')}: {error}") from error
    except OSError as error:
        if error.errno not in (*UNREACHABLE, *NO_ROOM):
            store.close()
            raise StoreError(f"{config.key('path')}: cannot use {config.path}: {error}") from error
        if error.errno in NO_ROOM:
            problem = f"has no room to begin in ({error.strerror})"
        ready = False
    if ready:
        log.info("tier %s: %s, %s", config.name, config.path, store)
    else:
        log.warning(
            "tier %s: %s %s. The engine starts without it, and uses it once that has changed: see "
            "whether its server, and the mount on this machine, are there and have room",
            config.name,
            config.path,
            problem,
        )
    return store


class DirectoryStore:
    """A :class:`~lamina_kv.tiers.contract.Store` in a shared directory.

    A call into a mount whose server is away may hang for as long as that is. ``find`` leaves it to
    threads of its own and returns in time; a read or a write hangs with it.

    Args:
        config: the tier.
        tenant: for whom.
        root: the directory.

    Attributes:
        traits: see the protocol.
        slots: 0.
    """

    def __init__(self, config: DirectoryConfig, tenant: Tenant, root: Root) -> None:
        self.traits = TRAITS
        self.slots = 0
        self._config = config
        self._tenant = tenant
        self._root = root
        self._ready = False
        self._described = ""  # the directory in which the namespace was described
        self._fan = Fan(f"lamina-find-{config.name}", FIND_THREADS)
        self._touched: OrderedDict[ChunkKey, float] = OrderedDict()
        self._once = Once()
        self._is_lost = False

    def __str__(self) -> str:
        publisher = self._root.publisher
        published = "link" if publisher.links else "rename"
        return f"{'direct' if publisher.flags else 'buffered'} I/O, files appear by {published}"

    def prepare(self) -> bool:
        """Make the directory ready for use.

        Returns:
            Whether it answered in time.

        Raises:
            StoreError: see :func:`open_store`.
            OSError: if it cannot be reached.
        """
        return self._fan.run([self._prepare], self._config.timeout) is not None

    def stored(self, *, keys: bool) -> None:
        """See the protocol: others write, too, so that nobody knows."""

    def find(self, keys: Sequence[ChunkKey], timeout: float) -> list[bool] | None:
        """See the protocol."""
        width = max(LEAST_FOUND, -(-len(keys) // FIND_THREADS))
        paths = [self._path(key) for key in keys]
        parts = [paths[start : start + width] for start in range(0, len(keys), width)]
        found = self._look_for(parts, timeout)
        return None if found is None else [each for part in found for each in part]

    def probe(self, timeout: float) -> bool:
        """See the protocol. The description of the namespace is looked for."""
        about = f"{self._tenant.namespace}/{ABOUT}"
        return self._look_for([[about]], timeout) is not None

    def read(self, pieces: Sequence[Piece], timeout: float) -> list[Fate]:
        """See the protocol."""
        return self._each("read", self._read, pieces, timeout)

    def write(self, pieces: Sequence[Piece], timeout: float) -> list[Fate]:
        """See the protocol."""
        return self._each("written", self._write, pieces, timeout)

    def drop(self, slots: Sequence[int]) -> None:
        """See the protocol: there are no slots."""

    def touch(self, uses: Sequence[tuple[ChunkKey, int]]) -> None:
        """See the protocol. Files get the server's time, in the order of ``uses``."""
        due = time.monotonic() + self._config.timeout
        keys = [key for key, _ in uses if self._is_due(key)]
        if not keys:
            return
        try:
            with self._opened() as root:
                for key in keys:
                    if time.monotonic() > due:
                        return
                    self._touch(root, key)
        except OSError as error:
            self._fate("touched", error)

    def close(self) -> None:
        """See the protocol."""
        self._fan.close()

    # -- one chunk ---------------------------------------------------------------------------------

    def _exist(self, paths: Sequence[str]) -> list[bool]:
        with self._opened() as root:
            return which_exist(root, paths)

    def _read(self, root: int, piece: Piece) -> Fate:
        flags = self._root.publisher.flags
        whole = read_object(root, self._path(piece.key), piece.buffer, flags)
        return Fate.DONE if whole else Fate.CORRUPT

    def _write(self, root: int, piece: Piece) -> Fate:
        path = self._path(piece.key)
        if not piece.damaged and _is_there(root, path):
            if self._is_due(piece.key):  # somebody has computed it again
                self._touch(root, piece.key)
        else:
            self._root.prepare_to_write(root)
            if self._described != self._root.id:
                self._describe(root)
            self._root.publisher.publish(root, path, piece.buffer, replace=piece.damaged)
        return Fate.DONE

    def _describe(self, root: int) -> None:
        """Say for people what the namespace is, once something is written there."""
        about, described = f"{self._tenant.namespace}/{ABOUT}", self._root.id
        self._root.publisher.publish_json(root, about, self._tenant.description)
        self._described = described

    def _is_due(self, key: ChunkKey) -> bool:
        """Whether a use of a chunk is to be written down."""
        return time.monotonic() >= self._touched.get(key, -TOUCH_SECONDS) + TOUCH_SECONDS

    def _touch(self, root: int, key: ChunkKey) -> None:
        with suppress(FileNotFoundError):
            os.utime(self._path(key), dir_fd=root, follow_symlinks=False)
        self._touched.pop(key, None)
        self._touched[key] = time.monotonic()
        if len(self._touched) > MOST_TOUCHED:
            self._touched.popitem(last=False)

    # -- inside ------------------------------------------------------------------------------------

    def _look_for(self, parts: Sequence[Sequence[str]], timeout: float) -> list[list[bool]] | None:
        """Which files of each part are there, each part by a thread of its own; None if that could
        not be told in time."""
        jobs = [partial(self._exist, part) for part in parts]
        try:
            return self._fan.run(jobs, min(timeout, self._config.timeout))
        except OSError as error:
            self._fate("found", error)
            return None

    def _path(self, key: ChunkKey) -> str:
        return object_path(self._tenant.namespace, key, self._tenant.shard)

    def _each(
        self,
        verb: str,
        move: Callable[[int, Piece], Fate],
        pieces: Sequence[Piece],
        timeout: float,
    ) -> list[Fate]:
        """Move pieces one after the other, until there is no time left."""
        due = time.monotonic() + min(timeout, self._config.timeout)
        fates: list[Fate] = []
        try:
            with self._opened() as root:
                for piece in pieces:
                    if fates and time.monotonic() > due:
                        break
                    try:
                        fates.append(move(root, piece))
                    except OSError as error:
                        fates.append(self._fate(verb, error))
        except OSError as error:
            return [self._fate(verb, error)] * len(pieces)
        return fates + [Fate.LATE] * (len(pieces) - len(fates))

    def _prepare(self) -> None:
        writable = self._config.keep != "nothing"
        self._root.prepare(writable=writable, direct=self._config.direct)
        self._ready = True

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The directory, for one call."""
        try:
            if not self._ready:
                self._prepare()
            with self._root.opened() as root:
                yield root
        except StoreError as error:  # something else is there now
            raise RootLost(errno.ENOENT, str(error)) from error
        if self._is_lost:
            self._is_lost = False
            log.warning("tier %s: %s is there again", self._config.name, self._root.path)

    def _fate(self, verb: str, error: OSError) -> Fate:
        """What an error means for a chunk. Each kind is said once."""
        if isinstance(error, RootLost):
            self._say_lost(error)
            return Fate.DOWN
        number = error.errno or errno.EIO
        if verb == "read" and number in _NOT_THERE:
            return Fate.GONE
        if verb == "read" and number in _SOMETHING_ELSE:
            return Fate.CORRUPT
        fate = Fate.DOWN
        if number in (*NO_ROOM, *READ_ONLY):
            fate = Fate.REFUSED
        elif number == errno.ETIMEDOUT:
            fate = Fate.LATE
        if self._once.first(verb, number):
            log.warning(
                "tier %s: chunks in %s cannot be %s (%s): each is a miss, and serving goes on; %s. "
                "This is said once",
                self._config.name,
                self._root.path,
                verb,
                os.strerror(number),
                _CURES[fate],
            )
        return fate

    def _say_lost(self, error: RootLost) -> None:
        if not self._is_lost and error.errno != errno.EAGAIN:
            self._is_lost = True
            log.warning(
                "tier %s: %s: nothing is read or written there until it is back, and serving goes "
                "on; see whether the shared file system is mounted",
                self._config.name,
                error.strerror,
            )


def _is_there(root: int, path: str) -> bool:
    try:
        os.stat(path, dir_fd=root, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return False
    return True
