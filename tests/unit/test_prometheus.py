"""What servers publish, and that the dashboard and the alerts ask for nothing else.

One process, which imports vLLM, publishes as several API servers do: one scrape asks all of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from lamina_kv.observe.metrics import METRICS, MetricKind
from lamina_kv.push.proxy.engines import Engine, Role
from lamina_kv.push.proxy.metrics import Metrics, Outcome, Unpushed
from lamina_kv.push.proxy.settings import PrefillAddress, Settings
from prometheus_server import Prometheus, program
from promql import Node, PromqlError, parse

DEPLOY = Path(__file__).parents[2] / "deploy"
OF_PROMETHEUS = {"instance", "job"}
"""Labels that Prometheus adds to what it scrapes."""

SERVERS = """
import os, sys
from types import SimpleNamespace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client import multiprocess
from driven_planner import Engine
from lamina_kv.engines.vllm.metrics import LaminaPromMetrics, LaminaStats
from lamina_kv.observe.metrics import METRICS, Meter, MetricKind
from lamina_kv.plan import TierReport
from stores import stored_chunks
from test_push_roles import card

metrics = LaminaPromMetrics(
    SimpleNamespace(kv_transfer_config=SimpleNamespace()),
    {kind: kind for kind in (Counter, Gauge, Histogram)},
    ["model_name", "engine"],
    {0: ["llama", "0"]},
)

def publish(readings):
    metrics.observe(LaminaStats.of(readings).data)

def server(backlog):
    meter = Meter()
    meter.gauge("write_backlog", backlog)
    meter.gauge("tier_used_bytes", 100 * backlog, tier="host")
    meter.count("prompt_tokens", 10)
    publish(meter.drain())

def scrape():
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return generate_latest(registry).decode()

for backlog in (7, 3):
    if not (child := os.fork()):
        server(backlog)
        os._exit(0)
    os.waitpid(child, 0)
print(scrape(), end="")
print("# ---- an engine with all that there is")
tiers = [
    {"kind": "disk", "path": "/store", "capacity": "1GiB"},
    {"kind": "valkey", "url": "valkey://127.0.0.1:6379"},
]
engine = Engine(
    {"push": {"listen": "127.0.0.1:1"}, "tiers": tiers},
    tiers=[TierReport("disk", 10, stored_chunks({}, keys=True)), TierReport("valkey")],
    card=card("me"),
)
publish(engine.begun)
engine.planner.gauges()
publish(engine.readings())
seen = {line.split("{")[0] for line in scrape().splitlines()}
meter = Meter()
for name, metric in METRICS.items():  # what is only there once engines know each other
    if metric.kind is MetricKind.GAUGE and "lamina_" + name not in seen:
        meter.gauge(name, 1, **{label: "x" for label in metric.labels})
publish(meter.drain())
print(scrape(), end="")
"""


@dataclass
class Published:
    """What a scrape has.

    Attributes:
        labels: names of the labels of each metric, as queries call it.
        values: for each metric and label, the values that are there.
    """

    labels: dict[str, set[str]] = field(default_factory=dict)
    values: dict[tuple[str, str], set[str]] = field(default_factory=dict)

    def add(self, text: str) -> None:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.labels.setdefault(sample.name, set()).update(sample.labels)
                for label, value in sample.labels.items():
                    self.values.setdefault((sample.name, label), set()).add(value)


@pytest.fixture(scope="module")
def scrapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Of two servers that share one engine; and of one, with an engine that has all parts."""
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("prometheus")),
        "PYTHONPATH": os.pathsep.join([*sys.path, str(tests), str(tests / "unit")]),
    }
    command = [sys.executable, "-c", SERVERS]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    several, _, one = ran.stdout.partition("# ---- an engine with all that there is\n")
    return several, one


@pytest.fixture(scope="module")
def pages(scrapes: tuple[str, str]) -> list[str]:
    """Of an engine, and of a proxy."""
    prefill = PrefillAddress("http://10.0.0.1:8000", "10.0.0.1:9300")
    settings = Settings(prefill=(prefill,), decode=("http://10.0.0.2:8000",))
    engine = Engine(Role.PREFILL, prefill.url, prefill.push, settings)
    proxy = Metrics([engine])
    proxy.requests.labels("completions", "200").inc()
    proxy.exchange(engine, Outcome.ANSWERED)
    proxy.unpushed(Unpushed.REQUEST)
    return [scrapes[1], proxy.render().decode()]


@pytest.fixture(scope="module")
def published(pages: list[str]) -> Published:
    found = Published()
    for page in pages:
        found.add(page)
    return found


