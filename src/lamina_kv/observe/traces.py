"""Traces of requests: which chunks each prompt had, without a token or a word of it.

One request a line of JSON, in the form in which traces of real services are published:
``timestamp`` in milliseconds, ``input_length`` and ``output_length`` in tokens, and ``hash_ids``,
one number for each chunk of the prompt. Two chunks have the same number if their tokens, and all
tokens before them, are the same.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import msgspec

from lamina_kv.observe.files import new_file, write_all
from lamina_kv.plan import ChunkKey

log = logging.getLogger("lamina_kv.observe")

MOST_BYTES = 1 << 30
"""Bytes of a file, some 30,000 prompts of 131,072 tokens in chunks of 64. More is not recorded."""

MOST_WAITING = 256
"""Requests that wait to be written: their keys would not be in memory any more without that."""

_HASHED = 64
"""Chunks that are hashed before other threads of the process may run: 0.1 ms."""

_LAST_WRITES = 5.0
"""Seconds that the end of the process waits for the last lines."""

_MOST = 1 << 53  # what every reader of JSON has as an integer
_Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=_MOST)]
_Milliseconds = Annotated[float, msgspec.Meta(ge=-_MOST, le=_MOST)]


class TracedRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a trace.

    Attributes:
        timestamp: milliseconds at which the request came.
        input_length: tokens of its prompt.
        output_length: tokens of its answer.
        hash_ids: a number for each chunk of the prompt, in prefix order.
        output_hash_ids: likewise for the chunks behind these which the answer has completed. The
            recorder writes them; published traces lack them.
        chunk_tokens: tokens of one chunk; 0 if the trace does not say.
        chunk_bytes: bytes of one chunk over all ranks; 0 if the trace does not say.
        prefill_seconds: what computing the whole prompt was predicted to take by the prefills that
            were measured when the request ended; 0 if there were none, or the trace does not say.
    """

    timestamp: _Milliseconds
    input_length: _Count
    output_length: _Count
    hash_ids: tuple[int, ...]
    output_hash_ids: tuple[int, ...] = ()
    chunk_tokens: _Count = 0
    chunk_bytes: _Count = 0
    prefill_seconds: _Seconds = 0.0


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """What is recorded of a request that has ended.

    Attributes:
        came: when it came, on the clock of whoever records.
        prompt: tokens of its prompt.
        tokens: tokens that it had in the end.
        keys: its whole chunks, prompt and answer.
        prefill_seconds: what computing its whole prompt is predicted to take; 0 if nobody knows.
    """

    came: float
    prompt: int
    tokens: int
    keys: Sequence[ChunkKey]
    prefill_seconds: float = 0.0


_decoder = msgspec.json.Decoder(TracedRequest)
_encoder = msgspec.json.Encoder()


def read_requests(lines: Iterable[bytes]) -> Iterator[TracedRequest]:
    """The requests of a trace, in its order. A last line that was cut off, because the disk was
    full or its writer was killed, is left out, which is logged.

    Args:
        lines: of the file; empty ones are passed over, and keys that are not known.

    Raises:
        ValueError: if a line is no request; names it.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _decoder.decode(line)
        except msgspec.MsgspecError as error:
            cut = not line.endswith(b"\n") and not isinstance(error, msgspec.ValidationError)
            if cut and number > 1:
                log.warning("line %d, the last one, is cut off and left out", number)
                return
            raise ValueError(f"line {number} is not a request of a trace: {error}") from error


class TraceRecorder:
    """Writes a line for each request that has ended, in a thread of its own.

    A chunk's number is the keyed hash of its key. The secret is drawn for the file and kept in
    memory only: nobody can tell from the file what a prompt was, nor whether a given text was one.
    A request that finds the queue full is left out, and an error ends the recording; both are
    logged once.

    Args:
        path: the file; what was in it is replaced. A pipe or a device is refused.
        chunk_tokens: tokens of one chunk.
        chunk_bytes: bytes of one chunk, all ranks.
        began: the time from which timestamps count, on the clock that requests come by.
        most_bytes: bytes that are written at most.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        chunk_tokens: int,
        chunk_bytes: int,
        began: float,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._path = path
        self._chunk_tokens = chunk_tokens
        self._chunk_bytes = chunk_bytes
        self._began = began
        self._left = most_bytes
        self._secret = os.urandom(32)
        self._file = new_file(path)
        self._over = self._told = False
        # Reentrant, unlike Queue: the garbage collector may call `close` inside of `ended`.
        self._queue: SimpleQueue[ServedRequest | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lamina-trace", daemon=True)
        self._thread.start()

    def ended(self, request: ServedRequest) -> None:
        """Record a request. Never waits, and never fails."""
        if self._over:
            return
        if self._queue.qsize() < MOST_WAITING:
            self._queue.put(request)
        elif not self._told:
            self._told = True
            log.warning(
                "observe.trace: requests end faster than they are written; some are left out"
            )

    def close(self) -> None:
        """Write what waits, and close the file. A second call does nothing."""
        self._queue.put(None)
        self._thread.join(_LAST_WRITES)

    def _run(self) -> None:
        with self._file:
            while (request := self._queue.get()) is not None:
                try:
                    line = _encoder.encode(self._traced(request)) + b"\n"
                    if len(line) > self._left:
                        log.warning("observe.trace: %s is as large as it may be", self._path)
                        break
                    self._left -= len(line)
                    write_all(self._file, line)
                except Exception as error:  # whatever it is, the engine goes on
                    log.warning("observe.trace: no more is written down: %r", error)
                    break
            self._over = True

    def _traced(self, request: ServedRequest) -> TracedRequest:
        ids: list[int] = []
        for start in range(0, len(request.keys), _HASHED):
            ids += map(self._number, request.keys[start : start + _HASHED])
            time.sleep(0)  # the engine's thread goes first
        prompt = request.prompt // self._chunk_tokens
        return TracedRequest(
            round(1e3 * (request.came - self._began)),
            request.prompt,
            max(0, request.tokens - request.prompt),  # not all of a prompt may be known
            tuple(ids[:prompt]),
            tuple(ids[prompt:]),
            self._chunk_tokens,
            self._chunk_bytes,
            round(request.prefill_seconds, 6),
        )

    def _number(self, key: ChunkKey) -> int:
        """53 bits, which every reader of JSON has as an integer."""
        digest = blake2b(key, key=self._secret, digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 11


def open_recorder(
    path: Path | None, chunk_tokens: int, chunk_bytes: int, began: float, engine: int = 0
) -> TraceRecorder | None:
    """The recorder that ``observe.trace`` asks for; None if it asks for none, or its file cannot be
    written, which is logged.

    Args:
        path: the file, if there is to be one.
        chunk_tokens: tokens of one chunk.
        chunk_bytes: bytes of one chunk, all ranks.
        began: the time from which timestamps count, on the clock that requests come by.
        engine: number of the engine among those of one server; each has a file of its own.
    """
    if path is None:
        return None
    if engine:
        path = path.with_stem(f"{path.stem}-engine{engine}")
    try:
        return TraceRecorder(path, chunk_tokens, chunk_bytes, began)
    except OSError as error:
        log.warning("observe.trace: no request is written down: %s", error)
        return None
