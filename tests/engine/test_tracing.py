"""Lamina's spans go where vLLM's go, into the trace that the client began."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from engine.driver import EngineSpec, Fleet
from engine.server import CALL_SECONDS, Server
from engine.workload import CHUNK, prompt

pytestmark = pytest.mark.engine

PARENT = "b7ad6b7169203331"


class Collector:
    """Keeps what is sent to it over OTLP.

    Attributes:
        url: where to send it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.names: dict[str, list[str]] = defaultdict(list)
        self.parents: dict[str, set[str]] = defaultdict(set)

    def take(self, body: bytes) -> None:
        export = ExportTraceServiceRequest.FromString(body)
        for resource in export.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.parents[span.trace_id.hex()].add(span.parent_span_id.hex())
                    self.names[span.trace_id.hex()].append(span.name)


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield collector
        server.shutdown()


def test_spans_of_a_request_are_in_its_trace(llama: Path, fleet: Fleet) -> None:
    tokens = prompt(92, 5 * CHUNK + 30)
    first, second = "0af7651916cd43dd8448eb211c80319c", "1af7651916cd43dd8448eb211c80319c"
    with collecting() as collector:
        spec = EngineSpec(
            llama,
            {"host": {"capacity": "16MiB"}},
            options={"otlp_traces_endpoint": collector.url},
            environment={
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
                "OTEL_BSP_SCHEDULE_DELAY": "100",
            },
        )
        with Server(spec, fleet.next_log(), forked=True) as server:
            for trace in (first, second):
                server.complete(tokens, traceparent=f"00-{trace}-{PARENT}-01")
                server.wait_until_empty(CALL_SECONDS)
                server.forget()
            wanted = {
                first: ["lamina.lookup", "lamina.save", "llm_request"],
                second: ["lamina.load", "lamina.lookup", "llm_request"],
            }
            server.wait_until(
                lambda: all(set(names) <= set(collector.names[t]) for t, names in wanted.items()),
                CALL_SECONDS,
            )
    for trace, names in wanted.items():
        ours = [name for name in collector.names[trace] if name.startswith(("lamina.", "llm_"))]
        assert sorted(set(ours)) == names
        assert collector.parents[trace] == {PARENT}, "all are the client's own children"
