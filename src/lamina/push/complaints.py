"""What is said in the log of others' words: printable, and bounded however often they are wrong."""

from __future__ import annotations

import logging

MAX_REASON = 200
"""Characters of another engine's reason that are kept."""

MAX_WARNINGS = 16
"""Different complaints that are worth a warning."""


def printable(text: str) -> str:
    """What another engine has written, for a line of the log."""
    return "".join(filter(str.isprintable, text[:MAX_REASON]))


class Complaints:
    """Says what others can cause as often as they like. Not thread safe.

    Args:
        log: where.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._said: set[str] = set()

    def warn(self, text: str) -> None:
        """A warning, if it is new and one of the first; else for those who look closely."""
        new = text not in self._said and len(self._said) < MAX_WARNINGS
        if new:
            self._said.add(text)
        self._log.log(logging.WARNING if new else logging.DEBUG, "%s", text)
