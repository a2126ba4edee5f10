"""What the proxy publishes about itself at ``/metrics``, under ``lamina_proxy_``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from lamina_kv.push.proxy.engines import Engine
from lamina_kv.push.proxy.routing.words import Reason, Why

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1000.0)


class Outcome(StrEnum):
    """How an engine has dealt with a request."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """It says that the request is wrong: a status from 400 to 499."""
    FAILED = "failed"
    """Not reached, not in time, or a status of 500 and more."""
    INTERRUPTED = "interrupted"
    """In the middle of an answer."""
    CANCELLED = "cancelled"
    """By the client, or as it was not needed any more."""


class Unpushed(StrEnum):
    """Why a request went to a decode engine alone."""

    REQUEST = "request"
    """It cannot be pushed."""
    NO_PREFILL_ENGINE = "no_prefill_engine"
    """None is usable."""
    PREFILL_BUSY = "prefill_busy"
    """The one that was chosen has too much to do: 429."""
    PREFILL_FAILED = "prefill_failed"
    """The one that was chosen did not compute the prompt."""
    PREFILL_REFUSED = "prefill_refused"
    """The one that was chosen says that the request is wrong, and no decode engine says so."""


class _EngineGauges(Collector):
    """What engines are doing at the moment.

    Args:
        engines: see :class:`Metrics`.
    """

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """See :class:`Collector`."""
        names = ("role", "engine")
        usable = GaugeMetricFamily(
            "lamina_proxy_engine_usable",
            "0 while an engine is dead or left alone; nothing while it is drained",
            labels=names,
        )
        drained = GaugeMetricFamily(
            "lamina_proxy_engine_drained",
            "1 while an engine gets no new requests because somebody wants it so",
            labels=names,
        )
        load = GaugeMetricFamily(
            "lamina_proxy_engine_load",
            "Tokens of the requests outstanding at an engine",
            labels=names,
        )
        announced = GaugeMetricFamily(
            "lamina_proxy_announced_blocks",
            "Blocks that an engine holds by its KV events; shared stores are not counted",
            labels=names,
        )
        # One that leaves may have a successor at the same URL.
        found: dict[tuple[str, str], list[Engine]] = {}
        for engine in self._engines:
            found.setdefault((engine.role.value, engine.url), []).append(engine)
        for labels, engines in found.items():
            out = all(engine.drained for engine in engines)
            drained.add_metric(labels, out)
            if not out:
                usable.add_metric(labels, any(engine.usable for engine in engines))
            load.add_metric(labels, sum(engine.load for engine in engines))
            announced.add_metric(labels, sum(engine.announced for engine in engines))
        yield usable
        yield drained
        yield load
        yield announced


class Metrics:
    """See the module. Every proxy has its own registry.

    Args:
        engines: every engine there is at the moment.
    """

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "lamina_proxy_requests",
            "Requests by the status that the client got; 499 if it had left",
            ("route", "status"),
            registry=self._registry,
        )
        self.outstanding = Gauge(
            "lamina_proxy_outstanding", "Requests let in and not ended", registry=self._registry
        )
        self.held_bytes = Gauge(
            "lamina_proxy_held_bytes",
            "Memory that requests take, as it is counted for --max-held-bytes",
            registry=self._registry,
        )
        self.first_byte_seconds = Histogram(
            "lamina_proxy_first_byte_seconds",
            "Time to the first byte of an answer to the client",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.seconds = Histogram(
            "lamina_proxy_request_seconds",
            "Duration of requests",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._exchanges = Counter(
            "lamina_proxy_exchanges",
            "Requests sent to engines",
            ("role", "engine", "outcome"),
            registry=self._registry,
        )
        self.retries = Counter(
            "lamina_proxy_retries",
            "Requests sent to a decode engine once more",
            registry=self._registry,
        )
        self._unpushed = Counter(
            "lamina_proxy_unpushed",
            "Requests that a decode engine had to compute alone",
            ("reason",),
            registry=self._registry,
        )
        self._registry.register(_EngineGauges(engines))
        self._routes = Counter(
            "lamina_proxy_routes",
            "Prompts by who computes them and why, and by why their decode engine was chosen",
            ("why", "chosen"),
            registry=self._registry,
        )
        self._hits = Counter(
            "lamina_proxy_hit_tokens",
            "Prompt tokens that an engine had: as the proxy expected, and as the engine has found",
            ("role", "kind"),
            registry=self._registry,
        )
        self._pace = Gauge(
            "lamina_proxy_prefill_tokens_per_second",
            "At which engines compute prompts, as far as is learnt; 0 while it is not",
            ("role",),
            registry=self._registry,
        )

    def exchange(self, engine: Engine, outcome: Outcome) -> None:
        """An engine is done with a request."""
        self._exchanges.labels(engine.role.value, engine.url, outcome.value).inc()

    def forget(self, engine: Engine) -> None:
        """An engine is gone: its series end."""
        for outcome in Outcome:
            with suppress(KeyError):
                self._exchanges.remove(engine.role.value, engine.url, outcome.value)

    def unpushed(self, reason: Unpushed) -> None:
        """A request goes to a decode engine alone."""
        self._unpushed.labels(reason.value).inc()

    def routed(self, why: Why, chosen: Reason) -> None:
        """A try of a request goes somewhere."""
        self._routes.labels(why.value, chosen.value).inc()

    def hit(self, role: str, expected: int, found: int) -> None:
        """An engine has said how many tokens of a prompt it had; fewer than none are none."""
        self._hits.labels(role, "expected").inc(expected)
        self._hits.labels(role, "found").inc(max(0, found))

    def pace(self, role: str, tokens_per_second: Callable[[], float]) -> None:
        """Publish how fast prompts are computed."""
        self._pace.labels(role).set_function(tokens_per_second)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
