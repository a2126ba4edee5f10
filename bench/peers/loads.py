"""The scenarios with many requests: nothing to hit, and a mixed load that comes at random."""

from __future__ import annotations

from collections.abc import Sequence

from lamina_kv.bench.progress import Progress
from lamina_kv.bench.samples import Samples, Target, Unit
from lamina_kv.bench.settings import PromptSource
from peers.arena import Arena, Contender, Seat
from peers.arrivals import Service, documents, schedule, service
from peers.hits import SLACK
from peers.protocol import Arrival
from peers.results import Outcome, Row
from peers.settings import PeersSettings, Scenario
from peers.systems import Store, System


class Loads:
    """Runs these scenarios.

    Args:
        settings: the bench's options.
        arena: starts systems.
        contenders: who takes part.
        progress: where it says what it is doing.
    """

    def __init__(
        self,
        settings: PeersSettings,
        arena: Arena,
        contenders: Sequence[Contender],
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._arena = arena
        self._contenders = tuple(contenders)
        self._progress = progress

    def play(self, wanted: Sequence[Scenario]) -> list[Outcome]:
        """:attr:`Scenario.MISS` and :attr:`Scenario.MIXED`, of which those that are wanted."""
        mixed, shape = self._settings.mixed, self._settings.shape
        store = Store(int(SLACK * mixed.memory * shape.kv_bytes(mixed.documents * mixed.tokens)))
        prompt = mixed.tokens + mixed.new_tokens + mixed.generated + shape.block_size
        outcomes = []
        with self._arena.seats(self._contenders, lambda _: store, mixed.cached * prompt) as seats:
            if Scenario.MISS in wanted:
                outcomes.append(self._misses(seats))
            if Scenario.MIXED in wanted:
                outcomes.append(self._mixed(seats))
            self._progress.say("shutting down")
        return outcomes

    def _misses(self, seats: Sequence[Seat]) -> Outcome:
        mixed = self._settings.mixed
        rates: dict[str, list[float]] = {seat.label: [] for seat in seats}
        source = PromptSource(seed=5)
        for i in range(-1, self._settings.repeat):
            arrivals = [
                Arrival(0.0, source.prompt(mixed.tokens), mixed.generated)
                for _ in range(mixed.cached)
            ]
            for seat in seats:
                which = f"{i + 1} of {self._settings.repeat}" if i >= 0 else "warming up"
                self._progress.say(f"nothing to hit, {seat.label}, {which}")
                responses = seat.serve(arrivals)
                if i >= 0:
                    seconds = max(response.last for response in responses)
                    rates[seat.label].append(len(arrivals) * mixed.tokens / seconds)
        rows = tuple(
            Row(Samples(each.label, tuple(rates[each.label])), each.system.is_peer)
            for each in self._contenders
        )
        targets = []
        plain = _median_of(rows, System.RECOMPUTE)
        if plain is not None:
            for row in rows:
                if row.samples.name != System.RECOMPUTE:
                    limit = 0.98 if row.samples.name == System.LAMINA else None
                    ratio = Samples(
                        f"{row.samples.name} ÷ no connector", (row.samples.median / plain,)
                    )
                    targets.append(Target(ratio, Unit.RATIO, limit, at_most=False))
        return Outcome(
            Scenario.MISS,
            f"Nothing to hit: tokens a second of {mixed.cached} prompts of {mixed.tokens} at once",
            rows,
            targets=tuple(targets),
            more_is_better=True,
        )

    def _mixed(self, seats: Sequence[Seat]) -> Outcome:
        mixed = self._settings.mixed
        services: list[Service] = []
        targets: list[Target] = []
        for share in mixed.shares:
            for rate in mixed.rates:
                arrivals = schedule(mixed, rate, share, seed=100 + len(services))
                alike: list[Service] = []
                for seat in seats:
                    self._progress.say(
                        f"{rate:g} requests a second, {share:.0%} hits, {seat.label}"
                    )
                    if share:
                        self._keep_documents(seat)
                    responses = seat.serve(arrivals)
                    alike.append(service(seat.label, mixed, rate, share, arrivals, responses))
                services += alike
                targets += _judged(alike)
        return Outcome(
            Scenario.MIXED,
            f"Mixed load: {mixed.requests} requests of {mixed.tokens + mixed.new_tokens} tokens, "
            f"{mixed.generated} generated",
            targets=tuple(targets),
            notes=(
                f"Good: first token within {mixed.first_within:g} s and tokens within "
                f"{mixed.token_within:g} s of each other. Hits: the share of requests that ask "
                f"about one of {mixed.documents} documents of {mixed.tokens} tokens; the engine's "
                f"own cache holds {mixed.cached} prompts, and host memory {mixed.memory:g} times "
                f"what the documents take. Each system serves the same schedule "
                f"once; of {mixed.requests} requests, p99 is the "
                f"{'slowest' if mixed.requests <= 100 else 'slowest but some'}.",
            ),
            services=tuple(services),
        )

    def _keep_documents(self, seat: Seat) -> None:
        """Have the documents kept outside the engine, as far as others have driven them out."""
        if seat.contender.system is System.RECOMPUTE:
            return
        for document in documents(self._settings.mixed):
            seat.serve([Arrival(0.0, [*document, 1], 1)], forget=False)
        seat.forget()


def _median_of(rows: Sequence[Row], system: System) -> float | None:
    return next((row.samples.median for row in rows if row.samples.name == system), None)


def _judged(services: Sequence[Service]) -> list[Target]:
    """Lamina's goodput and its slowest first tokens, against the best peer's under one schedule."""
    targets = []
    peers = [one for one in services if one.label not in {System.LAMINA, System.RECOMPUTE}]
    for lamina in services:
        if lamina.label != System.LAMINA or not peers:
            continue
        load = f"{lamina.share:.0%} hits, {lamina.rate:g}/s"
        if best := max(one.goodput for one in peers):
            figure = Samples(f"{load}: goodput ÷ best peer's", (lamina.goodput / best,))
            targets.append(Target(figure, Unit.RATIO, 1.0, at_most=False))
        slowest = min(one.first_p99 for one in peers)
        figure = Samples(f"{load}: TTFT p99 ÷ best peer's", (lamina.first_p99 / slowest,))
        targets.append(Target(figure, Unit.RATIO, 1.0))
    return targets
