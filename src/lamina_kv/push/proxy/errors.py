"""The proxy's own answers, in OpenAI's form."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

import msgspec

RETRY_AFTER = 1
"""Seconds after which a client that was turned away may ask again."""


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """An engine's answer that was read to its end.

    Attributes:
        media_type: of its body.
        body: as it came.
    """

    media_type: str
    body: bytes


class Refusal(Exception):
    """A request gets no answer from an engine, or the rest of one, but this.

    Attributes:
        status: HTTP's.
        message: says what to do.
        answer: what an engine itself has to say about it.
    """

    def __init__(self, status: int, message: str, answer: EngineAnswer | None = None) -> None:
        super().__init__(message)
        self.status = HTTPStatus(status)
        self.message = message
        self.answer = answer

    @property
    def body(self) -> bytes:
        """The JSON that a client gets."""
        if self.answer is not None:
            return self.answer.body
        return msgspec.json.encode({"error": self._error})

    def event(self, *, named: bool) -> bytes:
        """The same as the last event of a stream.

        Args:
            named: whether the stream's events have names, as those of messages and responses have.
                Clients of these look at nothing without one.
        """
        if named:
            error = msgspec.json.encode({"type": "error", "error": self._error})
            return b"event: error\ndata: " + error + b"\n\n"
        return b"data: " + self.body + b"\n\n"

    @property
    def headers(self) -> dict[str, str]:
        """What belongs to it."""
        headers = {
            "content-type": self.answer.media_type if self.answer else "application/json",
            "content-length": str(len(self.body)),
        }
        if self.status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["retry-after"] = str(RETRY_AFTER)
        elif self.status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        return headers

    @property
    def _error(self) -> dict[str, object]:
        kind = self.status.phrase.title().replace(" ", "")
        return {"message": self.message, "type": kind, "param": None, "code": int(self.status)}
