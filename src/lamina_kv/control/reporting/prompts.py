"""Where the tokens of each prompt came from, counted once for a request.

A prompt is counted when it is complete, because only then is it certain what became of its load, or
when its request ends before that. Each of its tokens then has one source: it was there when the
model went on behind it (found in the engine's own cache, loaded from a tier, pushed, or brought by
another connector), or the model computed it, or neither happened. So the counters add up to the
prompts. What a request has had before it lost all of its blocks does not count.
"""

from __future__ import annotations

from collections import Counter

from lamina_kv.control.cost import Costs
from lamina_kv.control.requests import RequestRecord
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import COMPUTED, ENGINE, OTHER, PUSHED


class PromptMeter:
    """See the module.

    Args:
        meter: where figures go.
        chunk_tokens: tokens of a chunk. Engines name their own hit in whole blocks, and what they
            have beyond that is less.
        costs: what computing takes, as far as it was measured.

    Attributes:
        sources: tokens that were counted since the start, by source.
        saved: seconds that those of them which were brought from outside of the engine were
            predicted to take.
    """

    def __init__(self, meter: Meter, chunk_tokens: int, costs: Costs) -> None:
        self.sources: Counter[str] = Counter()
        self.saved = 0.0
        self._meter = meter
        self._costs = costs
        self._chunk_tokens = chunk_tokens

    def runs(self, record: RequestRecord, start: int, end: int) -> None:
        """A request is part of a step. Counts its prompt if that is complete by now.

        Args:
            record: the request; its prompt has not been counted.
            start: tokens of it that are there before the step; less than it had if a load has
                failed under it.
            end: tokens that are there after the step.
        """
        if self._is_complete(record):
            self.count(record, record.view.num_prompt_tokens)
            return
        sources = record.sources
        while sources and (sources[-2][1] if len(sources) > 1 else 0) >= start:
            sources.pop()
        reached = 0
        if sources:
            source, reached = sources[-1]
            if reached > start:
                sources[-1], reached = (source, start), start
        if reached < start:
            self._bring(record, reached, start)
        if sources and sources[-1][0] == COMPUTED:
            sources.pop()
        sources.append((COMPUTED, end))

    def _bring(self, record: RequestRecord, reached: int, start: int) -> None:
        """Tokens from ``reached`` to ``start`` were not computed, and are there."""
        offer = record.offer
        brought: list[tuple[str, int]] = [(ENGINE, offer.floor - reached)]
        brought += offer.taken.items()
        brought.append((PUSHED, offer.pushed))
        for source, tokens in brought:
            if (taken := min(tokens, start - reached)) > 0:
                reached += taken
                record.sources.append((source, reached))
        if reached < start:
            within = start - reached < self._chunk_tokens
            record.sources.append((ENGINE if within else OTHER, start))

    def interrupted(self, record: RequestRecord) -> None:
        """A request has lost all of its blocks."""
        if not record.counted and self._is_complete(record):
            self.count(record, record.view.num_prompt_tokens)
        record.sources.clear()

    def ended(self, record: RequestRecord, computed: int) -> None:
        """A request has ended.

        Args:
            record: the request.
            computed: tokens of it that are computed once every step in flight has run.
        """
        if not record.counted:
            prompt = record.view.num_prompt_tokens
            self.count(record, prompt if self._is_complete(record) else min(computed, prompt))

    @staticmethod
    def _is_complete(record: RequestRecord) -> bool:
        """Whether a token is known that was sampled behind the prompt."""
        return bool(record.sources) and record.view.num_tokens > record.view.num_prompt_tokens

    def count(self, record: RequestRecord, end: int) -> None:
        """Count a prompt.

        Args:
            record: its request.
            end: tokens of it, at its beginning, that have come to something.
        """
        record.counted = True
        meter, prompt = self._meter, record.view.num_prompt_tokens
        meter.count("prompt_tokens", prompt)
        if record.may_hit:
            meter.count("lookups", 1)
            meter.count("lookup_tokens", prompt)
        before = 0
        for source, after in record.sources:
            tokens = min(after, end) - before
            if tokens <= 0:
                break
            self.sources[source] += tokens
            if source == COMPUTED:
                meter.count("computed_tokens", tokens)
            else:
                meter.count("hit_tokens", tokens, tier=source)
                saved = self._costs.prefill_seconds(before, before + tokens) or 0.0
                meter.count("saved_seconds", saved, tier=source)
                self.saved += saved if source != ENGINE else 0.0
            before += tokens
        if before < prompt:
            meter.count("unfinished_tokens", prompt - before)
