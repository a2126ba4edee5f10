"""Whose fault it is when an engine answers a request with a mistake: its own, or the client's."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec

from lamina_kv.push.proxy.engines import Engine
from lamina_kv.push.proxy.requests import ApiRequest

log = logging.getLogger("lamina_kv.push.proxy")

_REASON_LENGTH = 300
"""Characters of an engine's reason that are logged."""


@dataclass(frozen=True, slots=True)
class _Suspect:
    """An engine that has not answered a request well.

    Attributes:
        engine: the engine.
        reason: what it says.
        refuses: whether it says that the request is wrong.
    """

    engine: Engine
    reason: str
    refuses: bool


class Blame:
    """Whose fault it is when an engine answers a request with a status of 400 or more: the
    engine's if another engine can answer it, and otherwise the request's. So a request that no
    engine can bear does not take all of them out of use, nor does a client's mistake.

    Args:
        request: the request.
    """

    def __init__(self, request: ApiRequest) -> None:
        self._request = request
        self._suspects: list[_Suspect] = []
        self._answered = False

    def suspect(self, engine: Engine, status: int, text: bytes) -> None:
        """An engine has answered so. A refusal is told when it turns out to be no client's mistake:
        those are not worth a word each."""
        suspect = _Suspect(engine, f"status {status}: {_reason(text)}", refuses=status < 500)
        if not suspect.refuses:
            log.warning("request %s: %s fails: %s", self._request.id, engine, suspect.reason)
        self._suspects.append(suspect)
        if self._answered:
            self.answered()

    def answered(self) -> None:
        """An engine has answered well."""
        self._answered = True
        for suspect in self._suspects:
            if suspect.refuses:
                log.warning(
                    "request %s: %s refuses what another engine answers: %s",
                    self._request.id,
                    suspect.engine,
                    suspect.reason,
                )
            suspect.engine.failed(suspect.reason)
        self._suspects.clear()


class _Reason(msgspec.Struct):
    message: str


class _Complaint(msgspec.Struct):
    error: _Reason


def _reason(text: bytes) -> str:
    """Why an engine refuses a request, or cannot answer it."""
    try:
        reason = msgspec.json.decode(text, type=_Complaint).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError):
        reason = text.decode(errors="replace")
    return reason if len(reason) <= _REASON_LENGTH else f"{reason[:_REASON_LENGTH]} …"