@pytest.mark.slow
def test_gauges_of_several_servers_are_one_series(scrapes: tuple[str, str]) -> None:
    said = [
        (sample.name, *sorted(sample.labels), sample.value)
        for family in text_string_to_metric_families(scrapes[0])
        for sample in family.samples
        if sample.value and not sample.name.endswith("_created")
    ]
    assert sorted(said) == [
        ("lamina_prompt_tokens_total", "engine", "model_name", 20.0),
        ("lamina_tier_used_bytes", "engine", "model_name", "tier", 300.0),
        ("lamina_write_backlog", "engine", "model_name", 3.0),
    ]


def test_what_has_not_happened_yet_reads_as_0(published: Published) -> None:
    """Every counter and histogram has a series before its first event."""
    suffix = {MetricKind.COUNTER: "_total", MetricKind.HISTOGRAM: "_count", MetricKind.GAUGE: ""}
    names = {f"lamina_{metric.name}{suffix[metric.kind]}" for metric in METRICS.values()}
    assert names <= published.labels.keys()
    assert published.values["lamina_hit_tokens_total", "tier"] == {
        *("engine", "host", "disk", "valkey", "push", "other")
    }
    assert "fetch_corrupt" in published.values["lamina_failures_total", "kind"]


# -- dashboard and alerts ----------------------------------------------------------------------


def panels(parts: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield part
        yield from panels(part.get("panels", []))


def dashboard_queries() -> Iterator[tuple[str, str]]:
    board = json.loads((DEPLOY / "grafana/lamina.json").read_text())
    for panel in panels(board["panels"]):
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert asked is not None
            yield variable["name"], f"count by ({asked[2]}) ({asked[1]})"


def rules() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load((DEPLOY / "prometheus/lamina.rules.yml").read_text())["groups"]:
        yield from group["rules"]


QUERIES = [*dashboard_queries(), *((rule["alert"], rule["expr"]) for rule in rules())]


def problems(query: Node, published: Published) -> Iterator[str]:
    """What a query asks for that nobody publishes."""
    for node in query.all():
        for selector in node.selectors():
            known = published.labels.get(selector.name)
            if known is None:
                yield f"no metric {selector.name}"
                continue
            yield from (
                f"{selector.name} has no label {label}"
                for label in node.labels
                if label not in known | OF_PROMETHEUS and not _is_one_side(node, selector, known)
            )
            if selector is not node:
                continue
            for matcher in node.matchers:
                if matcher.label not in known | OF_PROMETHEUS:
                    yield f"{node.name} has no label {matcher.label}"
                values = published.values.get((node.name, matcher.label), set())
                for word in matcher.value.split("|"):
                    fits = any(re.fullmatch(word, value) for value in values)
                    if not (fits or word.startswith("$")):
                        yield f"{node.name} never has {matcher.label} {word}"


def _is_one_side(node: Node, selector: Node, known: set[str]) -> bool:
    """Whether a label by which is matched is one of the other operand alone."""
    return node.kind == "binary" and bool(known) and selector in node.parts[1].selectors()


@pytest.mark.parametrize(("name", "query"), QUERIES, ids=[name for name, _ in QUERIES])
def test_a_query_asks_for_what_is_published(name: str, query: str, published: Published) -> None:
    assert not [*problems(parse(query), published)]


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("lamina_hits_total", "no metric lamina_hits_total"),
        ('lamina_hit_tokens_total{tiers="host"}', "has no label tiers"),
        ('lamina_tier_in_use{direction="read"}', "never has direction read"),
        ("sum by (reason) (lamina_failures_total)", "has no label reason"),
    ],
)
def test_a_query_for_something_else_is_noticed(
    query: str, problem: str, published: Published
) -> None:
    (found, *_) = problems(parse(query), published)
    assert problem in found


@pytest.mark.parametrize(
    "query", ["sum(rate(a[5m])", "rate(a)", "a{b=c}", "sum by tier (a)", "quantile(a)", "a b"]
)
def test_a_query_that_prometheus_would_refuse_is_noticed(query: str) -> None:
    with pytest.raises(PromqlError):
        parse(query)


def test_the_dashboard_is_as_its_script_writes_it() -> None:
    command = [sys.executable, str(DEPLOY / "grafana/dashboard.py")]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    written = (DEPLOY / "grafana/lamina.json").read_text()
    assert written == made, "run deploy/grafana/dashboard.py again"


def test_an_alert_says_what_it_means_and_what_to_do(published: Published) -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 5
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "meaning", "action"}
        query = parse(rule["expr"])
        kept = {each for node in query.all() if node.kind == "aggregation" for each in node.labels}
        for selector in query.selectors():  # without an aggregation all labels are there
            kept |= set() if kept else published.labels[selector.name] | OF_PROMETHEUS
        assert {*re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])} <= kept


