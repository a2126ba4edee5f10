"""What Lamina does for a request is in the request's trace."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from driven_planner import CHUNK, CHUNK_BYTES, FAR, Engine, View, prompt
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lamina_kv.control.transfers import Kind
from lamina_kv.engines.vllm import scheduler_side
from lamina_kv.observe.spans import REQUEST_ID, Spans
from lamina_kv.plan import Outcome

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
LENGTH = 4 * CHUNK + 1


class Traced:
    """An engine whose spans can be looked at."""

    def __init__(self, **given: int) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.spans = Spans(provider.get_tracer("test"))
        extra: dict[str, object] = {"load": {"when": "always"}}
        self.engine = Engine(extra, spans=self.spans, far_slots=100, **given)

    def run(self, view: View, headers: dict[str, str] | None = None) -> None:
        """One request from its arrival to its end."""
        self.spans.request(view.request_id, headers)
        self.engine.planner.arrived(view)
        self.engine.save(view)
        self.spans.forget(view.request_id)
        self.engine.write_all()

    def ended(self, request_id: str) -> dict[str, ReadableSpan]:
        """Spans of a request that have ended, by name."""
        named = {}
        for span in self.exporter.get_finished_spans():
            assert span.attributes is not None
            if span.attributes[REQUEST_ID] == request_id:
                assert span.name not in named, "one of each"
                named[span.name] = span
        return named


def said(span: ReadableSpan) -> dict[str, object]:
    return {
        name.removeprefix("lamina."): value
        for name, value in (span.attributes or {}).items()
        if name != REQUEST_ID
    }


def test_spans_are_in_the_trace_that_the_request_came_with() -> None:
    traced = Traced()
    traced.run(View("first", prompt(LENGTH)), HEADERS)
    spans = traced.ended("first")
    assert set(spans) == {"lamina.lookup", "lamina.save"}
    for span in spans.values():
        assert span.parent is not None
        assert f"{span.parent.trace_id:032x}" == f"{span.context.trace_id:032x}" == TRACE
        assert f"{span.parent.span_id:016x}" == PARENT


def test_without_a_trace_the_lookup_begins_one() -> None:
    traced = Traced()
    for name in ("first", "second"):
        traced.run(View(name, prompt(LENGTH, seed=len(name))))
    traces = set()
    for name in ("first", "second"):
        spans = traced.ended(name)
        lookup, save = spans["lamina.lookup"], spans["lamina.save"]
        assert lookup.parent is None
        assert save.parent is not None
        assert save.parent.span_id == lookup.context.span_id
        assert save.context.trace_id == lookup.context.trace_id
        traces.add(lookup.context.trace_id)
    assert len(traces) == 2, "each request has its own"


def test_what_was_found_moved_and_loaded_is_said() -> None:
    traced = Traced()
    traced.run(View("first", prompt(LENGTH)))
    traced.engine.forget_near()
    traced.run(View("again", prompt(LENGTH)), HEADERS)
    spans = traced.ended("again")
    assert set(spans) == {"lamina.lookup", "lamina.fetch", "lamina.load"}
    assert said(spans["lamina.lookup"]) == {
        "prompt_tokens": LENGTH,
        "engine_tokens": 0,
        "loaded_tokens": 4 * CHUNK,
        "pushed_tokens": 0,
        f"found_tokens.{FAR}": 4 * CHUNK,
        "reason": "hit",
        "mode": "layerwise",
    }
    assert said(spans["lamina.fetch"]) == {"tier": FAR, "chunks": 4, "bytes": 4 * CHUNK_BYTES}
    assert said(spans["lamina.load"]) == {"bytes": CHUNK_BYTES, "waited_seconds": 0.0}
    assert said(traced.ended("first")["lamina.save"])["chunks"] == 4
    assert said(traced.ended("first")["lamina.lookup"])["miss"] == "never seen"


def test_a_failure_is_an_error_with_its_reason() -> None:
    traced = Traced()
    traced.run(View("first", prompt(LENGTH)))
    engine, view = traced.engine, View("again", prompt(LENGTH))
    traced.spans.request("again", HEADERS)
    offer = engine.lookup(view)
    engine.planner.admitted("again", offer.tokens)
    (load,) = engine.step(("again", LENGTH)).loads
    assert "lamina.load" not in traced.ended("again"), "it is under way"
    engine.answer(load.transfer, outcome=Outcome.FAILED, reason="deadline")
    status = traced.ended("again")["lamina.load"].status
    assert (status.is_ok, status.description) == (False, "deadline")


def test_a_request_that_ends_while_it_waits_ends_its_span() -> None:
    traced = Traced()
    view = View("gone", prompt(LENGTH))
    traced.spans.request("gone", HEADERS)
    traced.engine.planner.arrived(view)
    traced.engine.planner.finished("gone", 0, [()])
    (span,) = traced.ended("gone").values()
    assert span.status.description == "ended without blocks"


def test_a_request_that_was_preempted_is_looked_up_in_a_span_of_its_own() -> None:
    traced = Traced()
    engine, view = traced.engine, View("a", prompt(LENGTH))
    traced.spans.request("a", HEADERS)
    for _ in range(2):
        engine.lookup(view)
        engine.planner.admitted("a", engine.lookup(view).tokens)
    names = [span.name for span in traced.exporter.get_finished_spans()]
    assert names == ["lamina.lookup"] * 2


@pytest.mark.parametrize("sampled", ["00", "01"])
def test_the_client_decides_whether_it_is_traced(sampled: str) -> None:
    traced = Traced()
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-{sampled}"}
    traced.run(View("first", prompt(LENGTH)), headers)
    assert bool(traced.exporter.get_finished_spans()) is (sampled == "01")


def test_writes_for_requests_to_come_are_no_spans_of_this_one() -> None:
    traced = Traced()
    traced.run(View("first", prompt(LENGTH)), HEADERS)
    names = {span.name for span in traced.exporter.get_finished_spans()}
    assert f"lamina.{Kind.MOVE_OUT.value}" not in names


@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:4318/v1/traces"])
def test_nobody_traces_unless_vllm_does(endpoint: str | None) -> None:
    config: Any = SimpleNamespace(
        observability_config=SimpleNamespace(otlp_traces_endpoint=endpoint)
    )
    assert isinstance(scheduler_side._spans(config), Spans) is bool(endpoint)
