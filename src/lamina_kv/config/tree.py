"""The configuration tree: its keys, defaults and meanings, and nothing else.

Every leaf is annotated with its :class:`~lamina_kv.values.Kind`, which checks it; the
description is its line in the configuration table. What a far tier is configured with stands in
:mod:`lamina_kv.tiers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from lamina_kv.config.memory import memory_bytes
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.config import TierConfig
from lamina_kv.values import (
    ADDRESS,
    GIB,
    MIB,
    PATH,
    PEERS,
    SECONDS,
    SECRET,
    SHARE,
    SIZE,
    TEXT,
    Auto,
    Kind,
    Section,
    WrongValueError,
    choice,
    integer,
    show,
)

TIERS_WORDS = 'a list such as [{"kind": "disk", "path": "/var/lib/lamina", "capacity": "1TiB"}]'
"""What ``tiers`` accepts."""


class LoadConfig(Section):
    """How chunks come from host memory back into the engine."""

    mode: Annotated[
        Literal["auto", "layerwise", "parked"], choice("auto", "layerwise", "parked")
    ] = Field(
        default="auto",
        description="How a load runs. `layerwise`: in the step itself, row by row ahead of the "
        "model. `parked`: between steps, while other requests run. `auto` decides for each load; "
        "on a CPU one in the step is copied before the model begins.",
    )
    when: Annotated[Literal["auto", "always"], choice("auto", "always")] = Field(
        default="auto",
        description="What of a hit is loaded. `always`: all of it, and requests wait until a "
        "shared tier has said what it has. `auto`: what each tier has of it if that is predicted "
        "to be faster than to compute it, by what loads and prefills have taken so far.",
    )
    load_ahead: Annotated[int | Auto, integer(1).auto()] = Field(
        default="auto",
        description="The window: how many rows are in flight ahead of the one that is waited "
        "for. An integer is obeyed exactly, up to all rows; `auto` fills `load.staging`.",
    )
    min_tokens: Annotated[int | Auto, integer(0).auto()] = Field(
        default="auto",
        description="The floor, in tokens, below which nothing is loaded and the tokens are "
        "recomputed. `auto`: one chunk.",
    )
    deadline: Annotated[float, SECONDS] = Field(
        default=30.0,
        description="Seconds that a request may wait for its load, moves from far tiers included. "
        "What is not in host memory by then is recomputed, and so are all tokens of a load between "
        "steps that has not ended by then. With `load.when: auto` the bound is the time that "
        "computing is predicted to take, if that is less, and 1 s at least; 4 % of that for a load "
        "that is to tell whether its tier is still slower than computing. A save, or one move, "
        "that takes longer than `load.deadline` counts as a failure of its tier. A load in the "
        "step cannot be taken back: the engine waits for it, for 30 s at least, and stops when it "
        "does not end.",
    )
    staging: Annotated[int, SIZE] = Field(
        default=256 * MIB,
        description="Bytes of rows that `load_ahead: auto` keeps in flight, for the loads of a "
        "step and for each parked load, on each rank.",
    )


class SaveConfig(Section):
    """What is kept, and how much may be on its way out."""

    tokens: Annotated[Literal["all", "prompt"], choice("all", "prompt")] = Field(
        default="all",
        description="Save the KV cache of prompt and generated tokens, or of the prompt only.",
    )
    max_inflight: Annotated[int, SIZE] = Field(
        default=GIB,
        description="Bytes of saves outstanding, on each rank. Beyond it saves wait for a later "
        "step; what a request has not saved when it ends is not kept. The model never waits "
        "for room.",
    )


class HostConfig(Section):
    """The near tier, in host memory. Engines load from it and save to it."""

    capacity: Annotated[int | Auto, SIZE.auto()] = Field(
        default="auto",
        description="Bytes of host memory in which each rank keeps chunks. `auto`: the smaller "
        "of 4GiB and the rank's share of a quarter of the machine's (or the container's) memory.",
    )

    def capacity_bytes(self, ranks: int) -> int:
        """What ``host.capacity`` comes to on this machine, in bytes for each rank.

        Args:
            ranks: how many ranks of the engine share this machine's memory.
        """
        if isinstance(self.capacity, int):
            return self.capacity
        return min(4 * GIB, memory_bytes() // 4 // ranks)


class BreakerConfig(Section):
    """When a tier that keeps failing is taken out of use, and when it is tried again."""

    failures: Annotated[int, integer(1)] = Field(
        default=3,
        description="Failures in a row, or transfers not ended in time, after which a tier is not "
        "read (or not written) any more. Serving goes on without it.",
    )
    pause: Annotated[float, SECONDS] = Field(
        default=10.0,
        description="Seconds until one transfer tries a tier that is out of use. Doubled with "
        "every try that fails, up to 5 minutes. A far tier is also probed about once a second, and "
        "used again when it works.",
    )


WIRE_SECONDS = 15.0
"""Seconds for which UCX may still carry bytes of a write that has failed: it lets a connection go
that takes none for 10 s, and needs a moment to notice."""

SILENCES = 3
"""Times ``push.silence`` until a peer that is stopped has been found to be: it is dialled when the
first has passed, and the dial takes a second one."""


def least_quarantine(deadline: float, silence: float) -> float:
    """Seconds that ``push.quarantine`` must have, or blocks are used again while a prefill engine
    may still write to them.

    Args:
        deadline: ``push.deadline``; until then a prefill engine may begin a write.
        silence: ``push.silence``.
    """
    return max(deadline, SILENCES * silence) + WIRE_SECONDS


class PushConfig(Section):
    """How a prefill engine hands what it computes to a decode engine, row by row."""

    listen: Annotated[str | None, ADDRESS.nullable()] = Field(
        default=None,
        description="Where decode engines reach this engine, if it is to prefill for them: an "
        "address of this machine and a port; with data parallelism each engine takes the next "
        "port.",
    )
    token: Annotated[str | None, SECRET.nullable()] = Field(
        default=None,
        repr=False,
        description="A secret that both sides must have, and prove to each other without sending "
        "it; it seals what they say then. Make it long and random (`openssl rand -hex 32`). The "
        "cache itself is not encrypted on its way.",
    )
    peers: Annotated[tuple[str, ...], PEERS] = Field(
        default=(),
        description="Prefill engines that this engine lets requests name, each as requests write "
        "it, or by its host alone; of others it computes the prompts itself. Empty: any.",
    )
    deadline: Annotated[float, SECONDS] = Field(
        default=60.0,
        description="Seconds that a decode engine waits for a prompt, and a prefill engine for a "
        "destination. Past it the decode engine computes the prompt itself.",
    )
    silence: Annotated[float, SECONDS] = Field(
        default=5.0,
        description="Seconds without a word after which a peer counts as gone. One whose "
        "device hangs still talks; what it owes ends by `push.deadline`.",
    )
    quarantine: Annotated[float, SECONDS] = Field(
        default=120.0,
        description="Seconds for which blocks are kept that a peer may still write to which has "
        "ended or cannot be reached. For one that is stopped, or hangs, they are kept until it "
        "goes on or ends. At least 15 s more than `push.deadline`, and than three times "
        "`push.silence`.",
    )
    min_tokens: Annotated[int | Auto, integer(0).auto()] = Field(
        default="auto",
        description="The floor, in tokens, below which a decode engine computes what its own cache "
        "and tiers lack, instead of waiting for it. `auto`: one chunk.",
    )
    max_parked: Annotated[float, SHARE] = Field(
        default=0.5,
        description="Share of a decode engine's blocks that prompts on their way may take, those "
        "included that a prefill engine which went away may still write to. Beyond it prompts wait "
        "without blocks, or are computed here.",
    )
    batch: Annotated[int, SIZE] = Field(
        default=MIB,
        description="Bytes that are sent at once: rows are sent when so many bytes of a prompt are "
        "ready, and the rest at the end of its step. Prompts smaller than this take one write.",
    )
    max_inflight: Annotated[int, SIZE] = Field(
        default=64 * MIB,
        description="Bytes on their way to each decode engine, on each rank. Prompts take turns "
        "below it, so a short one waits for little more than this of long ones; what has its turn "
        "to come stays in the engine's blocks.",
    )

    @model_validator(mode="after")
    def _quarantines_are_long_enough(self) -> PushConfig:
        least = least_quarantine(self.deadline, self.silence)
        if self.quarantine < least:
            raise ValueError(
                f"quarantine must be at least {least:g} s with push.deadline {self.deadline:g} and "
                f"push.silence {self.silence:g}, got {self.quarantine:g}: blocks would be used "
                f"again while a prefill engine may still write to them; set push.quarantine to "
                f"{least:g} or lower the others"
            )
        return self


class ObserveConfig(Section):
    """What Lamina writes down about itself, beyond metrics and log lines."""

    timeline: Annotated[Path | None, PATH.nullable()] = Field(
        default=None,
        description="A file that receives a trace of every step, for https://ui.perfetto.dev; it "
        "can be read while the server runs. A file of 64MiB, or of the start before, is kept as "
        "`-earlier`, and a new one begun. Of ranks beyond the first one each, whose name has "
        "`-rank1` and so on in it.",
    )
    trace: Annotated[Path | None, PATH.nullable()] = Field(
        default=None,
        description="A file that receives a line for each request: when it came, its lengths, and "
        "a number for each chunk, hashed with a secret that is kept nowhere; no token and no text. "
        "Begun anew at every start, 1GiB at most; of engines of one server beyond the first one "
        "each, whose name has `-engine1` and so on in it. `lamina-kv bench trace` reads it.",
    )

    @property
    def files(self) -> tuple[tuple[str, Path], ...]:
        """What is to be written, by name, and where."""
        named = ("trace", self.trace), ("timeline", self.timeline)
        return tuple((name, path) for name, path in named if path is not None)


def _mistake(key: str, problem: str, value: object) -> ValidationError:
    error = PydanticCustomError("value_error", "{error}", {"error": problem})
    return ValidationError.from_exception_data(
        "tier", [InitErrorDetails(type=error, loc=(key,), input=value)]
    )


def _parse_tier(value: object) -> object:
    """One entry of ``tiers``, by the class of its kind."""
    if isinstance(value, TierConfig):
        return value
    if not isinstance(value, Mapping):
        raise WrongValueError("a section with the keys of a tier")
    name = value.get("kind")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        problem = f"must be {choice(*KINDS).words}, got {show(name)}"
        raise _mistake("kind", problem if "kind" in value else "is required", name)
    # pydantic merges this call's errors into its own, located below this entry.
    return kind.config.model_validate(dict(value))


class Config(Section):
    """Everything that an operator may decide. ``Config()`` is the sensible default."""

    chunk_tokens: Annotated[int | Auto, integer(1).auto()] = Field(
        default="auto",
        description="Tokens in one chunk, a whole number of the engine's blocks. `auto`: the "
        "smallest multiple of the block size that is at least 64; one block where vLLM keeps "
        "recurrent states in blocks; 512 where there are only states, each overwritten in place; "
        "where a sliding window is overwritten in place, a number of tokens that divides it.",
    )
    identity: Annotated[str, TEXT.auto()] = Field(
        default="auto",
        description="What tells this model's weights, and its draft model's, from all others. "
        "`auto`: a fingerprint of the checkpoints' content. Any other text stands in for it, and "
        "is the operator's promise that it changes whenever the weights do.",
    )
    load: LoadConfig = LoadConfig()
    save: SaveConfig = SaveConfig()
    host: HostConfig = HostConfig()
    tiers: tuple[Annotated[TierConfig, Kind(TIERS_WORDS, _parse_tier, secret=True)], ...] = Field(
        default=(),
        strict=False,  # a list will do
        description="The far tiers, in order of preference. Chunks are copied from host memory to "
        "each of them, and back from the first one that has them.",
    )
    breaker: BreakerConfig = BreakerConfig()
    push: PushConfig | None = Field(
        default=None,
        description="Prefill-to-decode; off unless the section is there. A decode engine needs "
        "`push.token` in it, or `push.peers`: without both it connects to every address that a "
        "request names, and tells whoever listens there how to write to its cache.",
    )
    observe: ObserveConfig = ObserveConfig()

    @field_validator("tiers")
    @classmethod
    def _names_differ(cls, tiers: tuple[TierConfig, ...]) -> tuple[TierConfig, ...]:
        first: dict[str, int] = {}
        for index, tier in enumerate(tiers):
            if (other := first.setdefault(tier.name, index)) != index:
                raise ValueError(
                    f'entries {other} and {index} are both called "{tier.name}"; give each a name '
                    "of its own"
                )
        return tiers


def section_of(annotation: object) -> type[Section] | None:
    """The section that a field of this annotation holds; None for a leaf, and for ``tiers``."""
    union = get_origin(annotation) in (Union, UnionType)
    for candidate in get_args(annotation) if union else (annotation,):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
