"""The access log: a line for each request, of where it went and what became of it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

log = logging.getLogger("lamina_kv.push.proxy.access")


@dataclass(slots=True)
class Entry:
    """One request's; filled while it is under way.

    Attributes:
        id: of the request.
        method: HTTP's.
        path: as it came, with what is not printable escaped; without the query, which may have
            secrets.
        prefill: URLs of the prefill engines that it was sent to, in order.
        decode: URLs of the decode engines, in order.
        first_byte_ms: until the client was sent the first byte of an engine's answer; None if there
            was none.
    """

    id: str
    method: str
    path: str
    prefill: list[str] = field(default_factory=list)
    decode: list[str] = field(default_factory=list)
    first_byte_ms: float | None = None
    _began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self._began

    def first_byte(self) -> None:
        """The client is sent the first byte now."""
        self.first_byte_ms = self.seconds * 1000

    def write(self, status: int) -> None:
        """Write the line.

        Args:
            status: what the client got; 499 if it had left.
        """
        first = "-" if self.first_byte_ms is None else f"{self.first_byte_ms:.0f}"
        log.info(
            "request=%s method=%s path=%s status=%d ms=%.0f first_byte_ms=%s prefill=%s decode=%s",
            self.id,
            self.method,
            self.path,
            status,
            self.seconds * 1000,
            first,
            ",".join(self.prefill) or "-",
            ",".join(self.decode) or "-",
        )
