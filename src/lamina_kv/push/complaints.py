"""What is said in the log of others' words: printable, and bounded however often they are wrong."""

from __future__ import annotations

import logging

MAX_REASON = 200
"""Characters of another engine's reason that are kept."""

MAX_WARNINGS = 16
"""Different complaints that are worth a warning, where nobody has said how many."""


def printable(text: str) -> str:
    """What another engine has written, for a line of the log."""
    return "".join(filter(str.isprintable, text[:MAX_REASON]))


class Complaints:
    """Says what others can cause as often as they like. Not thread safe.

    Args:
        log: where.
        most: different complaints that are worth a warning.
    """

    def __init__(self, log: logging.Logger, most: int = MAX_WARNINGS) -> None:
        self._log = log
        self._most = most
        self._said: set[str] = set()

    def warn(self, text: str, about: str = "") -> None:
        """A warning, if it is new and one of the first; else for those who look closely.

        Args:
            text: what is wrong.
            about: what stands before it, whom it happened to; that alone makes it no new one.
        """
        new = text not in self._said and len(self._said) < self._most
        if new:
            self._said.add(text)
        self._log.log(logging.WARNING if new else logging.DEBUG, "%s%s", about, text)
