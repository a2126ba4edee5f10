"""transformers' continuous batching under test: managers that come and go, what they compute."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.configuration_utils import (
    ContinuousBatchingConfig,
    GenerationConfig,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

from engine.models import VOCABULARY
from lamina_kv.data.movers.cpu import CpuMover
from lamina_kv.engines.hand_off import Phase
from lamina_kv.engines.transformers import attach, attached_to

Tokens = list[int]

PATIENCE = 240.0
"""Seconds after which an answer that has not come is a hang."""


@dataclass
class Engine:
    """One manager, from its start to its stop. Use it as a context manager.

    Attributes:
        model: what it runs.
        batching: how.
        lamina: Lamina's settings; None to do without.
        computed: tokens that it has computed, by request.
    """

    model: Any
    batching: ContinuousBatchingConfig
    lamina: Mapping[str, object] | None = None
    max_new_tokens: int = 6
    computed: dict[str, int] = field(default_factory=dict)
    _names: int = 0

    def __enter__(self) -> Self:
        batching = self.batching
        if self.lamina is not None:
            batching = attach(batching, self.lamina, model=self.model)
        greedy = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=-1
        )
        prepare = ContinuousBatchingIOs.prepare_batch_tensors

        def counted(ios: Any, requests_in_batch: Any, *args: Any, **kwargs: Any) -> None:
            for future in requests_in_batch:
                name = future.state.request_id
                self.computed[name] = self.computed.get(name, 0) + future.query_length
            prepare(ios, requests_in_batch, *args, **kwargs)

        self._patch = patch.object(ContinuousBatchingIOs, "prepare_batch_tensors", counted)
        self._patch.start()
        self.manager = self.model.init_continuous_batching(
            generation_config=greedy, continuous_batching_config=batching
        )
        self.manager.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.stop()
        self.manager.destroy()
        self._patch.stop()

    def submit(self, prompt: Sequence[int], max_new_tokens: int | None = None) -> str:
        """Ask; returns the request's name."""
        self._names += 1
        name = f"r{self._names}"
        self.manager.add_request(list(prompt), request_id=name, max_new_tokens=max_new_tokens)
        return name

    def await_answers(self, names: Sequence[str]) -> dict[str, Tokens]:
        """What was generated for each of ``names``.

        Raises:
            AssertionError: if a request failed or does not end.
        """
        answers: dict[str, Tokens] = {}
        while len(answers) < len(names):
            try:
                output = self.manager.output_router.output_queue.get(timeout=PATIENCE)
            except queue.Empty:
                missing = sorted(set(names) - set(answers))
                raise AssertionError(f"{missing} do not end") from None
            assert output.error is None, output.error
            if output.request_id in names:
                answers[output.request_id] = output.generated_tokens
        return answers

    def turn(self, prompts: Sequence[Sequence[int]]) -> list[Tokens]:
        """Ask all of ``prompts`` at once; what was generated for each of them."""
        names = [self.submit(prompt) for prompt in prompts]
        answers = self.await_answers(names)
        return [answers[name] for name in names]

    def figures(self) -> dict[str, float]:
        """Lamina's, as of now."""
        lamina = attached_to(self.manager)
        assert lamina is not None
        return lamina.figures()

    def rest(self) -> None:
        """Wait until nothing is on its way, as it is while users think."""
        lamina = attached_to(self.manager)
        give_up = time.monotonic() + PATIENCE
        while lamina is not None and (lamina.hand_off.has_work or lamina._planner._requests):
            if time.monotonic() > give_up:
                break
            time.sleep(0.02)

    def settle(self) -> None:
        """Wait until nothing is on its way, and check that nothing is held.

        Raises:
            AssertionError: if something is left.
        """
        self.rest()
        with self.manager.pause():
            assert not self.left()

    def left(self) -> dict[str, object]:
        """What is held, in an engine that does nothing."""
        lamina = attached_to(self.manager)
        assert lamina is not None
        scheduler = self.manager.batch_processor.scheduler
        planner, cache = lamina._planner, scheduler.cache
        books = planner._books
        tiers = [books.catalog.near, *(far.index for far in books.catalog.far.values())]
        found = {
            "requests": lamina.hand_off.count(*Phase) or list(planner._requests),
            "transfers": list(books.transfers.live()),
            "leases on blocks": scheduler._pool.held or planner.leased_blocks,
            "leases on slots": [tier.leased for tier in tiers if tier.leased],
            "requests with blocks": [a.block_table for a in scheduler._allocators],
            "references": [a.ledger.shared_ref_counts for a in scheduler._allocators],
            "lost blocks": _lost_blocks(cache),
        }
        return {what: held for what, held in found.items() if any(_flat(held))}


def _flat(found: object) -> list[object]:
    return list(found) if isinstance(found, list) else [found]


def _lost_blocks(cache: Any) -> int:
    """Blocks that are neither free nor kept for other requests; all requests are over."""
    blocks = cache.pool.num_free_sectors * cache.bytes_per_sector
    for allocator in cache.cache_allocators.values():
        kept = len(allocator.ledger.cached_blocks) + cache.pool.count_free_blocks(allocator.index)
        blocks += kept * allocator.bytes_per_block
    return int(cache.num_sectors * cache.bytes_per_sector - blocks)


