"""What the proxy adds to a request when there is little to do: seconds to the first event, seconds
to each event after that, and its time on a processor.

    python bench/proxy_hop.py
    python bench/proxy_hop.py --beside old=../other-checkout/src --requests 100
    python bench/proxy_hop.py -- --disaggregate always

A stand-in for a decode engine answers at once, and then sends an event every few milliseconds. It
is asked itself, and through a proxy that was started as an operator does it, one request at a time,
in turns. Each event says when it was sent, by a clock that all processes of a machine share. So the
difference between the ways is the proxy alone. ``--beside`` adds proxies of other checkouts, in the
same turns. Arguments behind ``--`` are given to every proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from lamina_kv.bench.ports import free_port
from lamina_kv.cli.demo_server import Server

MODEL = "demo"
DIRECT = "direct"
PROXY = ("-c", "from lamina_kv.cli.main import main; main()", "push-proxy")
_STAMP = re.compile(rb'"got": (\d+), "sent": (\d+)')
_SIZE = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


# -- the engine --------------------------------------------------------------------------------


def event(got: int, number: int) -> bytes:
    """A chunk with an event like those of vLLM, which says when it is sent."""
    text = (
        f'data: {{"id": "cmpl-8f1d2c3b4a596877", "object": "text_completion", "created": 1764547200'
        f', "model": "{MODEL}", "choices": [{{"index": 0, "text": " word{number}", "logprobs": null'
        f', "finish_reason": null, "stop_reason": null}}], "usage": null'
        f', "got": {got}, "sent": {time.perf_counter_ns()}}}\n\n'
    )
    return f"{len(text):x}\r\n{text}\r\n".encode()


async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection to a stand-in that answers what proxies and clients ask of an engine."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            got = time.perf_counter_ns()
            size = _SIZE.search(head)
            body = await reader.readexactly(int(size[1])) if size else b""
            if b"/completions" not in head.partition(b"\r\n")[0]:
                answer = json.dumps({"data": [{"id": MODEL}]}).encode()
                writer.write(_answer(answer))
                continue
            asked = json.loads(body)
            if not asked.get("stream"):
                usage = {"prompt_tokens": 10, "completion_tokens": 1}
                writer.write(_answer(json.dumps({"choices": [{}], "usage": usage}).encode()))
                continue
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                b"transfer-encoding: chunked\r\n\r\n" + event(got, 0)
            )
            for number in range(1, asked["max_tokens"]):
                await asyncio.sleep(asked["seconds_between"])
                writer.write(event(got, number))
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    except (OSError, asyncio.IncompleteReadError):
        writer.close()


def _answer(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


async def serve(ports: Sequence[int]) -> None:
    """Be the engines at these ports, for good."""
    servers = [await asyncio.start_server(engine, "127.0.0.1", port) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


# -- a client ----------------------------------------------------------------------------------


@dataclass
class Way:
    """A way to the engine, and what it took.

    Attributes:
        name: for the table.
        port: who is asked.
        pid: of the proxy; 0 if there is none.
        there: seconds until the engine had the request, for each request.
        first: seconds until the client had the first event, for each request.
        events: seconds from engine to client, for each later event.
        busy: the proxy's seconds on a processor, for each request.
    """

    name: str
    port: int
    pid: int = 0
    there: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    events: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    async def connect(self) -> None:
        """Open the one connection that all requests take."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, prompt: str, tokens: int, between: float) -> None:
        """One request, and what it took."""
        body = json.dumps(
            {
                "model": MODEL,
                "prompt": prompt,
                "stream": True,
                "max_tokens": tokens,
                "seconds_between": between,
            }
        )
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"accept: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        busy = self._seconds_on_processor()
        asked = time.perf_counter_ns()
        self._writer.write((head + body).encode())
        text, came = b"", []
        while not text.endswith(b"\r\n0\r\n\r\n"):
            piece = await self._reader.read(1 << 16)
            now = time.perf_counter_ns()
            if not piece:
                raise ConnectionError(f"{self.name} has closed the connection: {text!r}")
            came += [(now, int(m[1]), int(m[2])) for m in _STAMP.finditer(piece)]
            text += piece
        if len(came) != tokens:
            raise RuntimeError(f"{self.name}: {len(came)} of {tokens} events: {text[:500]!r}")
        self.there.append((came[0][1] - asked) / 1e9)
        self.first.append((came[0][0] - asked) / 1e9)
        self.events += [(now - sent) / 1e9 for now, _, sent in came[1:]]
        await asyncio.sleep(0.02)  # what is left to do when the client has everything
        self.busy.append(self._seconds_on_processor() - busy)

    def _seconds_on_processor(self) -> float:
        """Of all threads of the proxy, so far."""
        if not self.pid:
            return 0.0
        threads = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


async def ask_all(ways: Sequence[Way], options: argparse.Namespace) -> None:
    """All requests, in turns."""
    prompt = "x" * options.prompt
    for way in ways:
        await way.connect()
        for _ in range(options.warm):
            await way.ask(prompt, 2, options.between)
        for taken in (way.there, way.first, way.events, way.busy):
            taken.clear()
    for _ in range(options.requests):
        for way in ways:
            await asyncio.sleep(options.pause)
            await way.ask(prompt, options.tokens, options.between)


# -- the result --------------------------------------------------------------------------------


def milliseconds(values: Sequence[float]) -> str:
    """The median."""
    return f"{1e3 * statistics.median(values):.2f}"


def table(ways: Sequence[Way], tokens: int) -> str:
    """Medians in milliseconds, a line for each way."""
    lines = [
        "| ms, median | to the engine | first event | later events | on a processor, a request |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += (
        f"| {way.name} | {milliseconds(way.there)} | {milliseconds(way.first)} "
        f"| {milliseconds(way.events)} | {milliseconds(way.busy)} |"
        for way in ways
    )
    return "\n".join([*lines, "", f"A request has {tokens} events."])


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--requests", type=int, default=100, help="For each way.")
    parser.add_argument("--tokens", type=int, default=50, help="Events of an answer.")
    parser.add_argument("--between", type=float, default=0.003, help="Seconds between events.")
    parser.add_argument("--pause", type=float, default=0.05, help="Seconds between requests.")
    parser.add_argument("--prompt", type=int, default=200, help="Characters.")
    parser.add_argument("--warm", type=int, default=20, help="Requests before those that count.")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=SRC")
    parser.add_argument("--engines", nargs="+", type=int, help=argparse.SUPPRESS)
    parser.add_argument("proxy", nargs="*", help="Options of the proxies.")
    options = parser.parse_args()
    if options.engines:
        asyncio.run(serve(options.engines))
    sources = {"proxy": "", **dict(each.split("=", 1) for each in options.beside)}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = [free_port(), free_port()]
        engines = [sys.executable, __file__, "--engines", *map(str, ports)]
        stand_in = subprocess.Popen(engines)
        stack.callback(stand_in.kill)
        prefill, decode = (f"http://127.0.0.1:{port}" for port in ports)
        ways = [Way(DIRECT, ports[1])]
        for name, source in sources.items():
            port = free_port()
            command = [
                *(sys.executable, *PROXY, "--prefill", f"{prefill},127.0.0.1:7000"),
                *("--decode", decode, "--port", str(port), *options.proxy),
            ]
            path = {"PYTHONPATH": source} if source else {}
            proxy = stack.enter_context(Server(command, port, path, work / f"{name}.log"))
            proxy.await_start()
            ways.append(Way(name, port, proxy.pid))
        asyncio.run(ask_all(ways, options))
    print(table(ways, options.tokens))


if __name__ == "__main__":
    main()
