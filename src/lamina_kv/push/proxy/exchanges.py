"""HTTP as the proxy speaks it to one engine: a pool of connections, and answers as they come.

aiohttp parses in C. With httpx, which parses in Python, a request took one and a half times as much
of the proxy's time on a processor (``bench/proxy_hop.py``).
"""

from __future__ import annotations

import io
import ipaddress
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
import idna
from yarl import URL

_KEEP_ALIVE = 3.0
"""Seconds that an idle connection is kept: fewer than vLLM's five, so that none is used that the
engine is just closing."""
_HEADER_BYTES = 1 << 16
"""Of one header of an answer, at most."""
_READ_AHEAD = 1 << 15
"""Bytes of an answer above which no more is read while its client is slow; twice as many may be
held."""
_AT_ONCE = 1 << 20
"""Bytes of a body that are written in one go. A larger one is written piece by piece: other
requests go on meanwhile."""

_NAME = re.compile(r"(?=.*[a-z_-])[\w.-]+", re.ASCII | re.IGNORECASE)
"""Names of hosts. What has digits and dots only is an address, or a mistake."""


def read_url(url: str) -> URL:
    """The URL of a server.

    Raises:
        ValueError: if nothing can connect there.
    """
    read = URL(url)
    host = read.host or ""
    if not host.isascii():
        idna.encode(host)  # yarl takes characters that no name may have
    elif not _NAME.fullmatch(host):
        ipaddress.ip_address(host)
    return read


class ExchangeError(Exception):
    """There was no connection, or it broke off. Says why."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__} {error}".rstrip())


class Reply:
    """An answer whose headers are there.

    Args:
        response: the client library's.

    Attributes:
        status: HTTP's.
        headers: in order; names are in lower case, and one may stand several times.
        media_type: with its parameters; empty if the answer does not say.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.media_type = response.headers.get("content-type", "")
        self.headers = tuple(
            (name.decode("latin-1").lower(), value.decode("latin-1"))
            for name, value in response.raw_headers
        )
        self._content = response.content

    async def piece(self) -> bytes:
        """What has come of the body since the last piece; empty at its end.

        Raises:
            ExchangeError: if the connection broke off.
        """
        try:
            return await self._content.readany()
        except aiohttp.ClientError as error:
            raise ExchangeError(error) from error

    async def rest(self) -> bytes:
        """All that is left of the body.

        Raises:
            ExchangeError: if the connection broke off.
        """
        parts = []
        while part := await self.piece():
            parts.append(part)
        return b"".join(parts)


class Exchanges:
    """See the module. Belongs to the event loop of its first exchange.

    Args:
        url: of the engine's server.
        connect_timeout: seconds for a connection.
        verify: how its certificate is checked; None as usual.
        server_name: whose certificate it shows, if that is not the host of its URL.

    Raises:
        ValueError: if nothing can connect to the URL.
    """

    def __init__(
        self,
        url: str,
        connect_timeout: float,
        verify: ssl.SSLContext | None = None,
        server_name: str = "",
    ) -> None:
        self._base = read_url(url)
        # For the name and all of its addresses together.
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout)
        self._verify = True if verify is None else verify
        self._server_name = server_name or None
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def send(
        self, method: str, target: bytes, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[Reply]:
        """An exchange: entered when the headers of the answer are there, closed when it is left.

        Args:
            method: HTTP's.
            target: path and query, as they are to be sent.
            headers: besides those of the connection.
            body: may be empty.

        Raises:
            ExchangeError: if there is no answer.
        """
        session = self._session = self._session or self._open()
        try:
            response = await session.request(
                method,
                self._url(target),
                headers={name: _text(value) for name, value in headers.items()},
                data=(io.BytesIO(body) if len(body) > _AT_ONCE else body) or None,
                allow_redirects=False,
                server_hostname=self._server_name,
            )
        except aiohttp.ClientError as error:
            raise ExchangeError(error) from error
        try:
            yield Reply(response)
        finally:
            # What was not read to its end is of use to nobody, nor is what was not sent yet.
            if response.connection is not None and response.connection.transport is not None:
                response.connection.transport.abort()
            response.close()

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                ssl=self._verify,
                # Requests are bounded where they are let in.
                limit=0,
                keepalive_timeout=_KEEP_ALIVE,
                # A name may lead to another address a moment later.
                use_dns_cache=False,
                resolver=aiohttp.ThreadedResolver(),
            ),
            # A cookie is one client's. Kept here, it would be shown for all others.
            cookie_jar=aiohttp.DummyCookieJar(),
            # Events are told apart in what engines send, so it must not be compressed.
            headers={"accept-encoding": "identity"},
            auto_decompress=False,
            skip_auto_headers=("content-type", "user-agent"),
            timeout=self._timeout,
            read_bufsize=_READ_AHEAD,
            max_line_size=_HEADER_BYTES,
            max_field_size=_HEADER_BYTES,
        )

    def _url(self, target: bytes) -> URL:
        # Never joined as URLs are: a path that looks like a host must stay a path.
        path, _, query = target.decode().partition("?")
        return URL.build(
            scheme=self._base.scheme,
            authority=self._base.raw_authority,
            path=self._base.raw_path.rstrip("/") + path,
            query_string=query,
            encoded=True,
        )


def _text(value: str) -> str:
    """A header's value such that aiohttp, which writes UTF-8, writes the bytes that a client has
    sent. If these are no UTF-8, it writes the characters that they are in Latin-1."""
    if value.isascii():
        return value
    try:
        return value.encode("latin-1").decode()
    except UnicodeDecodeError:
        return value
