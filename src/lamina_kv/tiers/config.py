"""What every far tier is configured with. A kind of tier adds its own keys in a subclass."""

from __future__ import annotations

from math import inf
from typing import Annotated, Any, Literal

from pydantic import Field

from lamina_kv.plan import COMPUTED, ENGINE, NEAR, OTHER, PUSHED
from lamina_kv.values import MIB, NAME, SECONDS, SIZE, Kind, Section, WrongValueError, choice

_TAKEN = (NEAR, ENGINE, PUSHED, OTHER, COMPUTED, "unfinished")
"""What metrics call host memory and the sources of tokens that are no tiers."""


def _parse_name(value: object) -> object:
    if value in _TAKEN:
        raise WrongValueError("a name that metrics do not use already: not " + ", ".join(_TAKEN))
    return NAME.parse(value)


TIER_NAME = Kind(NAME.words, _parse_name, schema=NAME.schema)

Keep = Literal["all", "shared", "nothing"]
KEEP = choice("all", "shared", "nothing")
"""Which of the chunks in host memory a tier is given."""


def _kind(given: dict[str, Any]) -> str:
    """The default of a tier's name: the kind, which is validated before the name."""
    return str(given.get("kind", ""))


class TierConfig(Section):
    """One entry of ``tiers``. A subclass sets the default of ``kind`` to its name in
    :data:`lamina_kv.tiers.KINDS`."""

    kind: Annotated[str, NAME] = Field(description="What the tier is.")
    name: Annotated[str, TIER_NAME] = Field(
        default_factory=_kind,
        description="The tier's name in metrics, log lines and messages. Tiers of the same kind "
        "need names of their own.",
    )
    max_inflight: Annotated[int, SIZE] = Field(
        default=256 * MIB,
        description="Bytes on their way to the tier, and as many on their way from it, on each "
        "rank. Beyond it chunks wait in host memory, and requests for their turn.",
    )
    keep: Annotated[Keep, KEEP] = Field(
        default="all",
        description="Which chunks are written to the tier. `all`: every chunk that is saved. "
        "`shared`: those that a second request of this engine has used, and those of requests that "
        "say `share`; where a router spreads requests over many engines, that is little. "
        "`nothing`: none, the tier is only read.",
    )

    @property
    def longest_call(self) -> float:
        """Seconds that one call of its store takes at most; infinite if nothing bounds it but
        ``load.deadline``."""
        return inf

    @property
    def place(self) -> str:
        """Where its store is, as ``lamina-kv inspect`` takes it; empty if such stores cannot be
        looked into. Has no password."""
        return ""

    def is_at(self, place: str) -> bool:
        """Whether a path or URL is the place of its store."""
        return bool(self.place) and place.rstrip("/") == self.place

    def impossible(self) -> str:
        """Why the tier cannot be had on this machine, as far as that is seen without opening its
        store; empty if nothing stands against it."""
        return ""

    def key(self, field: str) -> str:
        """How a message about a running tier names one of its keys: ``tiers.disk.path``."""
        return f"tiers.{self.name}.{field}"


class SharedConfig(TierConfig):
    """A tier that several engines use: a store by key, in which other engines find what this one
    writes."""

    timeout: Annotated[float, SECONDS] = Field(
        default=2.0,
        description="Seconds that one call of the store may take. What it has not done by then "
        "counts as a failure of the tier.",
    )

    @property
    def longest_call(self) -> float:
        """See the base class."""
        return self.timeout
