"""What a tier in an object store is configured with."""

from __future__ import annotations

from collections.abc import Mapping
from re import compile
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from lamina_kv.tiers.config import SharedConfig
from lamina_kv.values import TEXT, Kind, WrongValueError, choice

SCHEMES = ("s3", "gs", "az")
"""Of URLs: S3 and what speaks like it, Google Cloud Storage, Azure."""

_URL_WORDS = 'the URL of a bucket such as "s3://bucket/prefix", "gs://…" or "az://…"'
_PART = compile(r"[A-Za-z0-9!_.*'()=-]+")

_OPTION = compile(r"[a-z][a-z0-9_]{1,79}")
_SECRET = compile(r"secret|password|bearer|sas_|(^|_)key$|key_base64|token$|(?<!skip_)signature")
_OWN = ("timeout", "bucket", "bucket_name", "container_name")

CLIENT_OPTIONS = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "http1_only",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "randomize_addresses",
        "read_timeout",
        "root_certificate",
        "user_agent",
    }
)
"""Options of the HTTP client. The library takes them apart from those of the object store."""

Option = str | int | float | bool


def parse_url(value: object) -> str:
    """The URL of a bucket in the form that messages have.

    Raises:
        WrongValueError: if it is none.
    """
    if not isinstance(value, str):
        raise WrongValueError
    try:
        url = urlsplit(value)
        plain = url.port is None
    except ValueError:
        raise WrongValueError from None
    if "@" in url.netloc:
        raise WrongValueError(f"{_URL_WORDS} without credentials: those belong in the environment")
    if url.scheme not in SCHEMES or not url.netloc or not plain or url.query or url.fragment:
        raise WrongValueError
    path = url.path.strip("/")
    parts = path.split("/") if path else ()
    if not all(_PART.fullmatch(part) and part not in (".", "..") for part in parts):
        raise WrongValueError(f"{_URL_WORDS}, its prefix of letters, digits and -_.=!*'()")
    return f"{url.scheme}://{url.netloc}/{path}".rstrip("/")


def _parse_options(value: object) -> dict[str, Option]:
    if not isinstance(value, dict):
        raise WrongValueError
    for name, option in value.items():
        if not isinstance(name, str) or not _OPTION.fullmatch(name):
            raise WrongValueError
        if _SECRET.search(name):
            raise WrongValueError(
                f"without {name}: secrets belong in the environment (AWS_SECRET_ACCESS_KEY), or "
                "come from the machine's role"
            )
        if name in _OWN:
            raise WrongValueError(f"without {name}: the tier has `url` and `timeout` for that")
        if not isinstance(option, str | int | float):
            raise WrongValueError
        if isinstance(option, str) and "@" in option.partition("://")[2].partition("/")[0]:
            raise WrongValueError(f"without credentials in {name}: they belong in the environment")
    return dict(value)


URL = Kind(_URL_WORDS, parse_url, secret=True, schema=TEXT.schema)
OPTIONS = Kind(
    'names and values such as {region: "eu-central-1", endpoint: "https://…"}',
    _parse_options,
    secret=True,
    schema={"type": "object"},
)


class S3Config(SharedConfig):
    """A tier in an object store: S3 and what speaks like it, Google Cloud Storage, Azure."""

    kind: Annotated[Literal["s3"], choice("s3")] = "s3"
    url: Annotated[str, URL] = Field(
        examples=["s3://bucket/prefix"],
        description="Bucket, and what the names of all objects in it begin with. Credentials come "
        "from the environment or from the machine's role, never from here.",
    )
    options: Annotated[Mapping[str, Option], OPTIONS] = Field(
        default={},
        description="Options of obstore by their names there: `region`, `endpoint`, "
        "`virtual_hosted_style_request`, `proxy_url` and so on.",
    )

    @property
    def place(self) -> str:
        """See the base class."""
        return self.url
