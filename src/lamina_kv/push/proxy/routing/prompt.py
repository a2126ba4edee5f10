"""A request's prompt as routing sees it: a chain of hashes, and an estimate of its tokens.

The hash at a mark stands for everything in front of it, as block hashes of an engine do. There is a
mark after every :data:`BLOCK` tokens or so, and one wherever an answer follows in a
conversation. What an engine answered is not in the prompt it was sent, but in the next one: a
prompt whose history goes on with an answer just where a former prompt ended meets that answer in
the cache of whoever gave it.

Nothing here depends on a tokenizer. Text is counted in bytes, and images at a flat rate, so that a
picture of a megabyte in base64 does not look like a long text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import pack
from typing import Annotated

import msgspec

from lamina_kv.push.proxy.headers import RANK
from lamina_kv.push.proxy.requests import ApiRequest, Fields

BLOCK = 64
"""Tokens between two marks: four of vLLM's blocks. A hit may be underestimated by as much."""
_NOMINAL = 4
_BLOCK_BYTES = _NOMINAL * BLOCK
"""The same in bytes of text: in most languages and tokenizers a token has three to five."""

PART_TOKENS = 576
"""Tokens of an image, a sound, or whatever else is no text. Real ones have 64 to 4,096; it is a
usual picture in a usual model, and only compared with other estimates."""

MAX_HASHED = 4 << 20
"""Bytes of a prompt that are hashed; the rest is only counted. It is a million tokens of text."""
MAX_MARKS = MAX_HASHED // _BLOCK_BYTES
"""Marks of a prompt before the one at its end. Text has no more in what is hashed; messages could
begin millions of answers."""
MAX_PIECES = 1 << 15
"""Texts, names and pictures of a prompt that are hashed; the rest is only counted. It is some 0.2 s
of the event loop."""
MAX_VALUES = 1 << 17
"""Values in JSON of which objects are made, some 20 MB. What may have more is taken as one text."""
MAX_ID_BYTES = 8 << 20
"""Bytes of token ids that are read; in the rest they are only counted."""
MAX_IDS = 1 << 20
"""Token ids that are kept: in longer prompts nobody looks for blocks behind these."""

ANSWER_TOKENS = 256
"""Tokens of an answer whose request sets no limit."""
MAX_ANSWER_TOKENS = 1024
"""Most tokens that an answer is expected to have. Limits are mostly set far beyond what comes."""

SESSION_HEADER = "x-session-id"
_SESSION_FIELDS = ("session_id", "prompt_cache_key", "user")
_SEEDS = ("model", "cache_salt", "chat_template", "chat_template_kwargs", "lora_name")
"""Fields that make a prefix another one."""
_IN_FRONT = ("tools", "functions", "documents", "instructions", "system")
_BODIES = ("messages", "input", "prompt")
_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")

