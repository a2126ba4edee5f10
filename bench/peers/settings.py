"""Options of ``lamina-kv bench peers``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lamina_kv.bench.settings import require_whole
from lamina_kv.bench.shapes import LlamaShape, require_positive
from peers.systems import System


class Scenario(StrEnum):
    """What is measured."""

    HOST = "host"
    """A hit in host memory."""
    DISK = "disk"
    """A hit on disk, in a process that was started after it had been written."""
    SUFFIX = "suffix"
    """A hit in host memory, and a long suffix to compute."""
    SLOW = "slow"
    """The same through a link that needs as long as the suffix's prefill."""
    SLOWER = "slower"
    """A hit through a link that needs ten times as long as recomputing it."""
    MISS = "miss"
    """Nothing can be hit, and everything is saved."""
    VALKEY = "valkey"
    """A hit of a second engine in a Valkey server; and the same while that is stopped."""
    DIRECTORY = "directory"
    """A hit of a second engine in a shared directory."""
    S3 = "s3"
    """A hit of a second engine in an object store; and the same while that is stopped."""
    MIXED = "mixed"
    """Requests that come at random, some of which hit."""


@dataclass(frozen=True, slots=True)
class MixedSettings:
    """The mixed load.

    Attributes:
        tokens: tokens of a document, the part of a prompt that can be hit.
        new_tokens: tokens of a question, the part that cannot.
        generated: tokens of an answer.
        documents: how many documents there are to be asked about.
        cached: prompts that the engine's own cache holds, fewer than the documents.
        memory: host memory, as a multiple of what all documents take.
        rates: requests a second.
        shares: of requests that ask about a document; the others share nothing.
        requests: of one measurement.
        first_within: seconds to the first token that a good request takes at most.
        token_within: seconds from token to token that it takes at most.

    Raises:
        ValueError: if an option makes no sense; the message names it.
    """

    tokens: int
    new_tokens: int
    generated: int
    documents: int
    cached: int
    memory: float
    rates: tuple[float, ...]
    shares: tuple[float, ...]
    requests: int
    first_within: float
    token_within: float

    def __post_init__(self) -> None:
        require_positive("--mixed-new-tokens", self.new_tokens)
        require_positive("--mixed-generate", self.generated)
        require_positive("--documents", self.documents)
        require_positive("--cached", self.cached)
        require_positive("--requests", self.requests)
        if self.memory <= 0:
            raise ValueError(f"--memory must be positive, got {self.memory:g}")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"--rates must be positive, got {self.rates}")
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"--shares must be between 0 and 1, got {self.shares}")


@dataclass(frozen=True, slots=True)
class PeersSettings:
    """Options of the bench.

    Attributes:
        shape: the model.
        tokens: tokens of the prompt that can be hit.
        new_tokens: tokens of a long suffix.
        step_tokens: tokens that one step computes at most.
        generated: tokens that each request generates; all systems must generate the same.
        repeat: repetitions of each measurement.
        directory: where stores on disk are put, and removed afterwards.
        environments: where systems are installed, and kept.
        systems: what is compared.
        scenarios: in what.
        mixed: the mixed load.
        sweep: whether Lamina is compared with itself under fixed settings instead.

    Raises:
        ValueError: if an option makes no sense; the message names it.
    """

    shape: LlamaShape
    tokens: int
    new_tokens: int
    step_tokens: int
    generated: int
    repeat: int
    directory: Path
    environments: Path
    systems: tuple[System, ...]
    scenarios: tuple[Scenario, ...]
    mixed: MixedSettings
    sweep: bool = False

    def __post_init__(self) -> None:
        require_positive("--new-tokens", self.new_tokens)
        require_positive("--step-tokens", self.step_tokens)
        require_positive("--generate", self.generated)
        require_positive("--repeat", self.repeat)
        for option, tokens in (("--tokens", self.tokens), ("--mixed-tokens", self.mixed.tokens)):
            # LMCache's chunks are of 256 tokens.
            require_whole(option, tokens, max(self.shape.chunk_tokens, 256))
        if System.LAMINA not in self.systems:
            raise ValueError(f"--system must name {System.LAMINA} among others")
        if Scenario.SLOWER in self.scenarios and System.RECOMPUTE not in self.systems:
            raise ValueError(
                f"--scenario {Scenario.SLOWER} needs --system {System.RECOMPUTE}, which it is "
                "measured against"
            )

    @property
    def hit_bytes(self) -> int:
        """Bytes of KV cache that a hit moves."""
        return self.shape.kv_bytes(self.tokens)
