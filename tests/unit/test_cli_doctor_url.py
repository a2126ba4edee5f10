"""``lamina-kv doctor --url``: what a server does, and what to do about it, from one page of its
metrics."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner, Result

from lamina_kv.cli.checks import Finding, Verdict
from lamina_kv.cli.main import app
from lamina_kv.cli.server_checks import read
from scraped import (
    LABELS,
    changed,
    changed_text,
    recorded,
    saying,
    scrape,
    serving,
    without_label,
)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})


def findings(*lines: str, of: str = "hits") -> dict[str, Finding]:
    """By subject, with other values of some series."""
    return {finding.subject: finding for finding in read(changed(of, *lines))}


def test_a_server_that_works_is_described() -> None:
    with serving(recorded("hits")) as url:
        result = invoke("--url", url)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "ok      server: serves model",
        "ok      Lamina: 0.1.0; tiers host, disk; chunks of 64 tokens; load.when always, load.mode "
        "auto; loads, saves",
        "ok      tier host: in use; 896 KiB of 896 KiB used; 28 chunks evicted, on average unused "
        "for 1.07 s",
        "ok      tier disk: in use; 1.88 MiB of 1.88 MiB used; 20 chunks evicted, on average "
        "unused for 2.85 s",
        "ok      hits: of 4,900 prompt tokens engine 6.5 %, host 9.1 %, disk 0.0 %, computed 84.3 "
        "%; 18.9 ms of prefill saved",
        "ok      failures: none",
        "ok      waits: 0 requests wait for a tier now, and 0 chunks to be written; the model "
        "waited 0.0625 ms in a step that loads",
        "0 failed, 0 warnings",
    ]


def test_hits_before_a_prefill_was_measured_are_not_said_to_be_worth_nothing() -> None:
    series = f'lamina_saved_seconds_total{{{LABELS},tier="host"}} 0.0'
    assert findings(series)["hits"].found.endswith("known once a prefill was measured")


def test_before_the_first_prompt_it_says_what_to_send() -> None:
    hits = findings(of="idle")["hits"]
    assert (hits.verdict, hits.found) == (Verdict.GOOD, "no prompt has ended yet")
    assert "twice" in hits.advice


def test_programs_get_json_and_an_exit_status() -> None:
    page = changed_text(
        "hits",
        f'lamina_tier_in_use{{direction="fetch",{LABELS},tier="disk"}} 0.0',
        f'lamina_tier_in_use{{direction="write",{LABELS},tier="disk"}} 0.0',
    )
    with serving(page) as url:
        result = invoke("--url", url, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["failed"], document["will"]) == (1, [])
    (tier,) = [each for each in document["findings"] if each["verdict"] == "failed"]
    assert tier["check"] == "tier disk"
    assert tier["found"].startswith("out of use: not read and not written")
    assert "tried again by itself" in tier["advice"]


@pytest.mark.parametrize(
    ("series", "subject", "found", "advice"),
    [
        (
            f'lamina_misses_total{{{LABELS},reason="evicted"}} 9.0',
            "misses",
            "evicted 9",
            "a larger tier",
        ),
        (
            f'lamina_loads_skipped_total{{{LABELS},reason="slower_than_computing"}} 8.0',
            "not loaded",
            "slower_than_computing 8",
            "make the slow tier faster",
        ),
        (
            f'lamina_writes_skipped_total{{{LABELS},reason="evicted",tier="disk"}} 8.0',
            "writes to disk",
            "8 chunks unwritten; 35 were written",
            "more bandwidth",
        ),
        (
            f'lamina_failures_total{{{LABELS},kind="fetch_corrupt",tier="disk"}} 1.0',
            "failures of disk",
            "fetch_corrupt 1, beside 35 transfers",
            "lamina-kv verify",
        ),
        (
            f'lamina_failures_total{{{LABELS},kind="write_refused",tier="disk"}} 5.0',
            "failures of disk",
            "write_refused 5",
            "it is full",
        ),
        (
            f'lamina_failures_total{{{LABELS},kind="fetch_OddError",tier="disk"}} 5.0',
            "failures of disk",
            "fetch_OddError 5",
            "the server's log names the error",
        ),
    ],
)
def test_what_needs_somebody_is_a_warning_with_advice(
    series: str, subject: str, found: str, advice: str
) -> None:
    assert not [each for each in findings().values() if each.verdict is not Verdict.GOOD]
    (warning,) = [each for each in findings(series).values() if each.verdict is Verdict.WARNING]
    assert warning.subject == subject
    assert found in warning.found
    assert advice in warning.advice


@pytest.mark.parametrize(
    ("series", "subject"),
    [
        (f'lamina_misses_total{{{LABELS},reason="evicted"}} 3.0', "misses"),
        (
            f'lamina_loads_skipped_total{{{LABELS},reason="slower_than_computing"}} 6.0',
            "not loaded",
        ),
        (f'lamina_failures_total{{{LABELS},kind="fetch_gone",tier="disk"}} 900.0', "failures"),
    ],
)
def test_what_is_seldom_or_nobodys_fault_is_none(series: str, subject: str) -> None:
    assert findings(series)[subject].verdict is Verdict.GOOD


def test_what_prompts_lacked_most_is_explained() -> None:
    found = findings(
        f'lamina_misses_total{{{LABELS},reason="never_seen"}} 2.0',
        f'lamina_misses_total{{{LABELS},reason="other_salt"}} 7.0',
    )["misses"]
    assert found.found.endswith("other_salt 7, never_seen 2")
    assert "cache_salt" in found.advice


def test_pushes_that_fail_are_told() -> None:
    pushing = (
        f'lamina_pushes_total{{{LABELS},outcome="received"}} 8.0',
        f'lamina_pushes_total{{{LABELS},outcome="given_up"}} 2.0',
    )
    cancelled = findings(*pushing, f'lamina_pushes_given_up_total{{{LABELS},reason="cancelled"}} 2')
    assert cancelled["pushes"].verdict is Verdict.GOOD
    lost = findings(
        *pushing,
        f'lamina_pushes_given_up_total{{{LABELS},reason="lost"}} 2',
        f'lamina_push_blocks{{{LABELS},state="quarantined"}} 12.0',
        f'lamina_push_peer_in_use{{{LABELS},peer="10.0.0.1:9300"}} 0.0',
    )
    warned = {name for name, each in lost.items() if each.verdict is Verdict.WARNING}
    assert warned == {"pushes", "push blocks", "prefill engine 10.0.0.1:9300"}
    assert lost["pushes"].found == "received 8, given_up 2; given up: lost 2"


def test_engines_that_are_set_up_differently_are_told() -> None:
    other = recorded("hits").replace('engine="0"', 'engine="1"')
    with serving(recorded("hits") + other) as url:
        assert "serves model; 2 engines" in invoke("--url", url).output
    with serving(recorded("hits") + other.replace("0.1.0", "0.0.9")) as url:
        result = invoke("--url", url)
    assert "its engines are set up differently: 0.0.9; " in result.output
    assert "one version" in result.output


@pytest.mark.parametrize(
    ("page", "found", "advice"),
    [
        ("vllm:num_requests_running 0.0\n", "has no figures of Lamina", "start the server with"),
        ("<html>Grafana</html>", "has no figures of vLLM", "is this the URL of a vLLM server?"),
        ("lamina_a b c d e\n", "is no page of metrics", "is this the URL of a vLLM server?"),
        ("lamina_proxy_retries_total 0.0\n", "is a push proxy", "an engine's own server"),
    ],
)
def test_what_is_no_server_with_lamina_is_told(page: str, found: str, advice: str) -> None:
    with serving(page) as url:
        result = invoke("--url", url, "--json")
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)["findings"]
    assert found in finding["found"]
    assert advice in finding["advice"]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("given", ["http://[::1", "http://a b", ""])
def test_what_is_no_url_is_told(given: str, as_json: bool) -> None:
    result = invoke("--url", given, *["--json"] * as_json)
    assert told(result, as_json) == f"{given!r} is no server's URL"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_server_of_another_protocol_is_told(as_json: bool) -> None:
    with saying(b"-ERR unknown command 'GET'\r\n") as url:
        result = invoke("--url", url, *["--json"] * as_json)
    assert "does not answer as an HTTP server does" in told(result, as_json)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("label", ["version", "push"])
def test_a_server_of_another_version_is_told(label: str, as_json: bool) -> None:
    with serving(without_label("hits", label)) as url:
        result = invoke("--url", url, *["--json"] * as_json)
    assert f"lamina_config_info lacks {label}" in told(result, as_json)


def told(result: Result, as_json: bool) -> str:
    """What was found at a server that cannot be asked."""
    assert result.exit_code == 1
    if as_json:
        (finding,) = json.loads(result.stdout)["findings"]
        assert finding["advice"]
        return str(finding["found"])
    found, arrow, advice = " ".join(result.output.split()).partition(" -> ")
    assert arrow
    assert advice.endswith(" 1 failed, 0 warnings")
    return found.removeprefix("failed server: ")


def test_a_server_that_is_not_there_is_told() -> None:
    with serving(recorded("idle")) as url:
        pass
    result = invoke("--url", url)
    assert result.exit_code == 1
    assert "Connection refused" in result.output
    assert "-> is the server up, and is this its port?" in result.output


def test_a_server_and_this_machine_are_not_asked_at_once() -> None:
    result = invoke("--url", "http://127.0.0.1:1", "--speed")
    assert result.exit_code == 2
    assert "--url is given alone" in result.output


def test_the_recorded_pages_need_nobody() -> None:
    for name in ("hits", "idle", "saved"):
        assert all(each.verdict is Verdict.GOOD for each in read(scrape(name)))
