"""Where a chunk is on the server, and how it is read, written and found there.

A chunk is one value, its whole object, under ``prefix namespace:key.shard``.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from glide_shared.commands.batch import BaseBatch
from glide_shared.exceptions import RequestError
from glide_sync import (
    Batch,
    BatchOptions,
    ClusterBatch,
    ClusterBatchOptions,
    ConditionalChange,
    ExpirySet,
    ExpiryType,
    GlideClusterClient,
    InfoSection,
)

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Fate, Piece, Tenant, Traits
from lamina_kv.tiers.names import ABOUT, object_name
from lamina_kv.tiers.once import Once
from lamina_kv.tiers.valkey.config import ValkeyConfig
from lamina_kv.tiers.valkey.connection import FULL, Client, Connection, Failure, left
from lamina_kv.tiers.valkey.reading import open_reading
from lamina_kv.values import MIB

log = logging.getLogger("lamina_kv.tiers")

READERS = 2
"""While one verifies, or copies in glide, bytes come for the other. Four were no faster."""

BATCH_BYTES = 8 * MIB
"""Bytes of one call. glide holds an answer whole before it copies it, in memory that it gets anew
each time: 4 to 16 MiB were read at twice the rate of 32 MiB (values of 1 MiB)."""

MOST_PIECES = 32

MOST_TOUCHED = 4096
"""Uses that one call tells the server."""


class Names:
    """What chunks are called on the server.

    Args:
        prefix: how all names begin.
        tenant: whose chunks.

    Attributes:
        about: the name of the namespace's description.
    """

    def __init__(self, prefix: str, tenant: Tenant) -> None:
        self._head = f"{prefix}{tenant.namespace}:".encode()
        self._shard = tenant.shard
        self.about = self._head + ABOUT.encode()

    def of(self, key: ChunkKey) -> bytes:
        """The name of a chunk's part."""
        return self._head + object_name(key, self._shard).encode()


