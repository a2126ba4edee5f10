"""The index: which key is in which slot of a slab, with the checksum of every row extent.

Memory holds all of it (:mod:`~lamina.data.tiers.disk_table`); SQLite holds what survives. The
file may be lost or damaged at any time: then the shard is empty, which costs only time.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamina.data.shared_memory import MemoryFile
from lamina.data.tiers.disk_aio import Integers
from lamina.data.tiers.disk_checksum import Bytes, Checksums, key_tags
from lamina.data.tiers.disk_lock import StoreLost
from lamina.data.tiers.disk_store import sync_directories
from lamina.data.tiers.disk_table import ChunkTable
from lamina.keys import KEY_BYTES
from lamina.plan import ChunkKey

log = logging.getLogger("lamina.data")

_BATCH = 1 << 12
_STORED_SUM = np.dtype("<u4")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS shard (layout TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS chunk (
    slot INTEGER PRIMARY KEY, key BLOB NOT NULL, last_used REAL NOT NULL, checksums BLOB NOT NULL
);
"""
_UNFIT = """
SELECT count(*) FROM chunk WHERE slot NOT BETWEEN 0 AND ? OR typeof(last_used) <> 'real'
OR typeof(key) <> 'blob' OR length(key) <> ?
OR typeof(checksums) <> 'blob' OR length(checksums) <> ?
"""


_SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises; the latter when its message quotes a damaged file."""


class DamagedIndex(Exception):
    """An index file that cannot be relied on; the text says why."""


class UnreadableIndex(Exception):
    """An index file that may be sound and cannot be looked into from here; the text says why."""


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """What a slab holds.

    Attributes:
        extent_bytes: per row, bytes of one extent.
        slots: chunks that fit.
    """

    extent_bytes: tuple[int, ...]
    slots: int

    def __str__(self) -> str:
        return (
            f"{self.slots} chunks of {sum(self.extent_bytes)} bytes in "
            f"{len(self.extent_bytes)} rows"
        )

    def encode(self) -> str:
        """As text; equal for equal layouts."""
        return json.dumps({"extent_bytes": self.extent_bytes, "slots": self.slots})

    @classmethod
    def decode(cls, text: str) -> ShardLayout:
        """The layout that ``text`` was made from.

        Raises:
            DamagedIndex: if it was not made from one.
        """
        try:
            found = json.loads(text)
            layout = cls(tuple(map(int, found["extent_bytes"])), int(found["slots"]))
            sound = layout.slots > 0 and layout.extent_bytes and min(layout.extent_bytes) > 0
        except (LookupError, TypeError, ValueError):
            sound = False
        if not sound:
            raise DamagedIndex(f"its layout reads {text!r}")
        return layout


@dataclass(frozen=True, slots=True)
class IndexSummary:
    """An index in a few numbers.

    Attributes:
        layout: of the slab.
        entries: chunks that it names.
        oldest: when the chunk that was not used for longest was used, in seconds since the epoch.
        newest: when a chunk was used last.
    """

    layout: ShardLayout
    entries: int
    oldest: float
    newest: float


def summarize(path: Path) -> IndexSummary:
    """Look at an index without changing it; a server may be using it.

    Raises:
        DamagedIndex: if that cannot be done.
        UnreadableIndex: if that cannot be done here.
    """
    mode = "mode=ro"
    if path.exists() and not os.access(path.parent, os.W_OK):
        # SQLite reads no journal without a file of its own beside it.
        journal = path.with_name(f"{path.name}-wal")
        if journal.exists() and journal.stat().st_size:
            raise UnreadableIndex(
                f"{path.parent} cannot be written to by this user or is mounted read-only, and a "
                "server uses the index, or was killed while it did: look at it where it can be "
                "written to"
            )
        mode = "immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)) as database:
            (layout,) = database.execute("SELECT layout FROM shard").fetchone() or ("",)
            entries, oldest, newest = database.execute(
                "SELECT count(*), ifnull(min(last_used), 0.0), ifnull(max(last_used), 0.0)"
                " FROM chunk"
            ).fetchone()
            return IndexSummary(ShardLayout.decode(str(layout)), entries, oldest, newest)
    except _SQLITE_ERRORS as error:
        raise DamagedIndex(str(error)) from error


class DiskIndex(ChunkTable):
    """One shard's index. Any thread may look things up; changes come from one at a time.

    Args:
        path: the SQLite file. Made if it is not there; emptied, with a warning, if it describes
            another layout.
        layout: of the slab.
        file: where other ranks can look things up, too; they must not before this returns.

    Raises:
        DamagedIndex: if the file is not what was written; :func:`open_index` starts anew then.
        OSError: if the file can be neither opened nor made.
    """

    def __init__(self, path: Path, layout: ShardLayout, file: MemoryFile | None = None) -> None:
        super().__init__(layout.slots, len(layout.extent_bytes), file)
        self._path = path
        self._layout = layout
        self._lock = threading.Lock()
        self._recorded = np.zeros(layout.slots, np.bool_)
        self._stale = np.zeros(layout.slots, np.bool_)
        self._owed: set[int] = set()
        # SQLite gives the file's mode to all that it puts beside it, and cannot be told one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except _SQLITE_ERRORS as error:
            self._database.close()
            raise DamagedIndex(str(error)) from error
        except DamagedIndex:
            self._database.close()
            raise

    # -- changing ----------------------------------------------------------------------------

    def forget(self, slots: Integers) -> None:
        """Durably forget what these slots hold.

        Raises:
            OSError: if that could not be made durable; in memory it is forgotten all the same, and
                the next change that succeeds makes it durable.
        """
        self.hide(slots)
        self._owed.update(slots[self._recorded[slots]].tolist())
        if self._owed:
            with self._transaction():
                pass

    def hide(self, slots: Integers) -> Integers:
        """Forget what these slots hold, but not durably. Returns those that held anything."""
        held = slots[self._held[slots]]
        self._held[slots] = False
        return held

    def record(self, slots: Integers, keys: Bytes, sums: Checksums) -> None:
        """Durably say what slots hold; their bytes must be durable already.

        Args:
            slots: shape ``(n,)``.
            keys: shape ``(n, KEY_BYTES)``.
            sums: CRC-32s, shape ``(n, rows)``.

        Raises:
            OSError: if that failed; the chunks are not there then.
        """
        now = time.time()
        mixed = sums ^ key_tags(keys)[:, None]
        stored = mixed.astype(_STORED_SUM)
        with self._transaction() as database:
            database.executemany(
                "INSERT OR REPLACE INTO chunk VALUES (?, ?, ?, ?)",
                (
                    (slot, key.tobytes(), now, checksums.tobytes())
                    for slot, key, checksums in zip(slots.tolist(), keys, stored, strict=True)
                ),
            )
            self._write_recency(database)
        self._sums[slots] = mixed
        self._keys[slots] = keys
        self._used[slots] = now
        self._recorded[slots] = True
        self._held[slots] = True

    def note_used(self, slots: Integers) -> None:
        """These slots were of use just now. Written with the next record, and at the end."""
        self._used[slots] = time.time()
        self._stale[slots] = True

    def clear(self) -> None:
        """Durably forget everything.

        Raises:
            OSError: if that failed.
        """
        self.forget(np.arange(self._layout.slots))

    def stats(self) -> list[tuple[Path, os.stat_result]]:
        """The files that a change goes to, as they are now; SQLite keeps them open."""
        files = (self._path, self._path.with_name(f"{self._path.name}-wal"))
        return [(file, os.stat(file)) for file in files if file.exists()]

    def delete(self, reason: str) -> StoreLost:
        """Give up the file, so that nothing in it is found after a restart. Needs no room.

        Args:
            reason: why.

        Returns:
            What to say to whoever changes it from now on.

        Raises:
            OSError: if it cannot be deleted; the text says what to do.
        """
        try:
            for suffix in ("", "-wal", "-shm"):  # without its database a WAL is void
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            sync_directories(self._path.parent)
        except OSError as error:
            store = self._path.parent.parent
            raise OSError(
                error.errno,
                f"what was to be forgotten may be found again after a restart ({reason}; {error}): "
                f"stop the server, and empty the store with `lamina clear {store}`",
            ) from error
        return StoreLost(
            errno.ENOSPC,
            f"what was to be forgotten could not be ({reason}), so that {self._path} was deleted: "
            "nothing more is written to the disk tier, and it starts empty after a restart. Free "
            "some space and start the server again",
        )

    def close(self) -> None:
        """Write what is only in memory and close the file. Idempotent."""
        try:
            if self._owed or self._stale.any():
                with self._transaction() as database:
                    self._write_recency(database)
        except OSError as error:
            log.warning("disk tier: when its chunks were last used is lost: %s", error)
        finally:
            with suppress(sqlite3.Error):
                self._database.close()

    # -- inside ------------------------------------------------------------------------------

    def _open(self) -> None:
        database = self._database
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.executescript(_SCHEMA)
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise DamagedIndex(" ".join(str(verdict).split()))
        # A damaged header can say that SQLite must only read it.
        database.executescript("BEGIN IMMEDIATE; PRAGMA user_version = 1; ROLLBACK")
        found = [ShardLayout.decode(text) for (text,) in database.execute("SELECT * FROM shard")]
        if found == [self._layout]:
            self._load()
            return
        if found:
            log.warning(
                "disk tier: %s was laid out for %s and is needed for %s, which moves every "
                "extent; this rank's part of the store starts empty",
                self._path.with_suffix(".slab"),
                found[0],
                self._layout,
            )
        database.executescript("BEGIN IMMEDIATE; DELETE FROM chunk; DELETE FROM shard;")
        database.execute("INSERT INTO shard VALUES (?)", (self._layout.encode(),))
        database.execute("COMMIT")

    def _load(self) -> None:
        slots, rows = self._sums.shape
        (unfit,) = self._database.execute(
            _UNFIT, (slots - 1, KEY_BYTES, rows * _STORED_SUM.itemsize)
        ).fetchone()
        if unfit:
            raise DamagedIndex(f"{unfit} entries make no sense")
        cursor = self._database.execute("SELECT slot, key, last_used, checksums FROM chunk")
        while batch := cursor.fetchmany(_BATCH):
            numbers, keys, used, sums = zip(*batch, strict=True)
            where = np.array(numbers, np.int64)
            self._keys[where] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
            self._sums[where] = np.frombuffer(b"".join(sums), _STORED_SUM).reshape(-1, rows)
            self._used[where] = used
            self._recorded[where] = True
        self._used[:] = np.clip(np.nan_to_num(self._used), 0, time.time())
        self._held[self._newest_of_each_key()] = True

    def _newest_of_each_key(self) -> Integers:
        """Slots without those whose key is in a slot that was used later: control may give a
        chunk a second slot before the first is needed for something else.
        """
        slots = np.flatnonzero(self._recorded)
        slots = slots[np.argsort(self._used[slots], kind="stable")]
        keys = self._keys[slots].view(f"V{KEY_BYTES}").ravel()
        latest = dict(zip(keys.tolist(), slots.tolist(), strict=True))
        return np.fromiter(latest.values(), np.int64, len(latest))

    def _write_recency(self, database: sqlite3.Connection) -> None:
        stale = np.flatnonzero(self._stale)
        self._stale[stale] = False
        database.executemany(
            "UPDATE chunk SET last_used = ? WHERE slot = ?",
            zip(self._used[stale].tolist(), stale.tolist(), strict=True),
        )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Change the database; slots that it has yet to forget are forgotten first."""
        owed = sorted(self._owed)
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany(
                    "DELETE FROM chunk WHERE slot = ?", ((slot,) for slot in owed)
                )
                yield self._database
                self._database.execute("COMMIT")
                self._recorded[owed] = False
                self._owed.clear()
            except BaseException as error:
                with suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                if not isinstance(error, _SQLITE_ERRORS):
                    raise
                full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
                raise OSError(
                    errno.ENOSPC if full else errno.EIO,
                    f"index of the disk tier: {error}",
                    str(self._path),
                ) from error


def open_index(path: Path, layout: ShardLayout, file: MemoryFile | None = None) -> DiskIndex:
    """Open an index; if it is damaged, put it aside with a warning and start an empty one.

    Raises:
        OSError: if the file can be neither opened nor made.
    """
    try:
        return DiskIndex(path, layout, file)
    except DamagedIndex as error:
        aside = path.with_name(f"{path.name}.damaged")
        log.warning(
            "disk tier: the index %s is damaged (%s); it is now %s, and this rank's part of the "
            "store starts empty",
            path,
            error,
            aside.name,
        )
    path.replace(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    try:
        return DiskIndex(path, layout, file)
    except DamagedIndex as error:
        raise OSError(errno.EIO, f"cannot make an index: {error}", str(path)) from error


def key_array(keys: Sequence[ChunkKey]) -> Bytes:
    """Keys as an array of shape ``(n, KEY_BYTES)``.

    Raises:
        ValueError: if one is not a key.
    """
    if not set(map(len, keys)) <= {KEY_BYTES}:
        raise ValueError(f"a chunk key is {KEY_BYTES} bytes")
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
