"""A server's ``/metrics``: fetched once, and asked by name and labels."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from lamina_kv.observe.metrics import METRICS

PREFIX = "lamina_"
PROXY = "lamina_proxy_"

_VLLM = "vllm:"
_CONFIG = "config_info"
_IS_IT_VLLM = "is this the URL of a vLLM server?"


class ScrapeError(Exception):
    """A server's figures cannot be had.

    Args:
        found: what is the case.
        advice: what to do.
    """

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(f"{found}: {advice}")
        self.found, self.advice = found, advice


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a scrape.

    Attributes:
        labels: its labels.
        value: its value.
    """

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Scrape:
    """What a server says at one moment. Names are as a scrape has them: counters end in ``_total``.
    Those of :func:`parse` are Lamina's, without the prefix.

    Attributes:
        at: when it was fetched, monotonic seconds.
        samples: by name.
    """

    at: float
    samples: Mapping[str, tuple[Sample, ...]]

    def matching(self, name: str, **labels: str) -> Iterator[Sample]:
        """Samples of a name that have these labels."""
        for sample in self.samples.get(name, ()):
            if all(sample.labels.get(label) == value for label, value in labels.items()):
                yield sample

    def total(self, name: str, **labels: str) -> float:
        """The sum of such samples; 0 if there are none."""
        return sum(sample.value for sample in self.matching(name, **labels))

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Likewise, for each value of a label."""
        sums: dict[str, float] = {}
        for sample in self.matching(name, **labels):
            value = sample.labels.get(label, "")
            sums[value] = sums.get(value, 0) + sample.value
        return sums

    def least(self, name: str, **labels: str) -> float | None:
        """The smallest of such samples; None if there are none."""
        return min((sample.value for sample in self.matching(name, **labels)), default=None)

    def mean(self, name: str, **labels: str) -> float | None:
        """The mean of a histogram since the start; None if it has no observation."""
        count = self.total(f"{name}_count", **labels)
        return self.total(f"{name}_sum", **labels) / count if count else None

    def words(self, name: str, label: str) -> tuple[str, ...]:
        """The values that a label has, in order."""
        return tuple(sorted({each.labels.get(label, "") for each in self.samples.get(name, ())}))


def metrics_url(address: str) -> str:
    """The URL of a server's metrics.

    Args:
        address: the server's URL; without a scheme, with ``/v1`` or with ``/metrics`` will do.

    Raises:
        ScrapeError: if it is no URL of a server.
    """
    wrong = ScrapeError(f"{address!r} is no server's URL", "write it as http://127.0.0.1:8000")
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:  # a port or a bracketed host that is none
        raise wrong from error
    if not known or parts.username is not None or " " in address or not address.isprintable():
        raise wrong
    path = parts.path.rstrip("/").removesuffix("/metrics").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}/metrics"


def fetch(url: str, engine: str | None = None, timeout: float = 5.0) -> Scrape:
    """Ask a server for its figures.

    Args:
        url: as :func:`metrics_url` makes it.
        engine: of several engines of the server, the one to look at; None for all.
        timeout: seconds.

    Raises:
        ScrapeError: if they cannot be had.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as error:
        raise ScrapeError(f"{url} answers {error.code} {error.reason}", _IS_IT_VLLM) from error
    except http.client.HTTPException as error:
        raise ScrapeError(
            f"{url} does not answer as an HTTP server does ({type(error).__name__})", _IS_IT_VLLM
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ScrapeError(
            f"{url} does not answer ({reason})", "is the server up, and is this its port?"
        ) from error
    scrape = parse(text, url, time.monotonic())
    if engine is None:
        return scrape
    return _of_engine(scrape, engine, url)


def samples_of(text: str) -> dict[str, tuple[Sample, ...]]:
    """All samples of a scrape, by their names.

    Args:
        text: in Prometheus' text format.

    Raises:
        ValueError: if it is not.
    """
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            samples.setdefault(each.name, []).append(Sample(each.labels, each.value))
    return {name: tuple(each) for name, each in samples.items()}


def parse(text: str, url: str, at: float) -> Scrape:
    """The figures of Lamina in a scrape.

    Args:
        text: in Prometheus' text format.
        url: where it is from, for messages.
        at: when it was fetched, monotonic seconds.

    Raises:
        ScrapeError: if it has none, or those of a version that describes itself otherwise.
    """
    lines = [line for line in text.splitlines() if line.removeprefix("# TYPE ").startswith(PREFIX)]
    try:
        found = samples_of("\n".join((*lines, "")))
    except ValueError as error:
        raise ScrapeError(f"{url} is no page of metrics ({error})", _IS_IT_VLLM) from error
    samples = {name.removeprefix(PREFIX): each for name, each in found.items()}
    if not samples:
        if _VLLM not in text:
            raise ScrapeError(f"{url} has no figures of vLLM, and none of Lamina", _IS_IT_VLLM)
        raise ScrapeError(
            f"{url} has no figures of Lamina",
            "start the server with LaminaConnector in --kv-transfer-config and without "
            "--disable-log-stats",
        )
    if all(f"{PREFIX}{name}".startswith(PROXY) for name in samples):
        raise ScrapeError(f"{url} is a push proxy", "name the URL of an engine's own server")
    lacking = [
        label
        for label in METRICS[_CONFIG].labels
        if any(label not in sample.labels for sample in samples.get(_CONFIG, ()))
    ]
    if lacking:
        raise ScrapeError(
            f"{url} has another version of Lamina ({PREFIX}{_CONFIG} lacks {', '.join(lacking)})",
            "run the lamina-kv that is installed with the server",
        )
    return Scrape(at, samples)


def _of_engine(scrape: Scrape, engine: str, url: str) -> Scrape:
    engines = scrape.words("prompt_tokens_total", "engine")
    if engine not in engines:
        raise ScrapeError(f"{url} has no engine {engine}", f"it has {', '.join(engines)}")
    samples = {name: tuple(scrape.matching(name, engine=engine)) for name in scrape.samples}
    return Scrape(scrape.at, samples)
