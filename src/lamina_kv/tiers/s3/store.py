"""One rank's chunks in a bucket, an object each, by ``obstore``.

::

    {namespace}/{hh}/{key}.{shard}   a chunk of one rank; hh: the first two digits of the key
    {namespace}/about.json           what the namespace stands for, for people

All of it stands behind the prefix of the tier's URL. A lifecycle rule can expire a namespace, as it
is a prefix. The key comes right after it, so that a store which spreads its load by prefixes can.

The library's calls are awaited on one event loop in a thread of the store's own. All requests of a
call run at once up to a bound, and end when its time is over: what is still under way is
cancelled. The library reads into memory of its own and the loop copies whole objects, so that
nothing comes into a buffer later.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Fate, Piece, StoreError, Tenant, Traits
from lamina_kv.tiers.names import ABOUT, object_path
from lamina_kv.tiers.once import Once
from lamina_kv.tiers.s3.client import (
    AlreadyExistsError,
    BaseError,
    PreconditionError,
    connect,
    obstore,
)
from lamina_kv.tiers.s3.config import S3Config
from lamina_kv.tiers.s3.errors import fate_of, lacks_bucket, lacks_conditions, say
from lamina_kv.values import MIB

log = logging.getLogger("lamina_kv.tiers")

T = TypeVar("T")

READERS = 8
"""Calls that read at once. A call ends with its slowest object, so that many small calls deliver
sooner than a few large ones; and a question need not wait for all of them."""

CALL_BYTES = 32 * MIB
"""Bytes of one call: with a timeout of 2 s, what a store of 16 MB/s can do. All calls together have
as much as the default of ``max_inflight``."""

MOST_PIECES = 16
"""Objects of one call, where they are small."""

MOST_AT_ONCE = 64
"""Requests of one call that are under way at once."""

LEAST_BYTES = 4 * MIB
"""Objects below this are said to be small. Stores count requests, and take 10 to 200 ms to begin
with an answer."""

PAGE = 1000
"""Names that a store lists in one request."""

LISTED_FOR_ONE = 16
"""A listing is read instead of asking for each name if it has up to so many names for one that is
asked for: then it takes no more round trips (pages of :data:`PAGE` against rounds of
:data:`MOST_AT_ONCE`) and costs less (a page is priced as a dozen questions)."""

LISTING_PAUSE = 300.0
"""Seconds without a listing after one that failed or took too long. Each try may take half of a
question's time from the requests that ask for single names."""

_PERMISSIONS = "s3:ListBucket on the bucket, s3:GetObject and s3:PutObject on its objects"


def open_store(config: S3Config, tenant: Tenant) -> ObjectStore:
    """Open a rank's part of a bucket.

    A store that does not answer is opened all the same, with a warning.

    Args:
        config: the tier.
        tenant: for whom.

    Raises:
        StoreError: if an option is wrong, or the store has no such bucket or refuses this user.
    """
    try:
        client = connect(config.url, config.options, config.timeout)
    except (BaseError, ValueError, TypeError) as error:
        raise StoreError(f"{config.key('options')}: {say(error)}") from None
    _warn_if_small(config, tenant)
    store = ObjectStore(config, tenant, client)
    try:
        store.introduce()
    except BaseException:
        store.close()
        raise
    return store


