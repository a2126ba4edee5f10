"""What a tier in a shared directory is configured with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lamina_kv.tiers.config import SharedConfig
from lamina_kv.values import ABSOLUTE_PATH, FLAG, choice


class DirectoryConfig(SharedConfig):
    """A tier in a directory that engines of one or several machines share."""

    kind: Annotated[Literal["directory"], choice("directory")] = "directory"
    path: Annotated[Path, ABSOLUTE_PATH] = Field(
        examples=["/mnt/shared/lamina"],
        description="The shared directory: one in a mount that all machines have, not the mount "
        "itself. Made if its parent is there. `lamina-kv sweep` frees its space; engines delete "
        "nothing.",
    )
    direct: Annotated[bool, FLAG] = Field(
        default=False,
        description="Whether to bypass the page cache, where the file system can.",
    )

    @property
    def place(self) -> str:
        """See the base class."""
        return str(self.path)
