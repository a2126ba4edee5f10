"""What is on a server, for a person. Nothing is changed, and nothing counts as used."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from glide_shared.commands.batch import BaseBatch
from glide_shared.constants import TEncodable
from glide_shared.exceptions import RequestError
from glide_sync import AllPrimaries, ClusterScanCursor, GlideClusterClient, InfoSection
from pydantic import ValidationError

from lamina_kv.plan import ChunkKey
from lamina_kv.tiers.audit import Listed
from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.names import ABOUT, object_name, parse_about, parse_object_name
from lamina_kv.tiers.valkey.address import WORDS, parse
from lamina_kv.tiers.valkey.config import ValkeyConfig
from lamina_kv.tiers.valkey.connection import Client, Connection, Failure
from lamina_kv.tiers.valkey.store import pipeline
from lamina_kv.values import WrongValueError

TIMEOUT = 10.0
"""Seconds for one answer. Nobody else waits for it."""

PAGE = 256
"""Names that are asked for at once: the server does nothing else meanwhile."""

PASSWORD_VARIABLES = ("VALKEYCLI_AUTH", "REDISCLI_AUTH")
"""Where valkey-cli and redis-cli find a password."""

_NAME = re.compile(rb"(.*?)([0-9a-f]{32}):(.*)", re.DOTALL)


class ValkeyListing:
    """A :class:`~lamina_kv.tiers.audit.Listing` of a server. Chunks are found whatever the tier's
    ``prefix`` is.

    Args:
        config: how it is reached.

    Attributes:
        place: see the protocol.
        damage_means: see there.
        clearing: see there.

    Raises:
        StoreError: if the server does not let us look.
    """

    damage_means = (
        "Engines take what is damaged for a miss, and the one that has found it replaces it when "
        "it has computed the chunk again."
    )
    clearing = (
        "a server is shared by engines, and it evicts by itself; to give up everything, stop the "
        "engines and use FLUSHDB, or UNLINK on what `valkey-cli --scan --pattern 'lamina:*'` lists"
    )

    def __init__(self, config: ValkeyConfig) -> None:
        self.place = config.place
        self._config = config.model_copy(update={"timeout": TIMEOUT})
        self._connection = Connection(self._config, _leave_no_trace)
        self._prefixes: dict[str, bytes] = {}
        if not self._config.cluster and "mode:cluster" in self._server():
            self.close()
            self._config = self._config.model_copy(update={"cluster": True})
            self._connection = Connection(self._config, _leave_no_trace)

    def about(self, namespace: str) -> Mapping[str, str]:
        """See the protocol."""
        return parse_about(self._get(namespace, ABOUT) or b"")

    def chunks(self) -> Iterator[Listed]:
        """See the protocol."""
        for names in self._pages():
            found = []
            for name in names:
                match = _NAME.fullmatch(name)
                if match and (chunk := parse_object_name(match[3].decode(errors="replace"))):
                    found.append((name, match[1], match[2].decode(), *chunk))
            yield from self._listed(found)

    def read(self, chunk: Listed) -> bytes | None:
        """See the protocol."""
        return self._get(chunk.namespace, object_name(chunk.key, chunk.shard))

    def close(self) -> None:
        """See the protocol."""
        self._connection.close()

    # -- inside ------------------------------------------------------------------------------------

    def _server(self) -> str:
        with self._client() as client:
            return str(client.info([InfoSection.SERVER]))

    @contextmanager
    def _client(self) -> Iterator[Client]:
        try:
            with self._connection.client(TIMEOUT) as client:
                yield client
        except Failure as failure:
            raise StoreError(f"{self.place}: {failure}. {failure.advice}") from failure

    def _pages(self) -> Iterator[list[bytes]]:
        """Names of all that is on the server, some at a time."""
        cursor: Any = None
        while cursor is None or not _is_over(cursor):
            with self._client() as client:
                said: list[Any]
                if isinstance(client, GlideClusterClient):
                    first = ClusterScanCursor()  # type: ignore[no-untyped-call]
                    said = [*client.scan(cursor or first, count=PAGE)]
                else:
                    said = [*client.scan(cursor or b"0", count=PAGE)]
            cursor, names = said
            yield names

    def _listed(self, found: list[tuple[bytes, bytes, str, ChunkKey, int]]) -> Iterator[Listed]:
        def add(batch: BaseBatch) -> None:
            for name, *_ in found:
                batch.strlen(name)
                batch.object_idletime(name)

        if not found:
            return
        with self._client() as client:
            said = pipeline(client, add, TIMEOUT, strict=False)
        now = time.time()
        for (_, prefix, namespace, key, shard), size, idle in zip(
            found, said[::2], said[1::2], strict=True
        ):
            if isinstance(size, int) and size:  # else it is gone, or no value
                # Where it evicts by frequency, a server does not know when.
                used = now - idle if isinstance(idle, int) else 0.0
                self._prefixes[namespace] = prefix  # of what is read next, perhaps
                yield Listed(namespace, key, shard, size, used)

    def _get(self, namespace: str, name: str) -> bytes | None:
        full = self._prefixes.get(namespace, b"") + f"{namespace}:{name}".encode()
        with self._client() as client:
            return client.get(full)


def config_of(place: str) -> ValkeyConfig:
    """How the server at a URL is reached that is in no configuration.

    Args:
        place: the URL. A password may be in :data:`PASSWORD_VARIABLES` instead.

    Raises:
        StoreError: if the URL is wrong.
    """
    try:
        address = parse(place)
    except WrongValueError as error:
        raise StoreError(f"a place on a server must be {str(error) or WORDS}") from None
    variable = next((name for name in PASSWORD_VARIABLES if os.environ.get(name)), None)
    keys = {
        "url": place,
        "cluster": len(address.hosts) > 1,
        "password_env": None if address.password else variable,
    }
    try:
        return ValkeyConfig.model_validate(keys)
    except ValidationError as error:  # its text has the password
        said = "; ".join(each["msg"] for each in error.errors(include_input=False))
        raise StoreError(f"{address}: {said}") from None


def _is_over(cursor: Any) -> bool:
    return cursor.is_finished() if isinstance(cursor, ClusterScanCursor) else cursor == b"0"


def _leave_no_trace(client: Client, timeout: float) -> None:
    """Ask the server not to count what we look at as used. Old ones cannot."""
    command: list[TEncodable] = ["CLIENT", "NO-TOUCH", "ON"]
    with suppress(RequestError):
        if isinstance(client, GlideClusterClient):
            client.custom_command(command, AllPrimaries())
        else:
            client.custom_command(command)