class ObjectStore:
    """A :class:`~lamina_kv.tiers.contract.Store` in a bucket; see the module.

    Args:
        config: the tier.
        tenant: for whom.
        client: obstore's store, whose names begin behind the prefix of the tier's URL.

    Attributes:
        traits: see the protocol.
        slots: 0.
    """

    def __init__(self, config: S3Config, tenant: Tenant, client: Any) -> None:
        pieces = min(MOST_PIECES, max(1, CALL_BYTES // tenant.object_bytes))
        self.traits = Traits(readers=READERS, batch=pieces)
        self.slots = 0
        self._config = config
        self._tenant = tenant
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"loop-{config.name}", daemon=True
        )
        self._thread.start()
        self._introduced = config.keep == "nothing"
        self._has_conditions = True
        self._names_seen = 0  # of the namespace, when a listing was last read or broken off
        self._listing_failed = -math.inf  # when, on the loop's clock
        self._once = Once()

    def introduce(self) -> None:
        """Look whether the bucket can be read, and describe the namespace in it.

        Only the listing decides whether the bucket can be used. A store that takes no objects,
        because it is full or this user may only read, still serves reads: that is a warning.

        Raises:
            StoreError: if this is another's bucket, or none.
        """
        timeout = self._config.timeout
        try:
            self._run(self._introduce(timeout))
        except TimeoutError:
            self._say_unreachable(f"no answer in {timeout:g} s")
        except (BaseError, OSError) as error:
            if fate_of(error) is Fate.DOWN:
                self._say_unreachable(say(error))
                return
            what = "has no such bucket" if lacks_bucket(error) else "does not let this engine in"
            raise StoreError(
                f"{self._config.key('url')}: the store of {self._config.url} {what} "
                f"({say(error)}). Check bucket, region and endpoint (`options`), credentials, and "
                f"permissions: {_PERMISSIONS}"
            ) from None

    def stored(self, *, keys: bool) -> None:
        """See the protocol: chunks are found by key."""

    def find(self, keys: Sequence[ChunkKey], timeout: float) -> list[bool] | None:
        """See the protocol. What was not answered in time counts as absent, unless nothing was."""
        names = [self.name(key) for key in keys]
        return self._run(self._find(names, self._limit(timeout))) if names else []

    def probe(self, timeout: float) -> bool:
        """See the protocol. The description of the namespace is asked for, which may be missing."""
        names = [f"{self._tenant.namespace}/{ABOUT}"]
        (fate,) = self._settle("find", self._run(_each(names, self._head, self._limit(timeout))))
        return fate in (Fate.DONE, Fate.GONE)

    def read(self, pieces: Sequence[Piece], timeout: float) -> list[Fate]:
        """See the protocol."""
        return self._settle("read", self._run(_each(pieces, self._get, self._limit(timeout))))

    def write(self, pieces: Sequence[Piece], timeout: float) -> list[Fate]:
        """See the protocol."""
        limit = self._limit(timeout)
        fates = self._settle("write", self._run(_each(pieces, self._put, limit)))
        if not self._introduced and Fate.DONE in fates:
            self._run(self._describe(limit))
        return fates

    def drop(self, slots: Sequence[int]) -> None:
        """See the protocol: there are no slots."""

    def touch(self, uses: Sequence[tuple[ChunkKey, int]]) -> None:
        """Nothing: lifecycle rules go by the age of an object, and to renew it is to copy it."""

    def close(self) -> None:
        """See the protocol."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def name(self, key: ChunkKey) -> str:
        """What the object of a chunk is called, behind the tier's prefix."""
        return object_path(self._tenant.namespace, key, self._tenant.shard)

    # -- on the loop -------------------------------------------------------------------------------

    async def _introduce(self, timeout: float) -> None:
        due = self._loop.time() + timeout
        async with asyncio.timeout_at(due):
            async for _ in obstore.list(self._client, self._tenant.namespace, chunk_size=PAGE):
                break
        if not self._introduced:
            await self._describe(due - self._loop.time())

    async def _describe(self, timeout: float) -> None:
        """Write what the namespace stands for; a later write tries again if that fails."""
        fates = self._settle("write", await _each([None], self._put_about, timeout))
        self._introduced = fates == [Fate.DONE]

    async def _put_about(self, _: None) -> Fate:
        about = json.dumps(dict(self._tenant.description), indent=1).encode()
        try:
            await self._create(f"{self._tenant.namespace}/{ABOUT}", about)
        except (BaseError, OSError) as error:
            return self._fate("write", error)
        return Fate.DONE

    async def _find(self, names: Sequence[str], timeout: float) -> list[bool] | None:
        due = self._loop.time() + timeout
        if (listed := await self._list(len(names), timeout)) is not None:
            return [name in listed for name in names]
        fates = self._settle("find", await _each(names, self._head, due - self._loop.time()))
        if {Fate.DONE, Fate.GONE}.isdisjoint(fates) or {Fate.DOWN, Fate.REFUSED} & set(fates):
            return None
        return [fate is Fate.DONE for fate in fates]

    async def _list(self, asked: int, timeout: float) -> set[str] | None:
        """All names of the namespace, if that is cheaper than to ask for so many, and works."""
        most = LISTED_FOR_ONE * asked
        if asked <= MOST_AT_ONCE or self._names_seen > most:
            return None
        if self._loop.time() < self._listing_failed + LISTING_PAUSE:
            return None
        names: set[str] = set()
        try:
            async with asyncio.timeout(timeout / 2):
                async for page in obstore.list(
                    self._client, self._tenant.namespace, chunk_size=PAGE
                ):
                    names.update(meta["path"] for meta in page)
                    if len(names) > most:
                        break
        except (BaseError, OSError):  # a TimeoutError is one; the questions will find out
            self._listing_failed = self._loop.time()
            return None
        self._names_seen = len(names)
        return names if len(names) <= most else None

    async def _head(self, name: str) -> Fate:
        try:
            await obstore.head_async(self._client, name)
        except (BaseError, OSError) as error:
            return self._fate("find", error)
        return Fate.DONE

    async def _get(self, piece: Piece) -> Fate:
        try:
            found = await obstore.get_async(self._client, self.name(piece.key))
            if found.meta["size"] != len(piece.buffer):
                return Fate.CORRUPT
            content = await found.bytes_async()
        except (BaseError, OSError) as error:
            return self._fate("read", error)
        if len(content) != len(piece.buffer):
            return Fate.CORRUPT
        piece.buffer[:] = np.frombuffer(memoryview(content), np.uint8)
        return Fate.DONE

    async def _put(self, piece: Piece) -> Fate:
        # A copy, because the library may go on sending for a moment when a call is out of time.
        content = piece.buffer.copy().data
        try:
            if piece.damaged:
                await self._overwrite(self.name(piece.key), content)
            else:
                await self._create(self.name(piece.key), content)
        except (BaseError, OSError) as error:
            return self._fate("write", error)
        return Fate.DONE

    async def _create(self, name: str, content: bytes | memoryview) -> None:
        """Put an object if it is not there."""
        if self._has_conditions:
            try:
                await obstore.put_async(self._client, name, content, mode="create")
            except (AlreadyExistsError, PreconditionError):
                return
            except (BaseError, NotImplementedError) as error:
                if not lacks_conditions(error):
                    raise
                why = say(error)
            else:
                return
        await self._overwrite(name, content)
        if self._has_conditions:
            self._has_conditions = False
            log.info(
                "tier %s: the store of %s does not know puts with a condition (%s). An object may "
                "be written twice, with the same bytes",
                self._config.name,
                self._config.url,
                why,
            )

    async def _overwrite(self, name: str, content: bytes | memoryview) -> None:
        await obstore.put_async(self._client, name, content, use_multipart=False)

    # -- inside ------------------------------------------------------------------------------------

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def _limit(self, timeout: float) -> float:
        return min(timeout, self._config.timeout)

    def _fate(self, verb: str, error: Exception) -> Fate:
        fate = fate_of(error)
        if fate is Fate.GONE and verb == "write":
            fate = Fate.REFUSED  # a bucket that is not there
        if fate is not Fate.GONE:
            self._warn(verb, fate, say(error))
        return fate

    def _settle(self, verb: str, fates: list[Fate]) -> list[Fate]:
        if Fate.LATE in fates:
            self._warn(verb, Fate.LATE, f"no answer in {self._config.timeout:g} s")
        return fates

    def _say_unreachable(self, why: str) -> None:
        log.warning(
            "tier %s: %s cannot be reached (%s): serving goes on without it, and it is used as "
            "soon as it answers. Check `url`, the network, and where credentials come from",
            self._config.name,
            self._config.url,
            why,
        )

    def _warn(self, verb: str, fate: Fate, why: str) -> None:
        """Say each kind of error once."""
        if not self._once.first(verb, fate):
            return
        advice = {
            Fate.LATE: "Check the network and the load of the store, or give the tier a longer "
            "`timeout`",
            Fate.REFUSED: f"Check credentials, quota, and permissions: {_PERMISSIONS}",
        }.get(fate, "Check the store and the network")
        log.warning(
            "tier %s: objects in %s cannot be %s (%s): what was asked for is computed or stays in "
            "host memory, and serving goes on. %s. Said once; the tier's failures count them",
            self._config.name,
            self._config.url,
            {"find": "found", "read": "read", "write": "written"}[verb],
            why,
            advice,
        )


async def _each(
    items: Sequence[T], call: Callable[[T], Awaitable[Fate]], timeout: float
) -> list[Fate]:
    """Call for each item, :data:`MOST_AT_ONCE` at a time; what is not done in time is late, and has
    ended all the same when this returns."""
    fates = [Fate.LATE] * len(items)
    todo = iter(range(len(items)))

    async def work() -> None:
        for index in todo:
            fates[index] = await call(items[index])

    workers = [asyncio.ensure_future(work()) for _ in range(min(MOST_AT_ONCE, len(items)))]
    if workers:
        done, late = await asyncio.wait(workers, timeout=max(0.0, timeout))
        for worker in late:
            worker.cancel()
        if late:
            await asyncio.wait(late)
        for worker in done:
            worker.result()  # raises what it has raised
    return fates


def _warn_if_small(config: S3Config, tenant: Tenant) -> None:
    tokens = tenant.description.get("chunk_tokens", "")
    if tenant.object_bytes >= LEAST_BYTES or not tokens.isdigit():
        return
    advice = f"chunk_tokens: {int(tokens) * -(-LEAST_BYTES // tenant.object_bytes)}"
    log.warning(
        "tier %s: objects have %.2f MiB, and below 4 MiB most of the time and money goes into "
        "requests: use %s",
        config.name,
        tenant.object_bytes / MIB,
        advice,
    )
