"""What a mover is: the only code that touches an engine's cache memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lamina.geometry import CacheGeometry

Indices = npt.NDArray[np.int64]
"""Page indices: one-dimensional, int64."""


class Fence(ABC):
    """Proof that bytes are written. On a CPU it is always passed."""

    @abstractmethod
    def wait(self) -> None:
        """Block the calling thread until the fence has passed (releases the GIL)."""

    @abstractmethod
    def passed(self) -> bool:
        """Whether the fence has passed, without blocking."""


class Mover(ABC):
    """Copies pages of one row between the engine's blocks and host memory.

    ``load`` and ``save`` are called from pipeline threads, several at a time for different
    rows or disjoint pages; they must be thread safe and release the GIL while copying. There is
    no per-block Python loop on this path.

    Host pages are given as a uint8 tensor of shape ``(pages, page_bytes)``, C-contiguous, in
    memory from :meth:`allocate_host` (pinned where the device wants that).
    """

    @abstractmethod
    def __init__(self, geometry: CacheGeometry, allocations: Sequence[torch.Tensor]) -> None:
        """Bind to an engine's cache.

        Args:
            geometry: where pages are.
            allocations: one flat uint8 tensor for each backing allocation, on the device.

        Raises:
            ValueError: if an allocation is smaller than the geometry says.
        """

    @abstractmethod
    def allocate_host(self, size: int) -> torch.Tensor:
        """A flat uint8 host tensor of ``size`` bytes, page aligned, fit for fast copies."""

    @abstractmethod
    def load(
        self, row: int, source: torch.Tensor, source_pages: Indices, blocks: Indices
    ) -> Fence:
        """Copy ``source[source_pages[i]]`` into block ``blocks[i]`` of ``row``.

        Returns:
            A fence that passes when the bytes are in the engine; ``source`` may be reused then.
        """

    @abstractmethod
    def save(
        self,
        row: int,
        blocks: Indices,
        target: torch.Tensor,
        target_pages: Indices,
        after: Fence,
    ) -> Fence:
        """Copy block ``blocks[i]`` of ``row`` into ``target[target_pages[i]]``.

        Args:
            row: the row.
            blocks: engine block ids.
            target: host pages.
            target_pages: which of them to fill.
            after: the fence behind which the row's bytes are written; a save cannot be
                made without one.

        Returns:
            A fence that passes when the engine's blocks have been read and ``target`` is filled.
        """

    @abstractmethod
    def fence_compute(self) -> Fence:
        """A fence behind everything the engine has submitted so far on the calling thread."""

    @abstractmethod
    def hold_compute(self, fence: Fence) -> None:
        """Make what the engine submits next run after ``fence``, without stalling the host if
        the device can order it itself."""

    @abstractmethod
    def close(self) -> None:
        """Wait for copies in flight and release what was allocated."""


def make_mover(geometry: CacheGeometry, allocations: Sequence[torch.Tensor]) -> Mover:
    """The mover for the device that holds ``allocations``.

    Raises:
        ValueError: if there is no mover for that device.
    """
    device = allocations[0].device.type
    if device == "cpu":
        from lamina.data.movers.cpu import CpuMover

        return CpuMover(geometry, allocations)
    if device == "cuda":
        from lamina.data.movers.cuda import CudaMover

        return CudaMover(geometry, allocations)
    raise ValueError(f"no mover for device {device!r}: Lamina moves pages of 'cpu' and 'cuda'")