def test_the_page_for_operators_has_every_metric_and_every_alert() -> None:
    page = (DEPLOY.parent / "docs/operating.md").read_text()
    for metric in METRICS.values():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        row = f"| `{metric.name}` | {metric.kind.value} | {labels} | {metric.help} |"
        assert row in page.splitlines()
    assert re.findall(r"^\| `(Lamina\w+)`", page, re.MULTILINE) == [r["alert"] for r in rules()]


def test_what_is_provisioned_is_yaml() -> None:
    for folder in ("grafana", "prometheus"):
        for file in (DEPLOY / folder).rglob("*.yml"):
            assert yaml.safe_load(file.read_text()), file


# -- the same by Prometheus itself -------------------------------------------------------------

GRAFANAS = {
    **dict.fromkeys(("$model", "$instance", "$engine", "$proxy"), ".*"),
    "$__rate_interval": "1m",
    "$__range": "1h",
}
"""What Grafana puts in the place of its variables."""

NOTHING_YET = {"Failures"}
"""Panels that are empty as long as nothing fails."""


@contextmanager
def served(pages: list[str]) -> Iterator[list[str]]:
    """Addresses of servers whose ``/metrics`` are these pages."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(self.server.page)  # type: ignore[attr-defined]

        def log_message(self, *_: object) -> None:
            pass

    with ExitStack() as stack:
        addresses = []
        for page in pages:
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            server.page = page.encode()  # type: ignore[attr-defined]
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            addresses.append(f"127.0.0.1:{server.server_port}")
        yield addresses


@pytest.fixture(scope="module")
def prometheus(pages: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has scraped two engines and a proxy, twice each."""
    if program("prometheus") is None:
        pytest.skip("no Prometheus is here (requirements/prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    rules = DEPLOY / "prometheus/lamina.rules.yml"
    with served([pages[0], *pages]) as targets, Prometheus(targets, folder, rules) as asked:
        due = time.monotonic() + 60
        while len(asked.now("count_over_time(up[1m]) > 2")) < len(targets):
            assert time.monotonic() < due, "nothing was scraped"
            time.sleep(0.2)
        yield asked


@pytest.mark.parametrize(("name", "query"), [*dashboard_queries()])
def test_prometheus_answers_what_a_panel_asks(
    name: str, query: str, prometheus: Prometheus
) -> None:
    for variable, value in GRAFANAS.items():
        query = query.replace(variable, value)
    assert "$" not in query
    found = prometheus.now(query)
    assert bool(found) == (name not in NOTHING_YET)


def test_prometheus_evaluates_every_alert(prometheus: Prometheus) -> None:
    def health() -> dict[str, str]:
        (first, *more) = prometheus.ask("rules")["groups"]
        return {r["name"]: r["health"] for group in (first, *more) for r in group["rules"]}

    due = time.monotonic() + 60
    while "unknown" in health().values() and time.monotonic() < due:
        time.sleep(0.2)
    assert health() == {rule["alert"]: "ok" for rule in rules()}


@dataclass(frozen=True)
class Case:
    """When an alert fires.

    Attributes:
        after: when it is looked at, as Prometheus writes it.
        bad: series that make it fire, in promtool's notation, without the labels of an engine.
        good: as many that do not, and are close to it.
        labels: of the alert, beside those of an engine.
        interval: of the series.
    """

    after: str
    bad: dict[str, str]
    good: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)
    interval: str = "1m"


