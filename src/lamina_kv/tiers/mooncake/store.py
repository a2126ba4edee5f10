"""One rank's part of a cache in Mooncake Store.

Objects are read into memory of the store's own and copied from there. Mooncake writes into a
buffer for as long as a transfer lasts, and a transfer may outlast its call: 100 MB of a donor that
was stopped arrived after the call had failed, when the donor went on. What arrives late in this
memory spoils at most a read that uses it then, whose checksum tells. In a near slot it would spoil
another chunk. And no byte of the near tier has to be registered with a network card. Over TCP on
one machine the copy costs a seventh of the speed.

Objects are read and written whole, so that put and get sessions, which are for parts of objects,
have no use here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.contract import Fate, Piece, StoreError, Tenant, Traits
from lamina_kv.tiers.mooncake.client import Client, Library, Unreachable
from lamina_kv.tiers.mooncake.codes import NORMAL, Code, explain, read_fate, write_fate
from lamina_kv.tiers.mooncake.config import BATCH, MooncakeConfig
from lamina_kv.tiers.names import ABOUT, object_name
from lamina_kv.tiers.once import Once
from lamina_kv.values import MIB

log = logging.getLogger("lamina_kv.tiers")

READERS = 2
"""While one thread copies and verifies, the other one's bytes are on their way, and a donor that is
stopped keeps only one of them. Four are no faster over TCP."""

AREA = 16 * MIB
"""Bytes of one call that are enough: larger calls are no faster over TCP."""

UNDELIVERED = 3
"""Calls in a row that bring nothing because donors cannot be reached. After them it is not the
donors, as far as this machine can tell, and the tier is down."""


def open_store(config: MooncakeConfig, tenant: Tenant) -> MooncakeStore:
    """Join the cluster. A master that does not answer is said in a warning and looked for later.

    Args:
        config: the tier. Its ``timeout`` is that of every call: none has one of its own.
        tenant: for whom.

    Raises:
        StoreError: if the library is missing, or cannot be set up as it is configured.
    """
    store = MooncakeStore(config, tenant, Library(config))
    store.join()
    return store


class MooncakeStore:
    """A :class:`~lamina_kv.tiers.contract.Store` in Mooncake Store; see the module.

    Args:
        config: the tier.
        tenant: for whom.
        library: connects.

    Attributes:
        traits: see the protocol.
        slots: 0; see there.
    """

    def __init__(self, config: MooncakeConfig, tenant: Tenant, library: Library) -> None:
        size = tenant.object_bytes
        self.traits = Traits(readers=READERS, batch=max(1, min(BATCH, AREA // size)))
        self.slots = 0
        self._config = config
        self._library = library
        self._size = size
        self._head, self._shard = f"{config.prefix}{tenant.namespace}:", tenant.shard
        self._client: Client | None = None
        self._joining = threading.Lock()
        # One area for each thread that calls: the readers and the writer.
        self._memory = np.empty((READERS + 1, self.traits.batch, size), np.uint8)
        self._areas: SimpleQueue[npt.NDArray[np.uint8]] = SimpleQueue()
        for area in self._memory:
            self._areas.put(area)
        self._undelivered = 0
        self._once = Once()

    def join(self) -> None:
        """Become a member of the cluster, if the master answers.

        Raises:
            StoreError: if it does, and Mooncake cannot be set up.
        """
        try:
            client = self._library.connect()
        except Unreachable as error:
            self._warn(
                "reached",
                Code.RPC_FAIL,
                f"{error}. Each chunk is a miss until it does; start the master, or set "
                f"{self._config.key('master')}",
            )
            return
        if code := client.register_buffer(self._memory.ctypes.data, self._memory.nbytes):
            client.close()
            raise StoreError(
                f"{self._config.key('protocol')}: {self._memory.nbytes} bytes of memory cannot be "
                f"registered with the network ({code}): is there a limit to locked memory "
                "(ulimit -l)?"
            )
        self._client = client
        log.info(
            "tier %s: joined Mooncake Store at %s over %s, with %d bytes of memory for the store "
            "and %d bytes of buffers",
            self._config.name,
            self._config.master,
            self._config.protocol,
            self._config.segment or 0,
            self._memory.nbytes,
        )

    def stored(self, *, keys: bool) -> None:
        """See the protocol: the master knows."""

    def find(self, keys: Sequence[ChunkKey], timeout: float) -> list[bool] | None:
        """See the protocol. A chunk whose donor is gone counts as there until the master has
        noticed, 10 s by default. What is found is not evicted for as long."""
        client = self._joined()
        if client is None:
            return None
        codes = client.batch_is_exist([self._name(key) for key in keys]) if keys else []
        if failed := [code for code in codes if code < 0]:
            self._warn("looked up", failed[0])
            return None
        return [code == 1 for code in codes]

    def probe(self, timeout: float) -> bool:
        """See the protocol. The master is asked for an object that nobody has; whether donors
        deliver shows when a chunk is read."""
        client = self._joined()
        return client is not None and client.batch_is_exist([f"{self._head}{ABOUT}"])[0] >= 0

    def read(self, pieces: Sequence[Piece], timeout: float) -> list[Fate]:
        """See the protocol."""
        client = self._joined()
        if client is None or not pieces:
            return [Fate.DOWN] * len(pieces)
        with self._area() as area:
            codes = client.batch_get_into(*self._requests(pieces, area))
            fates = [read_fate(code, self._size) for code in codes]
            for piece, fate, copy in zip(pieces, fates, area, strict=False):
                if fate is Fate.DONE:
                    piece.buffer[:] = copy
        self._warn_of("read", codes)
        if Fate.DONE in fates:
            self._undelivered = 0
        elif Code.TRANSFER_FAIL in codes:
            self._undelivered += 1
        if self._undelivered < UNDELIVERED:
            return fates
        return [
            Fate.DOWN if code == Code.TRANSFER_FAIL else fate
            for code, fate in zip(codes, fates, strict=True)
        ]

    def write(self, pieces: Sequence[Piece], timeout: float) -> list[Fate]:
        """See the protocol."""
        client = self._joined()
        if client is None or not pieces:
            return [Fate.DOWN] * len(pieces)
        with self._area() as area:
            for piece, copy in zip(pieces, area, strict=False):
                copy[:] = piece.buffer
            requests = self._requests(pieces, area)
            codes = client.batch_put_from(*requests, self._library.replication)
        self._warn_of("written", codes)
        return [write_fate(code) for code in codes]

    def drop(self, slots: Sequence[int]) -> None:
        """See the protocol: there are no slots."""

    def touch(self, uses: Sequence[tuple[ChunkKey, int]]) -> None:
        """See the protocol. The master takes a question for a use."""
        self.find([key for key, _ in uses], self._config.timeout)

    def close(self) -> None:
        """See the protocol. What this rank donated is lost. Holds the GIL for some two seconds."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    # -- inside ------------------------------------------------------------------------------------

    def _joined(self) -> Client | None:
        """The client. If the master did not answer at the start it is looked for again, by one
        thread; the circuit breaker sees to it that this is seldom."""
        if self._client is None and self._joining.acquire(blocking=False):
            try:
                self.join()
            except StoreError as error:
                self._warn("reached", Code.INVALID_PARAMS, str(error))
            finally:
                self._joining.release()
        return self._client

    @contextmanager
    def _area(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Memory for one call; shape ``(batch, object_bytes)``."""
        area = self._areas.get()
        try:
            yield area
        finally:
            self._areas.put(area)

    def _name(self, key: ChunkKey) -> str:
        return self._head + object_name(key, self._shard)

    def _requests(
        self, pieces: Sequence[Piece], area: npt.NDArray[np.uint8]
    ) -> tuple[list[str], list[int], list[int]]:
        """Names, addresses in ``area`` and sizes."""
        names = [self._name(piece.key) for piece in pieces]
        start = area.ctypes.data
        addresses = [start + i * self._size for i in range(len(pieces))]
        return names, addresses, [self._size] * len(pieces)

    def _warn_of(self, verb: str, codes: Sequence[int]) -> None:
        for code in sorted({code for code in codes if code < 0} - NORMAL):
            self._warn(verb, code)

    def _warn(self, verb: str, code: int, words: str = "") -> None:
        """Say each kind of error once."""
        if self._once.first(verb, code):
            log.warning(
                "tier %s: chunks in Mooncake Store cannot be %s: %s. Serving goes on without them; "
                "this is said once",
                self._config.name,
                verb,
                words or explain(code),
            )
