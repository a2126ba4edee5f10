"""What a request says of its own chunks: how long they are worth keeping, and whether at all.

A client may say it, so every word is bounded: a day for a pin, :data:`MOST_PRIORITY` for a
priority. The words themselves are an engine's (``engines/vllm/regard.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_PIN_SECONDS = 86400.0
"""The longest pin, in seconds: a day, as of the configuration's times."""

MOST_PRIORITY = 3
"""Priorities go from minus this to this; 0 is usual."""


@dataclass(frozen=True, slots=True)
class Regard:
    """One request's word on what it uses and adds.

    Attributes:
        pin_seconds: seconds after each of its uses for which its chunks are not given up for those
            of others; 0 for no pin.
        priority: how much longer than others its chunks live; below 0 less long.
        keep: whether any chunk is saved for it. Without, what it finds is loaded all the same, and
            is no younger for it.
        session: whether the client says that more requests of the same session may come.
        share: whether its chunks go to tiers that keep only what several requests use.
        prefetch: whether all that tiers have of its prompt is brought, however long that takes.
    """

    pin_seconds: float = 0.0
    priority: int = 0
    keep: bool = True
    session: bool = False
    share: bool = False
    prefetch: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.pin_seconds <= MOST_PIN_SECONDS:
            raise ValueError(f"pin_seconds must be 0 to {MOST_PIN_SECONDS:g}")
        if not -MOST_PRIORITY <= self.priority <= MOST_PRIORITY:
            raise ValueError(f"priority must be {-MOST_PRIORITY} to {MOST_PRIORITY}")


USUAL = Regard()
"""That of a request that says nothing."""
