"""How long prefills take. Steps are shared: each request is charged by its share of the tokens that
were computed from its first step on, until a token is known that was sampled behind its last."""

from __future__ import annotations

from dataclasses import dataclass

from lamina_kv.control.books import EngineClock
from lamina_kv.control.cost import Costs
from lamina_kv.control.requests import Prefill, RequestRecord
from lamina_kv.plan import LoadMode


@dataclass(slots=True)
class PrefillTimer:
    """See the module.

    Attributes:
        costs: learns what was measured.
        clock: control's clock.
        steps: steps that were planned.
        tokens: tokens that these compute, for all requests.
    """

    costs: Costs
    clock: EngineClock
    steps: int = 0
    tokens: int = 0

    def runs(self, record: RequestRecord, start: int) -> None:
        """A request is part of the step that is being planned.

        Args:
            record: the request.
            start: tokens of it that are there before the step.
        """
        if record.fresh:
            record.fresh = False
            # While rows are loaded the model may wait for them.
            loading = record.offer.loaded > 0 and record.offer.mode is LoadMode.LAYERWISE
            if not loading:
                end = record.view.num_tokens
                record.prefill = Prefill(start, end, self.clock.now, self.steps, self.tokens)
        elif record.prefill is not None and record.view.num_tokens > record.prefill.end:
            self.end(record)

    def planned(self, tokens: int) -> None:
        """A step is planned that computes so many tokens."""
        if tokens:
            self.steps += 1
            self.tokens += tokens

    def end(self, record: RequestRecord) -> None:
        """The prefill of a request is over."""
        if (prefill := record.prefill) is None:
            return
        record.prefill = None
        own, tokens = prefill.end - prefill.start, self.tokens - prefill.tokens
        # Tokens that a session has taken back meanwhile would be charged with others' time.
        if 0 < own <= tokens:
            seconds = (self.clock.now - prefill.began) * own / tokens
            fill = tokens / (self.steps - prefill.steps)
            self.costs.computed(prefill.start, prefill.end, seconds, fill)
