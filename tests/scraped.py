"""Pages of ``/metrics``. Those in ``tests/scrapes`` are a real server's: see their first line."""

from __future__ import annotations

import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lamina_kv.cli.scrape import Scrape, parse

SCRAPES = Path(__file__).parent / "scrapes"
LABELS = 'engine="0",model_name="model"'


def recorded(name: str) -> str:
    return (SCRAPES / f"{name}.txt").read_text()


def scrape(name: str, at: float = 0.0) -> Scrape:
    return parse(recorded(name), "http://server", at)


def changed_text(name: str, *lines: str) -> str:
    """A recorded scrape with other values of some series, each as a line of the scrape."""
    series = {line.rsplit(" ", 1)[0]: line for line in lines}
    text = [series.pop(line.rsplit(" ", 1)[0], line) for line in recorded(name).splitlines()]
    return "\n".join([*text, *series.values(), ""])


def changed(name: str, *lines: str) -> Scrape:
    """Likewise, parsed."""
    return parse(changed_text(name, *lines), "http://server", 0.0)


def without_label(name: str, label: str) -> str:
    """A recorded scrape whose ``lamina_config_info`` lacks a label."""
    return re.sub(rf'(lamina_config_info{{.*?){label}=".*?",?', r"\1", recorded(name))


@contextmanager
def saying(words: bytes) -> Iterator[str]:
    """A server of another protocol: it says these words to whoever asks, and hangs up."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(words)

    with _running(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


@contextmanager
def serving(*bodies: str, status: int = 200) -> Iterator[str]:
    """A server whose ``/metrics`` are these texts, one after the other; the last one stays."""
    left = [*bodies]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write((left.pop(0) if len(left) > 1 else left[0]).encode())

        def log_message(self, *_: object) -> None:
            pass

    with _running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


@contextmanager
def _running(server: socketserver.TCPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
