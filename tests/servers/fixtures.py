"""Servers that tests share, started when the first one asks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from servers.seaweed import Seaweed


@pytest.fixture(scope="session")
def seaweed() -> Iterator[Seaweed]:
    """An S3 that nobody stops or kills; use a bucket or a prefix of your own."""
    with Seaweed() as server:
        yield server
