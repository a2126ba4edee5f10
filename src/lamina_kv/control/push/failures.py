"""What is said in the log of pushes that have failed: all that a prefill engine owed fails in one
moment when it dies, and one line says so."""

from __future__ import annotations

import logging
from dataclasses import dataclass

QUIET_SECONDS = 10.0
"""Least time between two lines about one prefill engine: its breaker says whether it goes on."""


@dataclass(slots=True)
class _Failed:
    """Pushes of one prefill engine of which nothing was said yet.

    Attributes:
        request: the first one's request.
        reason: why that has failed.
        count: how many there are.
    """

    request: str
    reason: str
    count: int = 0


class Failures:
    """See the module. A part of :class:`~lamina_kv.control.push.target.PushTarget`.

    Args:
        log: where it is said.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._unsaid: dict[str, _Failed] = {}
        self._said: dict[str, float] = {}

    def add(self, address: str, request: str, reason: str) -> None:
        """A push has failed.

        Args:
            address: the prefill engine's.
            request: the request's id.
            reason: why.
        """
        self._unsaid.setdefault(address, _Failed(request, reason)).count += 1

    def tick(self, now: float) -> None:
        """Say what has failed since it was last said.

        Args:
            now: control's clock.
        """
        quiet = {a: said for a, said in self._said.items() if now < said + QUIET_SECONDS}
        self._said = quiet
        for address in [address for address in self._unsaid if address not in quiet]:
            failed = self._unsaid.pop(address)
            quiet[address] = now
            if failed.count == 1:
                self._log.warning(
                    "request %s: the push from %s has failed (%s); the prompt is computed here",
                    failed.request,
                    address,
                    failed.reason,
                )
            else:
                self._log.warning(
                    "%d pushes from %s have failed (the first one: request %s, %s); the prompts "
                    "are computed here",
                    failed.count,
                    address,
                    failed.request,
                    failed.reason,
                )
