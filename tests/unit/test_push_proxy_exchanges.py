"""Guards how the proxy reads the URLs of engines, and that what it asks them stands as it is to."""

from __future__ import annotations

import asyncio
import re

import pytest

from lamina_kv.push.proxy.exchanges import ExchangeError, Exchanges, read_url


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1:8000",
        "http://[fe80::1]:8000/base",
        "https://vllm-0.vllm.svc",
        "http://a_b:1",
        "http://1and1",
        "http://ex\u00e4mple",
    ],
)
def test_where_something_may_be(url: str) -> None:
    assert read_url(url).host


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.300:8000",
        "http://10.0.0:8000",
        "http://10.0.0\u20133:8000",
        "http://a b",
        "http://xn--",
        "http://[::1",
        "http://h:70000",
        "http://",
    ],
)
def test_where_nothing_can_be(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_url(url)


@pytest.mark.parametrize(
    ("method", "body", "length"),
    [("GET", b"", None), ("POST", b"", 0), ("POST", b"{}", 2), ("POST", b"x" * (3 << 20), 3 << 20)],
)
def test_what_an_engine_is_sent(method: str, body: bytes, length: int | None) -> None:
    """No header of the client library's own, but for those that HTTP needs."""
    target = b"//host/%2e/a b#c?q=%2B&r#s".replace(b" ", b"%20")

    async def scenario() -> tuple[bytes, bytes]:
        asked: asyncio.Future[tuple[bytes, bytes]] = asyncio.get_running_loop().create_future()

        async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            asked.set_result((head, await reader.readexactly(length or 0)))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            writer.close()

        async with await asyncio.start_server(engine, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            exchanges = Exchanges(f"http://127.0.0.1:{port}/base/", 5.0)
            async with exchanges.send(method, target, {"x-mine": "1"}, body) as reply:
                assert (reply.status, await reply.rest()) == (200, b"ok")
                assert reply.headers == (("content-length", "2"),)
            await exchanges.close()
        return await asked

    head, got = asyncio.run(scenario())
    assert got == body
    line, *headers = head.decode().strip().split("\r\n")
    assert line == f"{method} /base{target.decode()} HTTP/1.1"
    names = {re.split(": ?", header)[0].lower() for header in headers}
    needed = {"host", "accept", "accept-encoding", "x-mine"}
    assert names == needed | ({"content-length"} if length is not None else set())
    assert "accept-encoding: identity" in head.decode().lower()


def test_connecting_takes_no_longer_than_it_may_however_many_addresses_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And whatever looking up the name takes."""

    async def hangs(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("aiohttp.ThreadedResolver.resolve", hangs)

    async def scenario() -> None:
        exchanges = Exchanges("http://engine.invalid:8000", 0.1)
        with pytest.raises(ExchangeError, match="Timeout"):
            async with exchanges.send("GET", b"/", {}, b""):
                pass
        await exchanges.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