_MESSAGES = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TOKENS = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]])
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_ONE = msgspec.json.Decoder(tuple[msgspec.Raw])
_IDS = re.compile(rb"\[\s*\d")
_TEXT = msgspec.json.Decoder(str)
_NUMBER = msgspec.json.Decoder(int)
_MALFORMED = (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a prompt.

    Attributes:
        digest: of all in front of it.
        at: tokens in front of it.
        reach: tokens of the prompt that an engine holds which has answered a prompt that ended
            here: ``at``, and the answer that follows.
    """

    digest: int
    at: int
    reach: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """See the module.

    Attributes:
        marks: in order.
        tokens: estimated, or exact where the request has tokens.
        text: bytes of text in it.
        answer: tokens that the answer is expected to have.
        session: digest of the name that later requests of the same conversation give, too; empty
            if none. A client may give names of megabytes.
        model: the name of the model, as the request has it.
        pushable: whether a prefill engine can compute it.
        ids: the tokens themselves, or the first million, if the request has them or an engine has
            told them, if somebody needs them, and if nothing else makes blocks of them other ones.
        plain: whether its tokens alone say which blocks it has: there are no pictures in it, and it
            has no salt.
        streams: whether its answer is a stream, whose first byte comes when the prompt is computed.
        rank: index of the decode engine's data-parallel rank that the client asks for; None if it
            does not.
    """

    marks: tuple[Mark, ...] = ()
    tokens: int = 0
    text: int = 0
    answer: int = 0
    session: bytes = b""
    model: str = ""
    pushable: bool = False
    rank: int | None = None
    ids: tuple[int, ...] = ()
    plain: bool = True
    streams: bool = False


def read_prompt(
    request: ApiRequest, bytes_per_token: Callable[[str], float], *, ids: bool = False
) -> Prompt:
    """What routing knows of a request. Of one that makes no sense it knows little, and lets it
    pass: engines say what is wrong.

    Args:
        request: the client's.
        bytes_per_token: of text, for a model's name.
        ids: whether to keep its token ids, if it has them.
    """
    fields = _fields(request)
    model = _string(fields.get("model"))
    salted = bytes(fields.get("cache_salt", b"null")) != b"null"
    stream = _Stream(bytes_per_token(model), ids=ids and not salted)
    for name in _SEEDS:
        stream.separate(name.encode(), bytes(fields.get(name, b"")))
    for name in _IN_FRONT:
        if name in fields:
            stream.text(bytes(fields[name]))
    for name in _BODIES:
        if name in fields:
            _read_body(stream, fields[name])
            break
    return Prompt(
        stream.end(),
        stream.tokens,
        stream.text_bytes,
        _answer(fields),
        _session(request, fields),
        model,
        request.pushable,
        _rank(request),
        stream.given,
        not (stream.parts or salted),
        bytes(fields.get("stream", b"")) == b"true",
    )


def _fields(request: ApiRequest) -> Fields:
    """Those of its body, also if it is passed on as it came."""
    if request.fields is not None:
        return request.fields
    try:
        return _OBJECT.decode(request.body)
    except _MALFORMED:
        return {}


def _rank(request: ApiRequest) -> int | None:
    given = request.headers.get(RANK, "")
    return int(given) if given.isascii() and given.isdecimal() and len(given) < 9 else None


class _Stream:
    """A prompt that is read from its beginning to its end.

    Marks depend on its bytes alone, whatever a token has of them: what is learnt about tokens must
    not make every prefix another one.

    Args:
        bytes_per_token: of text.
        ids: whether to keep token ids.
    """

    def __init__(self, bytes_per_token: float, *, ids: bool) -> None:
        self.text_bytes = 0
        self.parts = 0
        self.given: tuple[int, ...] = ()
        self._per_token = bytes_per_token
        self._keep = ids
        self._exact = 0
        self._hash = hashlib.blake2b(digest_size=8)
        self._hashed = 0
        self._pieces = 0
        self._marks: list[Mark] = []
        self._room = _BLOCK_BYTES

    @property
    def tokens(self) -> int:
        """So far."""
        return self._exact + round(self.text_bytes / self._per_token)

    @property
    def full(self) -> bool:
        """Whether what comes now is only counted."""
        return (
            self._hashed >= MAX_HASHED
            or self._pieces >= MAX_PIECES
            or len(self._marks) >= MAX_MARKS
        )

    def separate(self, *words: bytes) -> None:
        """What makes a difference and is no text."""
        if self.full:
            return
        self._pieces += 1
        for word in words:
            self._hash.update(pack("<I", len(word)) + word)

    def text(self, data: bytes) -> None:
        """Text of the prompt, with a mark wherever a block is full."""
        self._pieces += 1
        start = 0
        while start < len(data):
            if self.full:
                self.text_bytes += len(data) - start
                return
            piece = data[start : start + self._room]
            start += len(piece)
            self.text_bytes += len(piece)
            self._read(piece, len(piece))

    def ids(self, tokens: list[int], more: int) -> None:
        """The same as tokens, and so many more."""
        if self._keep:
            self.given = tuple(tokens[:MAX_IDS])
        self._pieces += 1
        start = 0
        while start < len(tokens) and not self.full:
            piece = tokens[start : start + -(-self._room // _NOMINAL)]
            start += len(piece)
            self._exact += len(piece)
            self._read(pack(f"<{len(piece)}q", *piece), _NOMINAL * len(piece))
        # Last, as marks count what is in front of them.
        self._exact += len(tokens) - start + more
        if more:
            self._hashed = MAX_HASHED

    def part(self, data: bytes) -> None:
        """A picture, or something else that is no text."""
        self.parts += 1
        self._exact += PART_TOKENS
        if self.full:
            return
        self._pieces += 1
        self._read(hashlib.blake2b(data, digest_size=8).digest(), _NOMINAL * PART_TOKENS)

    def answer_begins(self) -> int | None:
        """What comes now was an engine's answer to all before. Returns the number of its mark; None
        if it has none."""
        if self.full:
            return None
        self._mark()
        return len(self._marks) - 1

    def answer_ends(self, number: int | None) -> None:
        """The answer is over that began at this mark."""
        if number is None:
            return
        mark = self._marks[number]
        self._marks[number] = Mark(mark.digest, mark.at, self.tokens)

    def end(self) -> tuple[Mark, ...]:
        """All marks; none of a prompt that has no tokens. The last one is at the end, unless not
        all of the prompt was hashed: then others may go on in another way."""
        if not self.full:
            self._mark()
        return tuple(self._marks) if self.tokens else ()

    def _read(self, data: bytes, size: int) -> None:
        self._hash.update(data)
        self._hashed += len(data)
        self._room -= size
        if self._room <= 0:
            self._room = _BLOCK_BYTES
            self._mark()

    def _mark(self) -> None:
        digest = int.from_bytes(self._hash.digest(), "little")
        self._marks.append(Mark(digest, self.tokens, self.tokens))


def _read_body(stream: _Stream, body: msgspec.Raw) -> None:
    raw = _the_only_one(bytes(body))
    for read in (_read_tokens, _read_text, _read_messages):
        if read(stream, raw):
            return
    stream.text(raw)


def _the_only_one(raw: bytes) -> bytes:
    """A prompt may stand in a list of its own."""
    if raw.startswith(b"["):
        try:
            item = bytes(_ONE.decode(raw)[0])
        except _MALFORMED:
            return raw
        if item[:1] in {b'"', b"["}:
            return item
    return raw


def _has_many_values(raw: bytes) -> bool:
    """Whether JSON may have more values than objects are made of. Commas and brackets in a text
    count, too: they are not told from others without parsing it."""
    return len(raw) - len(raw.translate(None, b",[{")) > MAX_VALUES


def _read_tokens(stream: _Stream, raw: bytes) -> bool:
    more = 0
    if len(raw) > MAX_ID_BYTES:
        if _IDS.match(raw) is None:
            return False
        end = raw.rfind(b",", 0, MAX_ID_BYTES)
        more = raw.count(b",", end)
        raw = raw[:end] + b"]"
    try:
        tokens = _TOKENS.decode(raw)
    except _MALFORMED:
        return False
    stream.ids(tokens, more)
    return True


def _read_text(stream: _Stream, raw: bytes) -> bool:
    try:
        stream.text(_TEXT.decode(raw).encode(errors="replace"))
    except _MALFORMED:
        return False
    return True


def _read_messages(stream: _Stream, raw: bytes) -> bool:
    if _has_many_values(raw):
        return False
    try:
        messages = _MESSAGES.decode(raw)
    except _MALFORMED:
        return False
    for message in messages:
        role = bytes(message.get("role", b""))
        number = stream.answer_begins() if role == b'"assistant"' else None
        stream.separate(b"message", role)
        for part in _parts(message.get("content")):
            _read_part(stream, part)
        for name in sorted(message.keys() - {"role", "content"}):
            stream.separate(name.encode(errors="replace"))
            stream.text(bytes(message[name]))
        stream.answer_ends(number)
    return True


def _parts(content: msgspec.Raw | None) -> Iterator[bytes]:
    if content is None:
        return
    raw = bytes(content)
    if not raw.startswith(b"["):
        yield raw
        return
    try:
        parts = _LIST.decode(raw)
    except _MALFORMED:
        yield raw
        return
    yield from map(bytes, parts)


def _read_part(stream: _Stream, raw: bytes) -> None:
    if stream.full and not raw.startswith(b"{"):
        stream.text(raw)
        return
    if raw.startswith(b"{"):
        try:
            part = _OBJECT.decode(raw)
        except _MALFORMED:
            part = {}
        if "text" not in part:
            stream.part(raw)
            return
        raw = bytes(part["text"])
    if not _read_text(stream, raw):
        stream.text(raw)


def _answer(fields: Fields) -> int:
    for name in _LIMITS:
        if name in fields:
            try:
                return max(0, min(MAX_ANSWER_TOKENS, _NUMBER.decode(fields[name])))
            except _MALFORMED:
                continue
    return ANSWER_TOKENS


def _session(request: ApiRequest, fields: Fields) -> bytes:
    name = request.headers.get(SESSION_HEADER, "") or next(
        (text for field in _SESSION_FIELDS if (text := _string(fields.get(field)))), ""
    )
    return session_digest(name) if name else b""


def session_digest(name: str) -> bytes:
    """What stands for a session, however long its name is."""
    return hashlib.blake2b(name.encode(errors="replace"), digest_size=16).digest()


def _string(raw: msgspec.Raw | None) -> str:
    if raw is None:
        return ""
    try:
        return _TEXT.decode(raw)
    except _MALFORMED:
        return ""
