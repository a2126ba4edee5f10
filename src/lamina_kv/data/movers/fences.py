"""When a copy has been made: what a thread, or a device, can wait for."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

FIRST_PAUSE, LONGEST_PAUSE = 0.0001, 0.005
"""Seconds between two looks at a fence that is not waited for without an end; they double."""


class Fence(ABC):
    """Proof that bytes are written. On a CPU it is always passed."""

    @abstractmethod
    def wait(self) -> None:
        """Block the calling thread until the fence has passed (releases the GIL)."""

    @abstractmethod
    def passed(self) -> bool:
        """Whether the fence has passed, without blocking."""

    def passes_within(self, seconds: float) -> bool:
        """Wait for ``seconds`` at most; returns whether the fence has passed. :meth:`wait` has no
        end on a device that hangs."""
        due, pause = time.monotonic() + seconds, FIRST_PAUSE
        while not self.passed():
            if (left := due - time.monotonic()) <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
        return True

    def span(self) -> tuple[float, float] | None:
        """When a device did what the fence is behind, once it has passed: begin and end, in seconds
        on the host's clock (``time.perf_counter``); the same for a fence behind no copy. None if
        copies are made in the call, and on a fence that was not to be timed."""
        return None

    def join(self, other: Fence) -> Fence:
        """A fence that passes when both have, and that tells the time of both together."""
        return BothFences(self, other)


@dataclass(frozen=True, slots=True, eq=False)
class BothFences(Fence):
    """Two fences of which nobody knows which one passes last.

    Attributes:
        first: one.
        second: the other.
    """

    first: Fence
    second: Fence

    def wait(self) -> None:
        """See :class:`Fence`."""
        self.first.wait()
        self.second.wait()

    def passed(self) -> bool:
        """See :class:`Fence`."""
        return self.first.passed() and self.second.passed()

    def passes_within(self, seconds: float) -> bool:
        """See :class:`Fence`."""
        due = time.monotonic() + seconds
        first = self.first.passes_within(seconds)
        return first and self.second.passes_within(max(0.0, due - time.monotonic()))


class CopyFailed(RuntimeError):
    """A copy has failed, and the device may still be at a part of it. The cause is the error.

    Args:
        launched: passes when the device has carried out that part.

    Attributes:
        launched: as given. Until it has passed neither the near pages nor the engine's may be
            used for anything else.
    """

    def __init__(self, launched: Fence) -> None:
        super().__init__("a copy has failed, and a part of it may be under way")
        self.launched = launched
