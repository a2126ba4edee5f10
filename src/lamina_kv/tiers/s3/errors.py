"""What an error of the library says of the store: a fate, and one line for people.

The library has classes for what is common to all stores. The rest is only in its text: the HTTP
status, and the code that the store gives in XML. A line for people has neither the query of a URL
nor the body of an answer, in which some stores put signatures and key ids.
"""

from __future__ import annotations

import re

from lamina_kv.tiers.contract import Fate
from lamina_kv.tiers.s3.client import (
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]{1,80})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,200})</Message>")
_QUERY = re.compile(r"\?\S*")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")

_PASSING = (408, 429)
"""Requests that were refused for now: too slow, too many."""

_UNSUPPORTED = (400, 405, 501)
"""What endpoints say to a put with a condition that they do not know."""

_LONGEST = 300


def fate_of(error: Exception) -> Fate:
    """What has become of the object for which a request ended with this error."""
    status = status_of(error)
    if isinstance(error, FileNotFoundError):
        return Fate.REFUSED if lacks_bucket(error) else Fate.GONE
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return Fate.REFUSED
    if (400 <= status < 500 and status not in _PASSING) or status == 507:
        return Fate.REFUSED
    # A store in another region answers with a redirect that leads nowhere.
    return Fate.REFUSED if "redirect" in str(error) else Fate.DOWN


def lacks_bucket(error: Exception) -> bool:
    """Whether it is the bucket that is not there."""
    text = str(error)
    return any(word in text for word in _NO_BUCKET)


def lacks_conditions(error: Exception) -> bool:
    """Whether the endpoint may not know what a put with a condition is."""
    unknown = isinstance(error, NotImplementedError | NotSupportedError)
    return unknown or status_of(error) in _UNSUPPORTED


def status_of(error: Exception) -> int:
    """The HTTP status of the answer; 0 if there was none."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else 0


def say(error: Exception) -> str:
    """The error on one line, without what might be a secret."""
    text = str(error)
    if (status := status_of(error)) and (code := _CODE.search(text)):
        message = _MESSAGE.search(text)
        return f"HTTP {status}, {code[1]}" + (f": {message[1]}" if message else "")
    first = _QUERY.sub("", text.partition("\n")[0].partition("<")[0]).strip()
    return first[:_LONGEST] or type(error).__name__