class Gate:
    """Where loads from host memory wait, or fail.

    Attributes:
        opened: lets them go on.
        reached: somebody waits.
        error: raised instead.
        seconds: what a row takes.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.seconds = 0.0
        self.opened.set()
        await_near, load = CpuMover.await_near, CpuMover.load

        def gated(mover: CpuMover, *args: Any) -> None:
            """Before engine memory is touched: a load that waits here can be given up."""
            if not self.opened.is_set():
                self.reached.set()
                self.opened.wait(PATIENCE)
            time.sleep(self.seconds)
            await_near(mover, *args)

        def failing(mover: CpuMover, *args: Any, **how: Any) -> Any:
            if self.error is not None:
                raise self.error
            return load(mover, *args, **how)

        monkeypatch.setattr(CpuMover, "await_near", gated)
        monkeypatch.setattr(CpuMover, "load", failing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.set()


def forget(engine: Engine) -> None:
    """Empty the library's own prefix cache, once all is saved, and leave nothing in its blocks that
    could pass for what is to be loaded into them."""
    engine.settle()
    with engine.manager.pause():
        cache = engine.manager.batch_processor.cache
        cache.evict_cached_blocks()
        cache.cache_tensor.fill_(1)


def refused(model: Any, batching: ContinuousBatchingConfig) -> str:
    """What the engine says when it is started and cannot be."""
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=-1),
        continuous_batching_config=batching,
    )
    with pytest.raises(Exception) as raised:  # noqa: PT011 - each case says which
        manager.warmup()
    return str(raised.value)


def load_model(path: Path) -> Any:
    """The model of a checkpoint, ready to run in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@dataclass(frozen=True)
class Workload:
    """Conversations that take turns, and an engine that is too small for them.

    Attributes:
        batching: the engine.
        lamina: Lamina's settings, without far tiers.
        openings: how each conversation begins.
        turns: what is asked, turn by turn: for conversations by number, what their users say.
        restart: the turn before which the engine is restarted.
    """

    batching: ContinuousBatchingConfig
    lamina: dict[str, object]
    openings: tuple[Tokens, ...]
    turns: tuple[dict[int, Tokens], ...]
    restart: int

    @classmethod
    def draw(cls, seed: int) -> Workload:
        """The workload of a seed."""
        rng = random.Random(seed)

        def words(low: int, high: int) -> Tokens:
            return [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]

        page, count, turns = rng.choice((8, 16, 32)), rng.randint(5, 8), rng.randint(3, 4)
        shared = words(40, 120)
        openings = tuple(
            (shared if rng.random() < 0.3 else []) + words(280, 420) for _ in range(count)
        )
        longest = max(map(len, openings)) + turns * 40
        batching = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=-(-longest * 3 // 2 // page),
            max_batch_tokens=rng.choice((48, 128, 512)),
            max_requests_per_batch=rng.choice((2, 4, 16)),
            scheduler_type=rng.choice(("fifo", "prefill_first")),
        )
        lamina: dict[str, object] = {
            "chunk_tokens": rng.choice(("auto", page)),
            "load": {"mode": rng.choice(("auto", "parked", "layerwise")), "when": "always"},
            # Half of the conversations, or all of them; what a turn adds has to fit, or a disk that
            # is slow today would decide what is kept.
            "host": {"capacity": rng.choice(("6MiB", "64MiB"))},
        }
        return cls(
            batching,
            lamina,
            openings,
            tuple(
                {number: words(8, 30) for number in range(count) if turn == 0 or rng.random() < 0.9}
                for turn in range(turns)
            ),
            restart=rng.randint(1, turns - 1),
        )


@dataclass
class Record:
    """What came of a workload.

    Attributes:
        answers: by turn and conversation.
        computed: tokens computed.
        figures: Lamina's, at the end of each engine.
        fewest: tokens that have to be computed if nothing is ever computed twice.
    """

    answers: list[dict[int, Tokens]] = field(default_factory=list)
    computed: int = 0
    figures: list[dict[str, float]] = field(default_factory=list)
    fewest: int = 0

    @property
    def recomputed(self) -> int:
        """Tokens that were computed again."""
        return self.computed - self.fewest


def live_through(model: Any, workload: Workload, lamina: Mapping[str, object] | None) -> Record:
    """Run a workload.

    Args:
        model: what runs.
        workload: what is asked.
        lamina: Lamina's settings; None to do without.
    """
    record = Record()
    history = [list(opening) for opening in workload.openings]
    known = [0 for _ in history]
    parts = workload.turns[: workload.restart], workload.turns[workload.restart :]
    for part in parts:
        with Engine(model, workload.batching, lamina) as engine:
            for turn in part:
                for number, words in turn.items():
                    history[number] += words
                answers = engine.turn([history[number] for number in turn])
                engine.rest()
                record.answers.append(dict(zip(turn, answers, strict=True)))
                for number, answer in record.answers[-1].items():
                    history[number] += answer
                    # The last token of an answer is known, and nobody has computed it.
                    record.fewest += len(history[number]) - 1 - known[number]
                    known[number] = len(history[number]) - 1
            if lamina is not None:
                engine.rest()
                assert not engine.left()
                record.figures.append(engine.figures())
        record.computed += sum(engine.computed.values())
    return record
