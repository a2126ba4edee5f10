"""What a tier on local disk is configured with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lamina_kv.quantities import size_of
from lamina_kv.tiers.config import TierConfig
from lamina_kv.tiers.disk.space import room_at
from lamina_kv.values import ABSOLUTE_PATH, FLAG, SIZE, Auto, choice


class DiskConfig(TierConfig):
    """A tier on local disk."""

    kind: Annotated[Literal["disk"], choice("disk")] = "disk"
    path: Annotated[Path, ABSOLUTE_PATH] = Field(
        examples=["/var/lib/lamina"],
        description="Directory of the store. Made if it is not there; used by one server at a "
        "time.",
    )
    capacity: Annotated[int, SIZE] = Field(
        examples=["100GiB"],
        description="Bytes of disk that each rank keeps chunks in; reserved at the start, where "
        "the file system can.",
    )
    direct: Annotated[bool | Auto, FLAG.auto()] = Field(
        default="auto",
        description="Whether to bypass the page cache. `auto`: where the file system can.",
    )

    def impossible(self) -> str:
        """See the base class. The disk may be too small for one rank's part already."""
        room = room_at(self.path)
        if room is None or room >= self.capacity:
            return ""
        return (
            f"{self.key('capacity')}: {size_of(self.capacity)} for each rank, and {self.path} has "
            f"room for {size_of(room)}: lower it, free some space, or choose another path"
        )

    @property
    def place(self) -> str:
        """See the base class."""
        return str(self.path)