OF_AN_ENGINE = {"instance": "a:8000", "model_name": "llama", "engine": "0"}
DISK = {"tier": "disk"}
FAILS = 'failures_total{tier="disk", kind="fetch_late"}'
USED = 'tier_in_use{tier="disk", direction="fetch"}'
UNWRITTEN = 'writes_skipped_total{tier="disk", reason="evicted"}'
WRITTEN = 'write_seconds_count{tier="disk"}'
COMPUTED = 'loads_skipped_total{reason="slower_than_computing"}'
STUCK = 'push_blocks{state="quarantined"}'
RECEIVED, GIVEN_UP = (f'pushes_total{{outcome="{word}"}}' for word in ("received", "given_up"))
CASES = {
    "LaminaTierOutOfUse": Case(
        "12m", {USED: "0x20"}, {USED: "0x8 1 0x20"}, {**DISK, "direction": "fetch"}
    ),
    "LaminaStoredDataDamaged": Case(
        "10m",
        {'failures_total{tier="disk", kind="fetch_corrupt"}': "0 0 1x20"},
        {'failures_total{tier="disk", kind="fetch_corrupt"}': "7x20"},
        DISK,
    ),
    "LaminaTransfersFail": Case(
        "35m", {FAILS: "0+6x60", USED: "1x60"}, {FAILS: "0+2x60", USED: "1x60"}, DISK
    ),
    "LaminaTierTooSlowToWrite": Case(
        "65m",
        {UNWRITTEN: "0+30x90", WRITTEN: "0+100x90"},
        {UNWRITTEN: "0+10x90", WRITTEN: "0+100x90"},
        DISK,
    ),
    "LaminaTierTooSlowToLoad": Case(
        "65m",
        {COMPUTED: "0+60x90", "lookups_total": "0+100x90"},
        {COMPUTED: "0+40x90", "lookups_total": "0+100x90"},
    ),
    "LaminaModelWaits": Case("35m", {"wait_seconds_sum": "0+9x60"}, {"wait_seconds_sum": "0+3x60"}),
    "LaminaHitRateFell": Case(
        "26h30m",
        {
            'hit_tokens_total{tier="host"}': "0+50x288 14405+5x42",
            "lookup_tokens_total": "0+100x330",
        },
        {
            'hit_tokens_total{tier="host"}': "0+50x288 14420+20x42",
            "lookup_tokens_total": "0+100x330",
        },
        interval="5m",
    ),
    "LaminaPushPeerOutOfUse": Case(
        "7m",
        {'push_peer_in_use{peer="10.0.0.1:9300"}': "0x20"},
        {'push_peer_in_use{peer="10.0.0.1:9300"}': "1 1 1 1 0x20"},
        {"peer": "10.0.0.1:9300"},
    ),
    "LaminaPushBlocksStuck": Case(
        "20m", {STUCK: "4x30"}, {STUCK: "4x10 0 4x20"}, {"state": "quarantined"}
    ),
    "LaminaPushesFail": Case(
        "35m",
        {
            'pushes_given_up_total{reason="deadline"}': "0+20x60",
            RECEIVED: "0+80x60",
            GIVEN_UP: "0+20x60",
        },
        {
            'pushes_given_up_total{reason="cancelled"}': "0+20x60",
            RECEIVED: "0+80x60",
            GIVEN_UP: "0+20x60",
        },
    ),
    "LaminaProxyEngineUnusable": Case(
        "7m",
        {'proxy_engine_usable{role="decode"}': "0x20"},
        {'proxy_engine_usable{role="decode"}': "0 0 0 1 0x20"},
        {"role": "decode"},
    ),
}


def as_promtool_has_it(alert: str, case: Case, *, bad: bool) -> dict[str, Any]:
    (rule,) = (rule for rule in rules() if rule["alert"] == alert)
    own = ", ".join(f'{name}="{value}"' for name, value in OF_AN_ENGINE.items())
    series = []
    for said, values in (case.bad if bad else case.good).items():
        name, _, labels = said.rstrip("}").partition("{")
        labels = f"{own}, {labels}" if labels else own
        series.append({"series": f"lamina_{name}{{{labels}}}", "values": values})
    kept = {*case.labels, *re.findall(r"instance|model_name|engine(?=[,)])", rule["expr"])}
    if alert == "LaminaPushBlocksStuck":  # not aggregated
        kept |= OF_AN_ENGINE.keys()
    labels = {k: v for k, v in {**OF_AN_ENGINE, **case.labels}.items() if k in kept}
    texts = {
        name: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda m: labels[m[1]], text)
        for name, text in rule["annotations"].items()
    }
    fired = {"exp_labels": {**labels, **rule["labels"]}, "exp_annotations": texts}
    return {
        "interval": case.interval,
        "input_series": series,
        "alert_rule_test": [
            {"eval_time": case.after, "alertname": alert, "exp_alerts": [fired] if bad else []}
        ],
    }


def test_every_alert_has_a_case() -> None:
    assert [*CASES] == [rule["alert"] for rule in rules()]


@pytest.mark.parametrize("bad", [True, False], ids=["fires", "quiet"])
@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_when_it_should_and_not_before(
    alert: str, bad: bool, tmp_path: Path
) -> None:
    tool = program("promtool")
    if tool is None:
        pytest.skip("no promtool is here (requirements/prometheus)")
    file = tmp_path / "cases.yml"
    document = {
        "rule_files": [str(DEPLOY / "prometheus/lamina.rules.yml")],
        "evaluation_interval": "1m",
        "tests": [as_promtool_has_it(alert, CASES[alert], bad=bad)],
    }
    file.write_text(json.dumps(document))  # JSON is YAML
    command = [str(tool), "test", "rules", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
