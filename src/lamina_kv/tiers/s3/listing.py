"""What is in a bucket, for a person. Nothing is changed; engines may be at work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lamina_kv.tiers.audit import Listed, ListingAudit
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.names import ABOUT, object_path, parse_about, parse_object_path
from lamina_kv.tiers.s3.client import BaseError, connect, obstore
from lamina_kv.tiers.s3.config import Option, S3Config, parse_url
from lamina_kv.tiers.s3.errors import say
from lamina_kv.values import WrongValueError

TIMEOUT = 30.0
"""Seconds that a request may take. A person waits, and no engine."""

PAGE = 1000
"""Names that a store lists in one request."""


def open_audit(place: str, tier: TierConfig | None = None) -> ListingAudit:
    """Look into a bucket.

    Args:
        place: its URL.
        tier: its entry in a configuration, with `options` such as endpoint and region. What is not
            there comes from the environment, and credentials always do.

    Raises:
        StoreError: if the URL is none of a bucket, or an option is wrong.
    """
    return ListingAudit(BucketListing(place, tier.options if isinstance(tier, S3Config) else {}))


class BucketListing:
    """A :class:`~lamina_kv.tiers.audit.Listing` of a bucket.

    Args:
        url: the bucket, and what all names in it begin with.
        options: of the library; what is not there comes from the environment.

    Attributes:
        place: see the protocol.
        damage_means: see there.
        clearing: see there.

    Raises:
        StoreError: if the URL is none of a bucket, or an option is wrong.
    """

    damage_means = (
        "Engines take what is damaged for a miss, and the one that has found it replaces it when "
        "it has computed the chunk again. Many mean that something else writes there."
    )

    def __init__(self, url: str, options: Mapping[str, Option]) -> None:
        try:
            self.place = parse_url(url)
            self._client = connect(self.place, options, TIMEOUT)
        except WrongValueError as error:
            words = str(error) or "the URL of a bucket"
            raise StoreError(f"the place of an object store must be {words}") from None
        except (BaseError, ValueError, TypeError) as error:
            raise StoreError(f"{self.place}: {say(error)}") from None
        self.clearing = (
            f"{self.place} is shared by engines, and nobody deletes what others use: a lifecycle "
            "rule frees space; to give up everything, stop the engines and delete the prefix"
        )

    def about(self, namespace: str) -> Mapping[str, str]:
        """See the protocol."""
        try:
            found = obstore.get(self._client, f"{namespace}/{ABOUT}").bytes().to_bytes()
        except (BaseError, OSError):
            return {}
        return parse_about(found)

    def chunks(self) -> Iterator[Listed]:
        """See the protocol."""
        with self._errors():
            for page in obstore.list(self._client, chunk_size=PAGE):
                for meta in page:
                    if (found := parse_object_path(meta["path"])) is not None:
                        yield Listed(*found, meta["size"], meta["last_modified"].timestamp())

    def read(self, chunk: Listed) -> bytes | memoryview | None:
        """See the protocol."""
        name = object_path(chunk.namespace, chunk.key, chunk.shard)
        with self._errors():
            try:
                return memoryview(obstore.get(self._client, name).bytes())
            except FileNotFoundError:
                return None

    def close(self) -> None:
        """See the protocol: nothing is held."""

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            raise StoreError(
                f"{self.place}: {say(error)}. Endpoint and region come from the tier's `options` "
                "in a configuration (--config, LAMINA_CONFIG) that has this tier, or from the "
                "environment (AWS_ENDPOINT_URL, AWS_REGION); credentials come from there, or from "
                "the machine's role (AWS_ACCESS_KEY_ID, ...)"
            ) from None
