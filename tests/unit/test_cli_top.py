"""``lamina-kv top``: one frame of a server, a view that lives through a restart, and mistakes that
are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from lamina_kv.cli import top
from lamina_kv.cli.main import app
from lamina_kv.cli.scrape import Scrape, ScrapeError, metrics_url
from lamina_kv.cli.top_view import SHOWN, frame
from scraped import LABELS, changed, recorded, saying, scrape, serving, without_label

PROXY = "# TYPE lamina_proxy_retries_total counter\nlamina_proxy_retries_total 0.0\n"


def shown(*seen: Scrape, trouble: str = "") -> list[str]:
    """The lines of a frame, on a terminal of 80 columns, with single spaces."""
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(frame(seen, "http://server", trouble))
    lines = console.export_text().splitlines()
    assert "…" not in "".join(lines), "there is room for all of it"
    return [" ".join(line.split()) for line in lines]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["top", *arguments], env={"COLUMNS": "120"})


# -- one frame ---------------------------------------------------------------------------------


def test_a_frame_says_where_prompts_came_from_and_what_tiers_do() -> None:
    lines = shown(scrape("hits"))
    assert lines[0] == "lamina-kv top http://server model"
    assert lines[1].startswith("Lamina 0.")
    text = "\n".join(lines)
    assert "host 448 9.1 %" in text
    assert "computed 4,132 84.3 %" in text
    assert "disk 1.88 MiB 1.88 MiB" in text
    assert "host → disk (write) - 4.38 MiB" in text
    assert "model waited 0.125 ms in 2 steps" in text
    assert "failures none" in text


def test_rates_are_those_between_the_last_two_looks() -> None:
    looks = [scrape("saved", at=at) for at in range(SHOWN - 1)]
    before, after = scrape("saved", at=100), scrape("hits", at=110)
    tokens = after.total("computed_tokens_total") - before.total("computed_tokens_total")
    lines = shown(*looks, before, after)
    (line,) = [line for line in lines if line.startswith("computed")]
    assert f" {tokens / 10:,.0f} " in line


def test_what_needs_somebody_is_on_the_screen() -> None:
    text = " ".join(
        shown(
            changed(
                "hits",
                f'lamina_tier_in_use{{direction="write",{LABELS},tier="disk"}} 0.0',
                f'lamina_failures_total{{{LABELS},kind="fetch_corrupt",tier="disk"}} 3.0',
                f'lamina_waiting_requests{{cause="fetch",{LABELS}}} 7.0',
                f'lamina_pushes_total{{{LABELS},outcome="given_up"}} 2.0',
                f'lamina_pushes_given_up_total{{{LABELS},reason="lost"}} 2.0',
                f'lamina_push_blocks{{{LABELS},state="quarantined"}} 12.0',
                f'lamina_push_peer_in_use{{{LABELS},peer="10.0.0.1:9300"}} 0.0',
            )
        )
    )
    assert "disk 1.88 MiB 1.88 MiB ██████████ 0 B 20 2.85 s not written" in text
    assert "failures fetch_corrupt 3" in text
    assert "for far tiers 7" in text
    assert "given_up 2; given up: lost 2; blocks quarantined 12; NOT USED: 10.0.0.1:9300" in text


def test_of_several_engines_the_sum_is_shown_or_one() -> None:
    two = recorded("hits") + recorded("saved").replace('engine="0"', 'engine="1"')
    with serving(two) as url:
        both, second = invoke(url, "--once"), invoke(url, "--once", "--engine", "1")
        third = invoke(url, "--once", "--engine", "2")
    assert "2 engines" in both.output
    tokens = scrape("saved").total("computed_tokens_total")
    assert f"{tokens + 4132:,.0f}" in both.output
    assert f"{tokens:,.0f}" in second.output
    assert (third.exit_code, "has no engine 2: it has 0, 1" in third.output) == (1, True)


def test_what_was_saved_before_a_prefill_was_measured_is_not_known() -> None:
    saved = f'lamina_saved_seconds_total{{{LABELS},tier="host"}} 0.0'
    (line,) = [line for line in shown(changed("hits", saved)) if line.startswith("host 448")]
    assert line.endswith("-")
    (line,) = [line for line in shown(scrape("hits")) if line.startswith("host 448")]
    assert line.endswith("18.9 ms")


def test_a_store_whose_size_nobody_knows_has_no_fill() -> None:
    capacity = f'lamina_tier_capacity_bytes{{{LABELS},tier="disk"}} 0.0'
    (line,) = [line for line in shown(changed("hits", capacity)) if line.startswith("disk 1.88")]
    assert line == "disk 1.88 MiB ? 0 B ? 2.85 s in use"


# -- watching ----------------------------------------------------------------------------------


def test_a_server_that_goes_away_and_comes_back_is_watched_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[Scrape | ScrapeError] = [
        replace(scrape("hits"), at=2.0),
        ScrapeError("it does not answer", "is it up?"),
        replace(scrape("saved"), at=6.0),  # its counters are lower: it was restarted
    ]

    def look(_: str, __: str | None) -> Scrape:
        if not looks:
            raise KeyboardInterrupt
        following = looks.pop(0)
        if isinstance(following, ScrapeError):
            raise following
        return following

    frames: list[tuple[list[float], str]] = []
    monkeypatch.setattr(top, "fetch", look)
    monkeypatch.setattr(top.time, "sleep", lambda _: None)
    monkeypatch.setattr(
        top, "frame", lambda seen, _, trouble="": frames.append(([s.at for s in seen], trouble))
    )
    monkeypatch.setattr(top.Live, "update", lambda *_, **__: None)
    assert top.run("http://server", top.Watching()) == 0
    assert frames == [([2.0], ""), ([2.0], "it does not answer: is it up?"), ([6.0], "")]
    assert "no answer: it is away" in "\n".join(shown(scrape("hits"), trouble="it is away"))


@pytest.mark.parametrize("once", [True, False])
def test_a_frame_is_drawn_after_some_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, once: bool
) -> None:
    naps: list[float] = []
    monkeypatch.setattr(top.time, "sleep", naps.append)
    picture = tmp_path / "top.svg"
    with serving(recorded("hits")) as url:
        result = invoke(url, "--svg", str(picture), "--interval", "5", *["--once"] * once)
    assert result.exit_code == 0
    assert naps == ([] if once else [5.0] * SHOWN)
    drawn = picture.read_text()
    assert drawn.startswith("<svg")
    assert "url(http" not in drawn
    assert "lamina-kv&#160;top" in drawn
    assert ("▁" in drawn) is not once, "rates need two looks"


# -- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000/metrics"),
        ("http://host:8000/v1", "http://host:8000/metrics"),
        ("https://host/models/a/metrics/", "https://host/models/a/metrics"),
    ],
)
def test_what_people_paste_is_understood(given: str, url: str) -> None:
    assert metrics_url(given) == url


@pytest.mark.parametrize(
    "given",
    [
        *("", "ftp://host", "http://", "host:port", "host:99999", "http://[::1", "http://[one]"),
        *("http://a b", "http://host/a b", "http://host\x1b[2J", "http://user:word@host"),
    ],
)
def test_what_is_no_url_is_told(given: str) -> None:
    with pytest.raises(ScrapeError, match="is no server's URL"):
        metrics_url(given)


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("vllm:num_requests_running 0.0\n", 200, "start the server with LaminaConnector"),
        ("<html>Grafana</html>", 200, "has no figures of vLLM, and none of Lamina"),
        ("go_goroutines 7\n", 200, "is this the URL of a vLLM server?"),
        (PROXY, 200, "is a push proxy"),
        ("lamina_a b c d e\n", 200, "is no page of metrics"),
        ("", 503, "answers 503"),
    ],
)
def test_a_server_without_lamina_is_told(text: str, status: int, message: str) -> None:
    with serving(text, status=status) as url:
        result = invoke(url, "--once")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.output
    assert url in result.output


def test_a_server_that_is_not_there_is_told() -> None:
    with serving(recorded("idle")) as url:
        assert invoke(url, "--once").exit_code == 0
    result = invoke(url, "--once")
    assert result.exit_code == 1
    assert "does not answer" in result.output
    assert "Connection refused" in result.output


@pytest.mark.parametrize(
    "words", [b"-ERR unknown command 'GET'\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab"]
)
def test_a_server_of_another_protocol_is_told(words: bytes) -> None:
    with saying(words) as url:
        result = invoke(url, "--once")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.output.splitlines()
    assert line.startswith(f"{url}/metrics does not answer as an HTTP server does (")
    assert line.endswith("): is this the URL of a vLLM server?")


def test_a_server_of_another_version_is_told() -> None:
    with serving(without_label("hits", "load_mode")) as url:
        result = invoke(url, "--once")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "has another version of Lamina (lamina_config_info lacks load_mode)" in result.output