class ValkeyStore:
    """A :class:`~lamina_kv.tiers.contract.Store` on a server; see the module.

    Reads have connections of their own, so that neither questions nor writes wait behind large
    answers. A write or touch that has to connect first may take twice its timeout.

    Args:
        config: the tier.
        tenant: for whom.

    Attributes:
        traits: see the protocol.
        slots: see there; 0.
    """

    def __init__(self, config: ValkeyConfig, tenant: Tenant) -> None:
        batch = max(1, min(MOST_PIECES, BATCH_BYTES // tenant.object_bytes))
        self.traits = Traits(readers=READERS, batch=batch)
        self.slots = 0
        self._config = config
        self._names = Names(config.prefix, tenant)
        self._about = json.dumps(
            {**tenant.description, "object_bytes": str(tenant.object_bytes)}, sort_keys=True
        )
        self._expiry = None if config.ttl is None else ExpirySet(ExpiryType.SEC, config.ttl)
        self._reading = open_reading(config)
        # The server may have been emptied since the last connection: it is told again who is here.
        self._asking = Connection(config, self._describe)
        self._once = Once()

    def check(self) -> None:
        """Read and ask for something, and warn of what will make the server a bad cache.

        Raises:
            Failure: if it cannot be used.
        """
        # Read first: a socket is told why it is not let in where glide tries until its timeout.
        self._reading.probe(self._names.about, self._config.timeout)
        with self._asking.client(self._config.timeout) as client:
            client.exists([self._names.about])
            for concern in _concerns(client):
                log.warning("tier %s: %s %s", self._config.name, self._config.url, concern)

    def stored(self, *, keys: bool) -> None:
        """See the protocol: chunks are found by key."""

    def find(self, keys: Sequence[ChunkKey], timeout: float) -> list[bool] | None:
        """See the protocol. Two round trips at most: how many of some neighbours are there, and
        one by one where some are and others are not. What is there of a prompt is its beginning,
        so that few neighbours differ."""
        names = [self._names.of(key) for key in keys]
        size = 1 if self._config.cluster else math.isqrt(len(names)) + 1
        groups = [names[i : i + size] for i in range(0, len(names), size)]
        timeout = self._timeout(timeout)
        due = time.monotonic() + timeout
        try:
            with self._asking.client(timeout) as client:
                counts = _exist(client, groups, left(due))
                mixed = [
                    name
                    for group, count in zip(groups, counts, strict=True)
                    if 0 < count < len(group)
                    for name in group
                ]
                singly = iter(_exist(client, [[name] for name in mixed], left(due)))
        except Failure as failure:
            self._warn("be asked for", failure)
            return None
        found: list[bool] = []
        for group, count in zip(groups, counts, strict=True):
            uniform = count in (0, len(group))
            found += [bool(count if uniform else next(singly)) for _ in group]
        return found

    def probe(self, timeout: float) -> bool:
        """See the protocol. A connection to ask and one to read are made if they are broken."""
        timeout = self._timeout(timeout)
        due = time.monotonic() + timeout
        try:
            with self._asking.client(timeout) as client:
                _exist(client, [[self._names.about]], left(due))
            self._reading.probe(self._names.about, left(due))
        except Failure as failure:
            self._warn("be asked for", failure)
            return False
        return True

    def read(self, pieces: Sequence[Piece], timeout: float) -> list[Fate]:
        """See the protocol."""
        if not pieces:
            return []
        names = [self._names.of(piece.key) for piece in pieces]
        buffers = [piece.buffer.data for piece in pieces]
        try:
            return self._reading.read(names, buffers, self._timeout(timeout))
        except Failure as failure:
            self._warn("be read", failure)
            return [failure.fate] * len(pieces)

    def write(self, pieces: Sequence[Piece], timeout: float) -> list[Fate]:
        """See the protocol. One request a chunk, as a batch of them is copied once more. After one
        that was not answered the others are not tried."""
        timeout = self._timeout(timeout)
        due = time.monotonic() + timeout
        fates: list[Fate] = []
        for piece in pieces:
            try:
                with self._asking.client(timeout) as client:
                    self._put(client, piece)
                fates.append(Fate.DONE)
            except Failure as failure:
                self._warn("be written", failure)
                fates.append(failure.fate)
                if failure.fate is not Fate.REFUSED:
                    break
            if time.monotonic() > due:
                break
        last = fates[-1] if fates and fates[-1] is not Fate.DONE else Fate.LATE
        return fates + [last] * (len(pieces) - len(fates))

    def drop(self, slots: Sequence[int]) -> None:
        """See the protocol: there are no slots."""

    def touch(self, uses: Sequence[tuple[ChunkKey, int]]) -> None:
        """See the protocol. The last uses of very many are told."""
        names = [self._names.of(key) for key, _ in uses[-MOST_TOUCHED:]]
        if not names:
            return
        names.append(self._names.about)
        timeout, ttl = self._config.timeout, self._config.ttl

        def prolong(batch: BaseBatch) -> None:
            for name in names:
                batch.expire(name, ttl or 0)

        try:
            with self._asking.client(timeout) as client:
                if ttl is None:
                    client.touch([*names])
                else:
                    pipeline(client, prolong, timeout)
        except Failure as failure:
            self._warn("be touched", failure)

    def close(self) -> None:
        """See the protocol."""
        self._reading.close()
        self._asking.close()

    # -- inside ------------------------------------------------------------------------------------

    def _timeout(self, timeout: float) -> float:
        return min(timeout, self._config.timeout)

    def _put(self, client: Client, piece: Piece) -> None:
        """Set a value that is not there, or is damaged."""
        absent = None if piece.damaged else ConditionalChange.ONLY_IF_DOES_NOT_EXIST
        name, value = self._names.of(piece.key), piece.buffer.data
        client.set(name, value, conditional_set=absent, expiry=self._expiry)

    def _describe(self, client: Client, timeout: float) -> None:
        def add(batch: BaseBatch) -> None:
            batch.set(
                self._names.about,
                self._about,
                conditional_set=ConditionalChange.ONLY_IF_DOES_NOT_EXIST,
                expiry=self._expiry,
            )

        try:
            pipeline(client, add, timeout)
        except RequestError as error:
            if FULL not in str(error):  # a server that is full can still be read
                raise

    def _warn(self, verb: str, failure: Failure) -> None:
        """Say each kind of failure once."""
        if self._once.first(verb, failure.words.split(":", 1)[0]):
            log.warning(
                "tier %s: chunks on %s cannot %s (%s, %s): each is a miss, and serving goes on. "
                "%s. This is said once; look at the server if the tier's failures go up",
                self._config.name,
                self._config.url,
                verb,
                failure.fate.value,
                failure.words,
                failure.advice,
            )


def _exist(client: Client, groups: Sequence[Sequence[bytes]], timeout: float) -> list[int]:
    """How many of each group are there."""

    def add(batch: BaseBatch) -> None:
        for group in groups:
            batch.exists([*group])

    return pipeline(client, add, timeout) if groups else []


def pipeline(
    client: Client, add: Callable[[BaseBatch], None], timeout: float, *, strict: bool = True
) -> list[Any]:
    """The answers to commands that are sent together.

    Args:
        client: the server.
        add: adds the commands to what is sent.
        timeout: seconds for all of them.
        strict: whether the first error among them is raised; else it is in its command's place.
    """
    milliseconds = max(1, round(timeout * 1e3))
    if isinstance(client, GlideClusterClient):
        for_nodes = ClusterBatch(is_atomic=False)
        add(for_nodes)
        return client.exec(for_nodes, strict, ClusterBatchOptions(timeout=milliseconds)) or []
    batch = Batch(is_atomic=False)
    add(batch)
    return client.exec(batch, strict, BatchOptions(timeout=milliseconds)) or []


def _concerns(client: Client) -> Iterator[str]:
    """What of the server's settings makes it a bad cache."""
    said = client.info([InfoSection.MEMORY])
    for node in said.values() if isinstance(said, dict) else [said]:
        lines = (line.partition(":") for line in node.decode().splitlines())
        values = {name: value for name, _, value in lines}
        if values.get("maxmemory") == "0":
            yield (
                "has no `maxmemory`: it takes memory until the machine has no more. Set it, and "
                "`maxmemory-policy allkeys-lru`"
            )
        elif values.get("maxmemory_policy") == "noeviction":
            yield (
                "has `maxmemory-policy noeviction`: when it is full, nothing more is stored. Set "
                "`allkeys-lru`"
            )
        else:
            continue
        return
