"""The configuration tree: its keys, defaults and meanings, and nothing else.

Every leaf is annotated with its :class:`~lamina.config.values.Kind`, which checks it; the
description is its line in the configuration table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lamina.config.memory import memory_bytes
from lamina.config.values import (
    ABSOLUTE_PATH,
    ADDRESS,
    FLAG,
    GIB,
    MIB,
    PATH,
    PEERS,
    SECONDS,
    SHARE,
    SIZE,
    TEXT,
    choice,
    integer,
)

Auto = Literal["auto"]


class Section(BaseModel):
    """A part of the tree: immutable, and without room for keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LoadConfig(Section):
    """How what is kept outside comes back into the engine."""

    mode: Annotated[
        Literal["auto", "layerwise", "parked"], choice("auto", "layerwise", "parked")
    ] = Field(
        default="auto",
        description="How a load runs. `layerwise`: in the step itself, row by row ahead of the "
        "model. `parked`: between steps, while other requests run. `auto` decides for each load. "
        "What is on disk is always parked where the engine cannot take a failed load back, as "
        "vLLM cannot.",
    )
    when: Annotated[Literal["auto", "always"], choice("auto", "always")] = Field(
        default="auto",
        description="What of a hit is loaded. `always`: all of it. `auto`: as much as is predicted "
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
        description="Seconds after which a load has failed and its tokens are recomputed, and "
        "after which a save or write is given up. A load from host memory that runs in the step, "
        "and that the engine could not take back, is waited for so long, or for 30 s if that is "
        "longer; then the engine stops.",
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
        description="Bytes of saves outstanding, on each rank. Beyond it fewer chunks are "
        "saved; the model never waits.",
    )


class HostConfig(Section):
    """The tier in host memory."""

    capacity: Annotated[int | Auto, SIZE.auto()] = Field(
        default="auto",
        description="Bytes of host memory that each rank keeps chunks in. `auto`: the smaller "
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


class DiskConfig(Section):
    """The tier on local disk."""

    path: Annotated[Path, ABSOLUTE_PATH] = Field(
        description="Directory of the store. Made if it is not there; used by one server at a "
        "time.",
    )
    capacity: Annotated[int, SIZE] = Field(
        description="Bytes of disk that each rank keeps chunks in; reserved at the start, where "
        "the file system can.",
    )
    direct: Annotated[bool | Auto, FLAG.auto()] = Field(
        default="auto",
        description="Whether to bypass the page cache. `auto`: where the file system can.",
    )
    max_inflight: Annotated[int, SIZE] = Field(
        default=256 * MIB,
        description="Bytes on their way to disk, on each rank. Beyond it chunks wait in host "
        "memory.",
    )
    fetch_ahead: Annotated[int | None, SIZE.nullable()] = Field(
        default=64 * MIB,
        description="Bytes on their way from disk to host memory for requests that wait for their "
        "turn, on each rank; they are read when no load is. `null`: none.",
    )


class BreakerConfig(Section):
    """When a tier that keeps failing is taken out of use, and when it is tried again."""

    failures: Annotated[int, integer(1)] = Field(
        default=3,
        description="Failures in a row, or transfers not ended in time, after which a tier is "
        "not loaded from (or not written to) any more; serving goes on without it.",
    )
    pause: Annotated[float, SECONDS] = Field(
        default=10.0,
        description="Seconds until one transfer tries a tier that is out of use. Doubled with "
        "every try that fails, up to 5 minutes. A load that tries has a tenth of "
        "`load.deadline`.",
    )


class PushConfig(Section):
    """How a prefill engine hands what it computes to a decode engine, row by row."""

    listen: Annotated[str | None, ADDRESS.nullable()] = Field(
        default=None,
        description="Where decode engines reach this engine, if it is to prefill for them: an "
        "address of this machine and a port; with data parallelism each engine takes the next "
        "port.",
    )
    token: Annotated[str | None, TEXT.nullable()] = Field(
        default=None,
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
        "goes on or ends.",
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


class ObserveConfig(Section):
    """What Lamina writes down about itself, beyond metrics and log lines."""

    timeline: Annotated[Path | None, PATH.nullable()] = Field(
        default=None,
        description="A file that receives a trace of every step; of ranks beyond the first one "
        "each, whose name has `-rank1` and so on in it.",
    )
    decisions: Annotated[Path | None, PATH.nullable()] = Field(
        default=None,
        description="A file that receives a line for every decision to load or to compute; "
        "`lamina explain` reads it.",
    )


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
    disk: DiskConfig | None = Field(
        default=None,
        description="The tier on local disk; off unless `disk.path` and `disk.capacity` are given.",
    )
    breaker: BreakerConfig = BreakerConfig()
    push: PushConfig | None = Field(
        default=None,
        description="Prefill-to-decode; off unless the section is there (`push: {}` will do for a "
        "decode engine).",
    )
    observe: ObserveConfig = ObserveConfig()


def section_of(annotation: object) -> type[Section] | None:
    """The section that a field of this annotation holds; None for a leaf."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
