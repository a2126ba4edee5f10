"""Requests that come at random, and how well they were served."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lamina_kv.bench.settings import PromptSource, TokenIds
from peers.protocol import Arrival, Response
from peers.settings import MixedSettings


def documents(mixed: MixedSettings) -> list[TokenIds]:
    """What is asked about, the same in every run."""
    source = PromptSource(seed=1)
    return [source.prompt(mixed.tokens) for _ in range(mixed.documents)]


def schedule(mixed: MixedSettings, rate: float, share: float, seed: int) -> list[Arrival]:
    """A Poisson process of requests, the same for the same seed.

    The share of requests that ask about a document is met as closely as their number allows, so
    that two schedules differ in their order only.

    Args:
        mixed: the load.
        rate: requests a second.
        share: of requests that ask about a document, chosen evenly; the others share nothing.
        seed: sets it apart from others.
    """
    chance = random.Random(seed)
    source = PromptSource(seed=seed)
    known = documents(mixed)
    about = round(share * mixed.requests)
    asks = [True] * about + [False] * (mixed.requests - about)
    chance.shuffle(asks)
    arrivals = []
    at = 0.0
    for ask in asks:
        at += chance.expovariate(rate)
        prefix = chance.choice(known) if ask else source.prompt(mixed.tokens)
        prompt = prefix + source.prompt(mixed.new_tokens)
        arrivals.append(Arrival(at, prompt, mixed.generated))
    return arrivals


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` percent of them do not exceed.

    Raises:
        ValueError: if there is none.
    """
    if not values:
        raise ValueError("there is no percentile of nothing")
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


@dataclass(frozen=True, slots=True)
class Service:
    """How one schedule was served.

    Attributes:
        label: by whom.
        rate: requests a second that came.
        share: of requests that asked about a document.
        requests: how many came.
        good: of these, how many were served in time.
        seconds: from the beginning of the schedule to the last token.
        first_median: seconds to the first token.
        first_p99: as ``first_median``, exceeded by one of a hundred.
        token_median: seconds from token to token.
        token_p99: as ``token_median``, exceeded by one of a hundred.
        cached: of all tokens of prompts, the share that was not computed.
    """

    label: str
    rate: float
    share: float
    requests: int
    good: int
    seconds: float
    first_median: float
    first_p99: float
    token_median: float
    token_p99: float
    cached: float

    @property
    def goodput(self) -> float:
        """Requests a second that were served in time."""
        return self.good / self.seconds


def service(
    label: str,
    mixed: MixedSettings,
    rate: float,
    share: float,
    arrivals: Sequence[Arrival],
    responses: Sequence[Response],
) -> Service:
    """Judge how a schedule was served.

    Raises:
        ValueError: if there is not one response for each arrival.
    """
    served = list(zip(arrivals, responses, strict=True))
    first = [response.first for response in responses]
    token = [response.per_token for response in responses]
    return Service(
        label=label,
        rate=rate,
        share=share,
        requests=len(served),
        good=sum(
            response.first <= mixed.first_within and response.per_token <= mixed.token_within
            for response in responses
        ),
        seconds=max(arrival.at + response.last for arrival, response in served),
        first_median=percentile(first, 50),
        first_p99=percentile(first, 99),
        token_median=percentile(token, 50),
        token_p99=percentile(token, 99),
        cached=sum(response.cached for response in responses)
        / sum(len(arrival.prompt) for arrival in arrivals),
    )
