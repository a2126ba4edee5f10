"""Spans of OpenTelemetry: what Lamina did for a request, in the request's own trace.

A request that came with a trace context (the W3C headers ``traceparent`` and ``tracestate``) has
its spans there, beside those of whoever serves it. Without one, its first span begins a trace and
the others are below that. The process's own tracer provider decides what becomes of them. Needs
``opentelemetry-api``, and is imported only where spans are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lamina_kv import __version__

REQUEST_ID = "gen_ai.request.id"
"""The attribute that names a request, as vLLM's spans have it."""

PREFIX = "lamina."
"""What names of spans, and of all other attributes, begin with."""

Value = str | int | float


class Span:
    """One that has begun.

    Args:
        span: OpenTelemetry's.
    """

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def end(self, said: Mapping[str, Value], error: str = "") -> None:
        """It is over.

        Args:
            said: attributes, by names without the prefix.
            error: why it has failed; empty if it has not.
        """
        for name, value in said.items():
            self._span.set_attribute(PREFIX + name, value)
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


class Spans:
    """The spans of an engine's requests. One thread tells of requests; spans may begin and end on
    any.

    Args:
        tracer: makes them; by default the process's own, of whatever provider it has.
    """

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._tracer = tracer or trace.get_tracer("lamina_kv", __version__)
        self._parents: dict[str, Context] = {}

    def request(self, name: str, headers: Mapping[str, str] | None) -> None:
        """A request has come.

        Args:
            name: what :meth:`begin` will call it.
            headers: its trace context, if it came with one.
        """
        self._parents[name] = TraceContextTextMapPropagator().extract(headers or {}, Context())

    def forget(self, name: str) -> None:
        """A request has ended. What has begun for it may end later."""
        self._parents.pop(name, None)

    def begin(self, what: str, request: str) -> Span:
        """A span begins.

        Args:
            what: its name, without the prefix.
            request: whose; of one that nobody has told of it begins a trace.
        """
        parent = self._parents.get(request, Context())
        span = self._tracer.start_span(PREFIX + what, parent, attributes={REQUEST_ID: request})
        is_root = not trace.get_current_span(parent).get_span_context().is_valid
        if is_root and request in self._parents:
            self._parents[request] = trace.set_span_in_context(span, Context())
        return Span(span)
