"""What a tier on local disk is configured with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lamina_kv.tiers.config import TierConfig
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

    @property
    def place(self) -> str:
        """See the base class."""
        return str(self.path)
