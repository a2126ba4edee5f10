"""An S3 in this process that fails as it is told: just enough of the protocol for one client.

Objects are in a dictionary, no signature is looked at, and what happens to requests of a method is
up to :attr:`ScriptedS3.faults`.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

_TYPE = "<?xml version='1.0' encoding='UTF-8'?>"


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of a request.

    Attributes:
        status: the answer's status, if it is an error.
        code: the error's code.
        delay: seconds before the request is looked at.
        cut: bytes of the body after which the connection is closed.
        after: requests of the method that go well before, in the order in which they come in.
        spares: what the names end with whose requests go well; empty: none.
        times: how many requests; then all is well again. 0: all.
    """

    status: int = 0
    code: str = "InternalError"
    delay: float = 0.0
    cut: int = -1
    after: int = 0
    spares: str = ""
    times: int = 0


class ScriptedS3:
    """A server while a ``with`` block runs; see the module.

    Attributes:
        bucket: the only bucket.
        objects: content by name, the bucket left out.
        faults: what becomes of requests, by ``GET``, ``HEAD``, ``PUT`` and ``LIST``.
        seen: how many requests there were of each.
        conditions: whether the server knows ``If-None-Match``.
    """

    def __init__(self) -> None:
        self.bucket = "bucket"
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.seen: Counter[str] = Counter()
        self.conditions = True
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(self)

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        """Start it."""
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it; whatever hangs ends."""
        self.release()
        self._server.shutdown()
        self._server.server_close()

    def release(self) -> None:
        """Let all go on that hangs."""
        self._ended.set()

    def fault(self, method: str, name: str) -> Fault:
        """What becomes of one more request for this object; waits as long as that says."""
        with self._lock:
            self.seen[method] += 1
            fault = self.faults.get(method, Fault())
            number = self.seen[method] - fault.after
            spared = bool(fault.spares) and name.endswith(fault.spares)
            if spared or number <= 0 or 0 < fault.times < number:
                fault = Fault()
        self._ended.wait(fault.delay)
        return fault

    def put(self, name: str, content: bytes, *, create: bool) -> bool:
        """Keep an object; False if it is to be created and is there."""
        with self._lock:
            if create and name in self.objects:
                return False
            self.objects[name] = content
            return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, s3: ScriptedS3) -> None:
        self.s3 = s3
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has hung up is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self._failed("PUT"):
            return
        condition = self.headers.get("If-None-Match")
        if condition and not self.server.s3.conditions:
            self._error(501, "NotImplemented")
        elif self.server.s3.put(self._name(), content, create=condition == "*"):
            self._answer(200, b"")
        else:
            self._error(412, "PreconditionFailed")

    def do_HEAD(self) -> None:
        if not self._failed("HEAD"):
            self._object(body=False)

    def do_GET(self) -> None:
        listing = "list-type" in self.path
        if self._failed("LIST" if listing else "GET"):
            return
        if listing:
            self._list()
        else:
            self._object(body=True)

    def _failed(self, method: str) -> bool:
        fault = self.server.s3.fault(method, self._name())
        if urlsplit(self.path).path.split("/")[1] != self.server.s3.bucket:
            fault = Fault(404, "NoSuchBucket")
        self._cut = fault.cut
        if fault.status:
            self._error(fault.status, fault.code)
        return bool(fault.status)

    def _name(self) -> str:
        return "/".join(urlsplit(self.path).path.split("/")[2:])

    def _object(self, *, body: bool) -> None:
        content = self.server.s3.objects.get(self._name())
        if content is None:
            self._error(404, "NoSuchKey")
        else:
            self._answer(200, content, body=body)

    def _list(self) -> None:
        prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
        names = sorted(name for name in list(self.server.s3.objects) if name.startswith(prefix))
        found = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(self.server.s3.objects[name])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
            for name in names
        )
        text = (
            f"{_TYPE}<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        )
        self._answer(200, text.encode())

    def _error(self, status: int, code: str) -> None:
        text = f"{_TYPE}<Error><Code>{code}</Code><Message>as it was told</Message></Error>"
        self._answer(status, text.encode(), body=self.command != "HEAD")

    def _answer(self, status: int, content: bytes, *, body: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", '"x"')
        self.end_headers()
        if not body:
            return
        if self._cut >= 0:
            content, self.close_connection = content[: self._cut], True
        self.wfile.write(content)
