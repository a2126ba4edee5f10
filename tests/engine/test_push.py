"""Promise 1 for pushes: what a decode engine answers from pages that a prefill engine wrote into
its memory is what one engine answers, whoever is asked first, whatever either has already, and
afterwards both have all their blocks back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import processors
from engine.driver import Answer, Ask, Engine, EngineSpec, Fleet, Start, differences
from engine.models import SHAPES, Checkpoints, mla_block
from engine.pair import Pair, PairSpec, shared_pair
from engine.workload import CHUNK, Tokens, mixed_prompts, prompt, random_tokens

pytestmark = pytest.mark.engine

SMALL_STEPS = {"max_num_batched_tokens": 192}
"""Prompts are prefilled in several chunks."""
MLA = {"dtype": "bfloat16", "block_size": mla_block(), "enable_prefix_caching": False}
BLOCKS = {"linear-attention": 256}
"""Tokens of a block where it is not 32."""
ALIKE = "" if processors.missing() else "Zen 4"
"""A processor whose kernels for bfloat16 round alike wherever a prompt is divided. Those that use
AMX do not, and the last token of a push is computed alone."""

MakePair = Callable[[PairSpec], Pair]


@pytest.fixture
def make_pair(fleet: Fleet) -> MakePair:
    """Shared engines, whose caches are empty."""
    return partial(shared_pair, fleet)


@pytest.fixture
def pair(llama: Path, make_pair: MakePair) -> Pair:
    return make_pair(PairSpec(llama, SMALL_STEPS))


@pytest.fixture
def alone(llama: Path, fleet: Fleet) -> Engine:
    return fleet.get(EngineSpec(llama, options=SMALL_STEPS))


def options_of(model: str) -> dict[str, Any]:
    """One block a step where a state is rounded at the end of each step."""
    block = BLOCKS.get(model, 32)
    return {
        "block_size": block,
        "max_model_len": min(64 * block, 4096),
        "max_num_batched_tokens": block + 16 if model in BLOCKS else 6 * block,
        **SHAPES[model].options,
    }


def expect_pushed(pair: Pair, count: int) -> None:
    """All of so many pushes went well, and everything is given back."""
    pair.settle()
    assert pair.counts() == {"sent": count, "received": count}
    for metrics in pair.metrics().values():
        assert metrics.total("lamina_failures_total") == 0


def expect_served(pair: Pair, count: int) -> None:
    """So many requests had all that a push could bring them, and everything is given back."""
    pair.settle()
    assert pair.served() == count
    assert pair.pushes(pair.decode, "received") > 0
    assert pair.pushes(pair.decode, "given_up") == 0


# -- equal answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("apart", "first"),
    [
        (0, "prefill"),
        (2, "decode"),
        (30, "decode"),
        pytest.param(0, "decode", marks=pytest.mark.slow),
        pytest.param(2, "prefill", marks=pytest.mark.slow),
        pytest.param(30, "prefill", marks=pytest.mark.slow),
    ],
)
def test_lengths(pair: Pair, alone: Engine, first: str, apart: int) -> None:
    """From one block to many steps; thirty steps are more than a prompt takes."""
    asks = [Ask(prompt(700 + n, n)) for n in (2, 31, 32, 33, 64, 65, 192, 193, 700, 1900)]
    expected = alone.generate(asks)
    answers = [pair.push([ask], first=first, apart=apart)[0] for ask in asks]
    assert not differences(answers, expected)
    assert [answer.cached for answer in answers] == [len(ask.tokens) - 1 for ask in asks]
    expect_pushed(pair, len(asks))


def test_a_prompt_of_one_token(pair: Pair, alone: Engine) -> None:
    """Nothing is needed of such a push; the prefill engine forgets it."""
    ask = Ask((7,))
    for first in ("prefill", "decode"):
        assert not differences(pair.push([ask], first=first), [alone.ask(ask)])
    pair.settle()
    assert pair.counts().keys() <= {"stopped"}


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_many_at_once(pair: Pair, alone: Engine, first: str) -> None:
    asks = [Ask(tokens) for tokens in mixed_prompts(71, count=30)]
    expected = alone.generate(asks)
    answers = pair.push(asks, first=first, apart=3)
    assert not differences(answers, expected)
    assert [answer.cached for answer in answers] == [len(ask.tokens) - 1 for ask in asks]
    expect_served(pair, len(asks))


def test_a_prefix_that_only_prefill_has(pair: Pair, alone: Engine) -> None:
    """It goes out at once."""
    ask = Ask(prompt(720, 15 * CHUNK))
    expected = alone.ask(ask)
    pair.prefill.ask(replace(ask, tokens=ask.tokens[: 9 * CHUNK + 5], max_tokens=1))
    (answer,) = pair.push([ask])
    assert not differences([answer], [expected])
    assert answer.cached == len(ask.tokens) - 1
    hit = pair.prefill.metrics().total("lamina_hit_tokens_total", tier="engine")
    assert hit >= 9 * CHUNK
    expect_pushed(pair, 1)


@pytest.mark.parametrize(("tier", "mode"), [("host", "layerwise"), ("disk", "parked")])
def test_a_prefix_in_the_tiers_of_prefill(
    llama: Path, make_pair: MakePair, alone: Engine, tmp_path: Path, tier: str, mode: str
) -> None:
    tiers: dict[str, Any] = {"load": {"mode": mode, "min_tokens": 1}}
    if tier == "disk":
        tiers["host"] = {"capacity": "2400KiB"}  # of objects not much more than the prompt has
        tiers["tiers"] = [{"kind": "disk", "path": str(tmp_path / "store"), "capacity": "64MiB"}]
    pair = make_pair(PairSpec(llama, SMALL_STEPS, tiers=tiers))
    ask = Ask(prompt(721, 15 * CHUNK))
    expected = alone.ask(ask)
    for known in (13 * CHUNK + 5, 15 * CHUNK):  # also when all of it is there
        pair.forget_all()
        pair.prefill.ask(replace(ask, tokens=ask.tokens[:known], max_tokens=1))
        if tier == "disk":
            pair.prefill.ask(Ask(prompt(724, 15 * CHUNK), max_tokens=1))  # has the host to itself
        pair.prefill.forget()
        before = pair.prefill.metrics()
        (answer,) = pair.push([ask])
        assert not differences([answer], [expected])
        assert answer.cached == len(ask.tokens) - 1
        pair.settle()
        assert pair.prefill.metrics().since(before, "lamina_hit_tokens_total", tier=tier) > 0
    expect_pushed(pair, 2)


def test_what_decode_has_is_not_sent(pair: Pair, alone: Engine) -> None:
    """In its own cache, and then in its tiers."""
    ask = Ask(prompt(722, 15 * CHUNK))
    expected = alone.ask(ask)
    pair.decode.ask(replace(ask, tokens=ask.tokens[: 9 * CHUNK + 5], max_tokens=1))
    before = pair.prefill.metrics()
    for tier in ("engine", "host"):
        if tier == "host":
            pair.decode.forget()
        then = pair.decode.metrics()
        (answer,) = pair.push([ask])
        assert not differences([answer], [expected])
        assert answer.cached == len(ask.tokens) - 1
        pair.settle()
        hit = pair.decode.metrics().since(then, "lamina_hit_tokens_total", tier=tier)
        assert hit >= 9 * CHUNK
    partly = pair.prefill.metrics()
    pair.forget_all()
    pair.push([ask])
    expect_pushed(pair, 3)
    whole = pair.prefill.metrics().since(partly, "lamina_push_bytes_total")
    assert 0 < partly.since(before, "lamina_push_bytes_total") < whole


def hold_conversations(
    pair: Pair, alone: Engine, rng: random.Random, block: int, turns: int
) -> tuple[list[str], int]:
    """Random conversations over both; returns what went wrong, and how many requests both were
    asked."""
    shared = random_tokens(rng, 5 * block)
    talks: list[Tokens] = [
        shared[: rng.randrange(len(shared))] + random_tokens(rng, rng.randrange(1, 6 * block))
        for _ in range(5)
    ]
    wrong: list[str] = []
    both = 0
    for _ in range(turns):
        chosen = rng.sample(range(len(talks)), rng.choice((1, 1, 2, 4)))
        asks = [Ask(talks[index], max_tokens=rng.choice((1, 4, 12))) for index in chosen]
        expected = _fresh(alone, asks)
        dice = rng.random()
        if dice < 0.15:
            answers = pair.decode.generate(asks)
        else:
            if dice < 0.3:
                pair.prefill.generate([replace(ask, max_tokens=1) for ask in asks])
            first = rng.choice(("prefill", "decode"))
            answers = pair.push(asks, first=first, apart=rng.choice((0, 1, 3, 20)))
            both += len(asks)
        wrong += differences(answers, expected)
        for index, answer in zip(chosen, answers, strict=True):
            talks[index] += answer.tokens + random_tokens(rng, rng.randrange(1, 3 * block))
            if len(talks[index]) > min(24 * block, 3000):
                talks[index] = random_tokens(rng, rng.randrange(1, 5 * block))
        if rng.random() < 0.5:
            pair.settle()
            rng.choice((pair.prefill, pair.decode)).forget()
    return wrong, both


def _fresh(alone: Engine, asks: Sequence[Ask]) -> list[Answer]:
    """Where a prefix cache resumes decides how arithmetic rounds: every answer from nothing."""
    alone.forget()
    return alone.generate(asks)


@pytest.mark.parametrize(
    ("model", "turns"),
    [
        ("llama", 15),
        pytest.param("interleaved-windows", 6, marks=pytest.mark.slow),
        pytest.param("short-convolution", 6, marks=pytest.mark.slow),
        pytest.param("linear-attention", 5, marks=pytest.mark.slow),
        pytest.param("alternating-windows", 6, marks=pytest.mark.slow),
    ],
)
def test_conversations(
    checkpoints: Checkpoints, fleet: Fleet, make_pair: MakePair, model: str, turns: int
) -> None:
    path, options = checkpoints.model(model), options_of(model)
    processor = ALIKE if options.get("dtype") == "bfloat16" else ""
    lamina = {"host": {"capacity": "256MiB"}}
    pair = make_pair(PairSpec(path, options, lamina=lamina, processor=processor))
    alone = fleet.get(EngineSpec(path, options=options, processor=processor))
    rng = random.Random(9)
    wrong, both = hold_conversations(pair, alone, rng, BLOCKS.get(model, 32), turns)
    assert not wrong
    expect_served(pair, both)


# -- shapes --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (2, 1),
        pytest.param(1, 2, marks=pytest.mark.soak),
        pytest.param(2, 2, marks=pytest.mark.soak),
    ],
)
def test_ranks(
    llama: Path, fleet: Fleet, start: Start, alone: Engine, mine: int, theirs: int
) -> None:
    """Each sends its heads to whoever has them."""
    asks = [Ask(tokens) for tokens in mixed_prompts(72, count=12)]
    expected = alone.generate(asks)
    spec = PairSpec(
        llama,
        SMALL_STEPS,
        prefill={"tensor_parallel_size": mine},
        decode={"tensor_parallel_size": theirs},
    )
    prefill, decode = spec.engines()
    pair = Pair(start(prefill), start(decode), spec.address)
    for first in ("prefill", "decode"):
        assert not differences(pair.push(asks, first=first, apart=1), expected)
        pair.settle()
        pair.forget_all()
    expect_served(pair, 2 * len(asks))


@pytest.mark.parametrize(
    ("model", "options", "mine", "theirs"),
    [
        ("llama", SMALL_STEPS, 1, 1),
        pytest.param("mla", MLA, 1, 1, marks=pytest.mark.slow),
        pytest.param("mla", MLA, 2, 1, marks=pytest.mark.slow),
        pytest.param("mla", MLA, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_bytes(
    checkpoints: Checkpoints,
    make_pair: MakePair,
    model: str,
    options: dict[str, Any],
    mine: int,
    theirs: int,
) -> None:
    """Blocks of the decode engine are those of the prefill engine."""
    ranks = [{"tensor_parallel_size": count} if count > 1 else {} for count in (mine, theirs)]
    pair = make_pair(PairSpec(checkpoints.model(model), options, prefill=ranks[0], decode=ranks[1]))
    ask = Ask(prompt(740, 700), max_tokens=4)
    pushes = [pair.name_push()]
    (there,) = pair.submit_decode([ask], pushes)
    (here,) = pair._submit(pair.prefill, [replace(ask, push={"id": pushes[0]}, max_tokens=900)])
    pair.step_until(lambda: bool(pair.decode.progress()[there]))
    sent = pair.prefill.pages(here)
    whole = len(ask.tokens) // options.get("block_size", 32)
    arrived = pair.decode.pages(there)
    of_one_rank = len(sent[0]) // mine
    for source, target in zip(sent[:whole], arrived[:whole], strict=True):
        assert source == source[:of_one_rank] * mine
        assert target == source[:of_one_rank] * theirs
    pair.abort(pair.prefill, [here])
    (answer,) = pair.finish([there])
    assert answer.cached == len(ask.tokens) - 1
    expect_pushed(pair, 1)


@pytest.mark.slow
def test_a_draft_model(
    checkpoints: Checkpoints, llama: Path, make_pair: MakePair, alone: Engine
) -> None:
    """Its cache is pushed like any; what drafts need computed anew is not."""
    drafts = {"model": str(checkpoints.model("llama", 1)), "num_speculative_tokens": 3}
    pair = make_pair(PairSpec(llama, {**SMALL_STEPS, "speculative_config": drafts}))
    asks = [Ask(tokens, max_tokens=24) for tokens in mixed_prompts(73, count=12)]
    expected = alone.generate(asks)
    assert not differences(pair.push(asks), expected)
    expect_served(pair, len(asks))


def test_vllm_counts_what_was_pushed_as_a_peers(pair: Pair) -> None:
    before = pair.decode.metrics()
    pair.push([Ask(prompt(760, 193))])
    pair.settle()
    after, cached = pair.decode.metrics(), "vllm:prompt_tokens_cached_by_source_total"
    assert after.since(before, cached, source="p2p") == 192
    assert after.since(before, cached, source="external_unspecified") == 0
