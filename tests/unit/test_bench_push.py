"""``lamina-kv bench push`` compares what it says: tails from clock readings, last writes in bytes,
and pairs of engines that did what they were to do; and it refuses what it could not measure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lamina_kv.bench import app, network
from lamina_kv.bench.engine import BenchError, Engine
from lamina_kv.bench.network import NetworkError, PacedNetwork, bits_per_second
from lamina_kv.bench.plots import Curve, draw_push
from lamina_kv.bench.push import Pair, Passage, PushSettings, Way
from lamina_kv.bench.samples import Samples
from lamina_kv.bench.serving import Part, Serving
from lamina_kv.bench.shapes import Dtype, LlamaShape

SHAPE = LlamaShape(16, 1024, 8, 128, 128, Dtype.BFLOAT16)
ROW = SHAPE.row_token_bytes
PROMPT = [7] * 300


def settings(tokens: int, step_tokens: int = 2048, shape: LlamaShape = SHAPE) -> PushSettings:
    return PushSettings(shape, (tokens,), step_tokens, 1)


def part(began: float, ended: float, token: float, computed: int) -> Part:
    return Part(began, ended, token, computed, {"remote": computed})


def refusal(*arguments: str) -> str:
    """What the command says, on one line; it must not have started anything."""
    outcome = CliRunner().invoke(app, ["push", *arguments])
    assert outcome.exit_code == 2, outcome.output
    return re.sub(r"[\s│]+", " ", outcome.output)


# -- what is measured ----------------------------------------------------------------------------


def test_the_tail_is_what_lies_between_the_two_engines_forwards() -> None:
    passage = Passage(10.0, part(10.1, 12.0, 12.1, 300), part(12.25, 12.3, 12.4, 1))
    assert passage.first_token == pytest.approx(2.4)
    assert passage.tail == pytest.approx(0.25)


def test_one_engine_alone_has_no_tail() -> None:
    with pytest.raises(ValueError, match="no tail"):
        _ = Passage(10.0, None, part(10.1, 12.0, 12.1, 300)).tail


@pytest.mark.parametrize(
    ("tokens", "step", "computed_last"),
    [
        (256, 2048, 256),
        (2048, 2048, 2048),
        (4096, 2048, 2048),
        (5120, 2048, 1024),
        (2049, 2048, 1),
        (4096, 4096, 4096),
    ],
)
def test_the_last_write_at_the_end_is_the_last_step(
    tokens: int, step: int, computed_last: int
) -> None:
    whole = -(-computed_last // 128) * 128
    assert settings(tokens, step).last_write(Way.AT_END, tokens) == SHAPE.kv_bytes(whole)


def test_a_pull_moves_the_whole_prompt_when_the_prefill_is_over() -> None:
    assert settings(4000).last_write(Way.PULL, 4000) == SHAPE.kv_bytes(4096)


def test_the_last_write_of_a_layerwise_push_is_a_row_or_as_many_as_fill_a_batch() -> None:
    assert settings(1024).last_write(Way.LAYERWISE, 1024) == 1024 * ROW, "4 MiB: one row"
    # 128 tokens of a row are 512 KiB: two rows fill a batch of 1 MiB, and 16 are 8 pairs.
    assert settings(128).last_write(Way.LAYERWISE, 128) == 2 * 128 * ROW
    odd = LlamaShape(15, 1024, 8, 128, 128, Dtype.BFLOAT16)
    assert settings(128, shape=odd).last_write(Way.LAYERWISE, 128) == 128 * ROW, "the 15th"


def test_a_step_that_begins_in_the_middle_of_a_page_sends_that_page() -> None:
    # Tokens 1000 to 1023 are in the eighth page.
    assert settings(1024, 1000).last_write(Way.AT_END, 1024) == SHAPE.kv_bytes(128)


def test_half_of_an_engines_cache_holds_the_longest_prompt() -> None:
    chosen = PushSettings(SHAPE, (256, 16384, 1024), 2048, 1)
    assert chosen.engine_tokens >= 2 * 16384


class Idle(Engine):
    """An engine that answers what it is told to."""

    def __init__(self, answer: Part) -> None:
        self.said: list[Any] = []
        self._answers = answer

    def resume(self) -> None:
        pass

    def begin(self, method: Any, *args: Any, **kwargs: Any) -> None:
        self.said.append((method, *args))

    def answer(self) -> object:
        return self._answers

    def asked(self) -> Any:
        """The parameters of the only request."""
        (parameters,) = (said[2] for said in self.said if said[0] is Serving.serve_part)
        return parameters


def serve(way: Way, computed: tuple[int, int]) -> tuple[Idle, Idle]:
    prefill = Idle(part(1.0, 2.0, 2.1, computed[0]))
    decode = Idle(part(2.2, 2.3, 2.4, computed[1]))
    Pair(way, prefill, decode, "127.0.0.1:9300").serve(PROMPT)
    return prefill, decode


def test_a_push_names_the_prefill_engine_to_the_decode_engine_and_both_the_same_push() -> None:
    prefill, decode = serve(Way.LAYERWISE, (300, 1))
    assert decode.asked()["lamina_push"]["prefill"] == "127.0.0.1:9300"
    assert prefill.asked() == {"lamina_push": {"id": decode.asked()["lamina_push"]["id"]}}


def test_a_pull_gives_the_decode_engine_what_the_prefill_engine_has_answered() -> None:
    prefill, decode = serve(Way.PULL, (300, 1))
    assert prefill.asked()["do_remote_decode"] is True
    assert decode.asked() == {"remote": 300}


@pytest.mark.parametrize("way", [Way.LAYERWISE, Way.AT_END, Way.PULL])
@pytest.mark.parametrize("computed", [(300, 300), (172, 1), (300, 44)])
def test_a_prompt_that_was_not_handed_over_is_no_measurement(
    way: Way, computed: tuple[int, int]
) -> None:
    with pytest.raises(BenchError, match="would not be what it says"):
        serve(way, computed)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_plot_is_a_file(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    points = {256: Samples("a", (0.2, 0.3)), 1024: Samples("b", (0.9, 0.8))}
    curves = [Curve(way.value, points) for way in Way]
    draw_push((curves, curves[:3]), path := tmp_path / f"plot{suffix}")
    assert path.stat().st_size > 1000


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--tokens", "256,many", "--tokens must be numbers with commas between, got '256,many'"),
        ("--tokens", "", "--tokens must be numbers with commas between"),
        ("--tokens", "256,1", "--tokens must be at least 2, got 1"),
        ("--step-tokens", "0", "--step-tokens must be at least 1, got 0"),
        ("--repeat", "0", "--repeat must be at least 1, got 0"),
        ("--layers", "0", "--layers must be at least 1, got 0"),
        ("--link", "1 Gbit", '--link must be a rate such as "1Gbit"'),
        ("--link", "fast", '--link must be a rate such as "1Gbit"'),
        ("--link", "0Gbit", '--link must be a rate such as "1Gbit"'),
        ("--timeline", "x.gif", "x.gif must end in .png or .svg"),
        ("--json", "/missing/x.json", "there is no directory /missing"),
    ],
)
def test_options_that_make_no_sense_are_refused(option: str, value: str, complaint: str) -> None:
    assert complaint in refusal(option, value)


def test_a_prompt_that_does_not_fit_in_memory_is_refused_with_figures() -> None:
    outcome = CliRunner().invoke(app, ["push", "--tokens", str(1 << 24)])
    assert outcome.exit_code == 1
    assert "fewer --tokens" in outcome.output


# -- the wire ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate"), [("1Gbit", 1e9), ("2.5Gbit", 2.5e9), ("400Mbit", 4e8), ("64Kbit", 64e3)]
)
def test_rates_are_those_of_tc(text: str, rate: float) -> None:
    assert bits_per_second(text) == rate


def test_without_root_there_is_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.os, "geteuid", lambda: 1000)
    with pytest.raises(NetworkError, match="takes root"), PacedNetwork(1e9):
        pass


def test_without_its_tools_there_is_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.os, "geteuid", lambda: 0)
    monkeypatch.setattr(network.shutil, "which", lambda tool: None if tool == "tc" else tool)
    with pytest.raises(NetworkError, match=r"needs the command 'tc'.*iproute2"), PacedNetwork(1e9):
        pass


def test_what_was_made_is_removed_when_the_rest_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []

    def run(*command: str) -> None:
        made.append(command)
        if "qdisc" in command:
            raise NetworkError("tc: no such qdisc")

    removed: list[tuple[str, ...]] = []
    monkeypatch.setattr(network.os, "geteuid", lambda: 0)
    monkeypatch.setattr(network.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(network, "_run", run)
    monkeypatch.setattr(
        network.subprocess, "run", lambda command, **_: removed.append(tuple(command))
    )
    with pytest.raises(NetworkError, match="no such qdisc"), PacedNetwork(1e9):
        pass
    assert [command[-1] for command in removed] == [made[0][-1], made[1][-1]]
