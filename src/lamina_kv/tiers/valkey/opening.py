"""Opens a store on a server, for an engine or to be looked into, and says what is wrong if that
does not work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lamina_kv.tiers.audit import ListingAudit
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.contract import Fate, Store, StoreError, Tenant
from lamina_kv.tiers.valkey.config import ValkeyConfig
from lamina_kv.values import GIB

log = logging.getLogger("lamina_kv.tiers")

LARGEST_VALUE = GIB // 2
"""The server's `proto-max-bulk-len`, unless it says otherwise."""


def open_store(config: ValkeyConfig, tenant: Tenant) -> Store:
    """Open a store. A server that cannot be reached is no error: it is tried again.

    Args:
        config: the tier.
        tenant: for whom.

    Raises:
        StoreError: if the client library is missing, or the server refuses what is configured.
    """
    with _library(config.key("kind")):
        from lamina_kv.tiers.valkey.connection import FULL, Failure
        from lamina_kv.tiers.valkey.store import ValkeyStore
    if tenant.object_bytes > LARGEST_VALUE:
        raise StoreError(
            f"{config.key('url')}: a chunk takes {tenant.object_bytes} bytes, and a value on a "
            f"server at most {LARGEST_VALUE}: use smaller chunks (chunk_tokens)"
        )
    store = ValkeyStore(config, tenant)
    try:
        store.check()
    except Failure as failure:
        if failure.fate is Fate.REFUSED and FULL not in failure.words:
            store.close()
            raise StoreError(
                f"{config.key('url')}: {config.url} cannot be used: {failure.words}. "
                f"{failure.advice}"
            ) from failure
        log.warning(
            "tier %s: %s cannot be used now (%s): every chunk of it is a miss, and serving goes "
            "on. %s%s. It is tried again; if this stays, check %s",
            config.name,
            config.url,
            failure.words,
            failure.advice,
            f", and whether it is a cluster ({config.key('cluster')})" if config.cluster else "",
            config.key("url"),
        )
    return store


def open_audit(place: str, tier: TierConfig | None = None) -> ListingAudit:
    """Look into a server.

    Args:
        place: its URL.
        tier: its entry in a configuration, with all that it takes to be let in.

    Raises:
        StoreError: if the client library is missing, the URL is wrong, or the server does not let
            us look.
    """
    with _library(place.partition(":")[0]):
        from lamina_kv.tiers.valkey.listing import ValkeyListing, config_of
    config = tier if isinstance(tier, ValkeyConfig) else config_of(place)
    return ListingAudit(ValkeyListing(config))


@contextmanager
def _library(what: str) -> Iterator[None]:
    """Say what to install if an import fails.

    Args:
        what: what needs it.
    """
    try:
        yield
    except ImportError as error:
        raise StoreError(
            f"{what}: the client library cannot be imported ({error}): "
            "pip install 'lamina-kv[valkey]'"
        ) from error
