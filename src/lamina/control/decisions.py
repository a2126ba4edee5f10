"""Decisions as they were made, with all that they rested on, so that they can be explained and made
again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from lamina.config import LoadConfig
from lamina.control.cost import Costs
from lamina.control.policy import Decision, LoadPolicy, Situation


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """What of the ``load`` section a decision depends on.

    Attributes:
        mode: ``load.mode``.
        when: ``load.when``.
        min_tokens: ``load.min_tokens``.
        chunk_tokens: tokens of a chunk.
    """

    mode: Literal["auto", "layerwise", "parked"]
    when: Literal["auto", "always"]
    min_tokens: int | Literal["auto"]
    chunk_tokens: int

    @classmethod
    def of(cls, config: LoadConfig, chunk_tokens: int) -> PolicySettings:
        """Those of a configuration."""
        return cls(config.mode, config.when, config.min_tokens, chunk_tokens)

    def policy(self) -> LoadPolicy:
        """The policy that decides so."""
        config = LoadConfig(mode=self.mode, when=self.when, min_tokens=self.min_tokens)
        return LoadPolicy(config, self.chunk_tokens)


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One decision.

    Attributes:
        request_id: the engine's name for the request.
        settings: the rules.
        situation: what was the case.
        costs: what was known.
        declined: why nothing could be loaded whatever the case; empty if it could.
        decision: what was decided.
    """

    request_id: str
    settings: PolicySettings
    situation: Situation
    costs: Costs
    declined: str
    decision: Decision

    def replay(self) -> Decision:
        """The decision, made again by this version of Lamina."""
        return self.settings.policy().decide(self.situation, self.costs, self.declined)

    def explain(self) -> str:
        """A few lines for people."""
        what, made = self.situation, self.decision
        found = ", ".join(
            f"{part.tokens} tokens ({part.size / 1e6:.1f} MB) in {part.tier.value}"
            for part in what.parts
        )
        lines = [
            f"request {self.request_id}: {what.prompt} tokens, the engine had {what.floor}",
            f"  hit: {found or 'none'}",
        ]
        lines += [
            f"  ahead in the queue of {tier.value}: {size / 1e6:.1f} MB"
            for tier, size in what.queued
        ]
        if made.load >= 0:
            lines.append(f"  predicted to load: {made.load * 1e3:.1f} ms")
        if made.compute >= 0:
            lines.append(f"  predicted to compute instead: {made.compute * 1e3:.1f} ms")
        if what.hit_tokens and min(made.load, made.compute) < 0 and not self.declined:
            lines.append("  not everything was measured yet, so the simple rule held")
        if made.tokens:
            lines.append(f"  loaded {made.tokens} tokens, {made.mode.value} ({made.reason})")
        else:
            lines.append(f"  loaded nothing ({made.reason})")
        return "\n".join(lines)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(DecisionRecord)


def encode_decision(record: DecisionRecord) -> bytes:
    """A decision as one line of JSON."""
    return _encoder.encode(record)


def decode_decision(line: bytes) -> DecisionRecord:
    """The decision that :func:`encode_decision` was given.

    Raises:
        ValueError: if the line is none.
    """
    try:
        return _decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a decision that Lamina has written: {error}") from error
