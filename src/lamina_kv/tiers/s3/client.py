"""The client library, and how a bucket is reached through it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lamina_kv.tiers.contract import StoreError
from lamina_kv.tiers.s3.config import CLIENT_OPTIONS, Option

try:
    import obstore
    from obstore.exceptions import (
        AlreadyExistsError,
        BaseError,
        NotSupportedError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )
    from obstore.store import from_url
except ImportError as error:
    raise StoreError(
        f"a tier of kind s3 needs obstore ({error}): pip install 'lamina-kv[s3]'"
    ) from error

__all__ = [
    "AlreadyExistsError",
    "BaseError",
    "NotSupportedError",
    "PermissionDeniedError",
    "PreconditionError",
    "UnauthenticatedError",
    "connect",
    "obstore",
]

RETRIES = 3
"""Attempts of the library beyond the first one; all of them within the time of the call."""

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def connect(url: str, options: Mapping[str, Option], timeout: float) -> Any:
    """A store of the library, whose names begin behind the prefix of ``url``. Nothing is sent yet.

    Args:
        url: the bucket.
        options: of the library; what is not there comes from the environment.
        timeout: seconds that a caller waits for a request at most.

    Raises:
        BaseError, ValueError, TypeError: if the library does not take an option.
    """
    store: Any = {name: _text(value) for name, value in options.items()}
    client: Any = {name: store.pop(name) for name in CLIENT_OPTIONS & store.keys()}
    if url.startswith("s3:"):
        # Objects are verified when they are read, so that the library need not hash them.
        store.setdefault("unsigned_payload", "true")
        endpoints = [store.get("endpoint", ""), *(os.environ.get(name, "") for name in _ENDPOINTS)]
        if next(filter(None, endpoints), "").startswith("http://"):
            client.setdefault("allow_http", "true")
    # A last resort, as the time of a call is over before that.
    client["timeout"] = f"{math.ceil(timeout * 1500)}ms"
    client.setdefault("connect_timeout", client["timeout"])
    retries: Any = {
        "max_retries": RETRIES,
        "retry_timeout": timedelta(seconds=timeout),
        "backoff": {
            "init_backoff": timedelta(seconds=0.05),
            "max_backoff": timedelta(seconds=0.5),
            "base": 2,
        },
    }
    return from_url(url, config=store, client_options=client, retry_config=retries)


def _text(value: Option) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
