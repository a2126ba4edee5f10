"""A client's request, and what the two engines are sent of it.

What ``splits.py`` names is split between a prefill and a decode engine; everything else goes to a
decode engine as it came. Values that the proxy has no business with are never parsed: they reach
the engine byte for byte, and a body of megabytes is looked through once, without objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote

import msgspec

from lamina_kv.push.proxy.errors import Refusal
from lamina_kv.push.proxy.journal import Entry
from lamina_kv.push.proxy.splits import SPLITS, Split

Fields = dict[str, msgspec.Raw]
"""A JSON object: names, and values as they were written."""

_DECODER = msgspec.json.Decoder(Fields)
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What a decoder raises; of a value, too, that was passed as raw: names in it are decoded later."""

_TRANSFERS = frozenset({"kv_transfer_params", "ec_transfer_params"})
"""Parameters that name other engines."""


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One request of a client.

    Attributes:
        id: of the request, for every log; that of a push is another.
        method: HTTP's.
        target: path and query, as they came.
        headers: those that every engine gets; names are in lower case.
        fields: the body's, if it is one that may be split; None if a decode engine gets ``body``.
        size: of the body, in bytes.
        body: as it came, if there are no fields.
        entry: what the access log will say.
    """

    id: str
    method: str
    target: bytes
    headers: dict[str, str]
    fields: Fields | None = None
    size: int = 0
    body: bytes = b""
    entry: Entry = field(default_factory=lambda: Entry("", "", ""))

    @property
    def split(self) -> Split | None:
        """How it can be split; None if it goes to a decode engine as it came."""
        return split_of(self.method, unquote(self.target.partition(b"?")[0].decode()))

    @property
    def pushable(self) -> bool:
        """Whether a prefill engine can compute the prompt. Several prompts or answers in one
        request, and what only a decode engine can say about its prompt, go to a decode engine
        alone, which computes everything itself."""
        fields, split = self.fields, self.split
        if fields is None or split is None:
            return False
        return _is_one_prompt(fields.get("prompt")) and all(
            name not in fields or bytes(fields[name]) in values
            for name, values in split.only_if.items()
        )

    def for_prefill(self, push_id: str) -> bytes:
        """The body for a prefill engine: the same prompt, and one token that nobody looks at."""
        split = self.split
        assert split is not None, "a request that is not split is not pushed"
        instead = {name: msgspec.Raw(value) for name, value in split.prefill.items()}
        fields = {**(self.fields or {}), **instead}
        for name in split.left_out:
            fields.pop(name, None)
        for name, inner in split.left_out_within.items():
            if name in fields:
                fields[name] = _without(inner, fields[name])
        return _encode(fields, {**split.prefill_told, "lamina_push": {"id": push_id}})

    def for_decode(self, push_id: str = "", prefill: str = "") -> bytes:
        """The body for a decode engine; without arguments, one that is to compute everything.

        Args:
            push_id: names the push.
            prefill: the prefill engine's push address.
        """
        if self.fields is None:
            return self.body
        told: dict[str, object] = {}
        if push_id and (split := self.split) is not None:
            told = {**split.decode_told, "lamina_push": {"id": push_id, "prefill": prefill}}
        return _encode(self.fields, told)

    def for_withdrawal(self, push_id: str) -> bytes:
        """The body that tells a prefill engine that nobody will ask for a push: a request of one
        token, which the engine need not compute."""
        model = {"model": self.fields["model"]} if self.fields and "model" in self.fields else {}
        told: dict[str, object] = {"lamina_push": {"id": push_id, "withdrawn": True}}
        asked = {"prompt": msgspec.Raw(b"[0]"), "max_tokens": msgspec.Raw(b"1")}
        return _encode({**model, **asked}, told)


def split_of(method: str, path: str) -> Split | None:
    """How such requests can be split; None if they go to a decode engine as they come.

    Args:
        method: HTTP's.
        path: with nothing escaped.
    """
    return SPLITS.get(path) if method == "POST" else None


def parse_fields(body: bytes) -> Fields:
    """The fields of a body.

    Raises:
        Refusal: 400, if it is not a JSON object.
    """
    try:
        return _DECODER.decode(body)
    except _MALFORMED as error:
        raise Refusal(400, f"the body is not a JSON object: {error}") from error


def harmless(body: bytes, media_type: str) -> bytes:
    """A body that is not to be split, without what could make an engine connect to wherever the
    client likes. It is the same bytes if there is nothing of that in it.

    Args:
        body: any.
        media_type: what the client calls it; empty if it does not.

    Raises:
        Refusal: 400, if an engine might find in it what the proxy does not: it is called JSON, and
            is none.
    """
    kind = media_type.partition(";")[0].strip().lower()
    is_json = not kind or kind.endswith(("/json", "+json"))
    if not body or not (is_json or body.lstrip().startswith(b"{")):
        return body
    try:
        fields = _DECODER.decode(body)
    except _MALFORMED as error:
        if not is_json or (isinstance(error, msgspec.ValidationError) and _is_json(body)):
            return body
        raise Refusal(400, f"the body is not JSON: {error}") from error
    try:
        sampling = _without_transfers(fields.get("sampling_params"))
    except _MALFORMED as error:  # Python's own parser takes names that are no UTF-8
        raise Refusal(400, f"the body is not JSON: {error}") from error
    if fields.keys().isdisjoint(_TRANSFERS) and sampling is None:
        return body
    return _encode(fields if sampling is None else {**fields, "sampling_params": sampling}, {})


def _is_json(body: bytes) -> bool:
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except _MALFORMED:
        return False
    return True


def _without_transfers(sampling: msgspec.Raw | None) -> msgspec.Raw | None:
    """Parameters of sampling that would smuggle transfers in, without these; None if they do
    not. ``/inference/v1/generate`` takes them as vLLM's engine does."""
    try:
        given = _DECODER.decode(sampling) if sampling is not None else {}
        more = _DECODER.decode(given["extra_args"]) if "extra_args" in given else {}
    except msgspec.ValidationError:  # no object: the engine would refuse the request
        return None
    if more.keys().isdisjoint(_TRANSFERS):
        return None
    kept = {name: value for name, value in more.items() if name not in _TRANSFERS}
    return msgspec.Raw(msgspec.json.encode({**given, "extra_args": kept}))


def _without(name: str, value: msgspec.Raw) -> msgspec.Raw:
    """An object without one of its fields; what is no object stays: the engine refuses it."""
    try:
        fields = _DECODER.decode(value)
    except _MALFORMED:
        return value
    fields.pop(name, None)
    return msgspec.Raw(msgspec.json.encode(fields))


def _is_one_prompt(prompt: msgspec.Raw | None) -> bool:
    """Whether it is a text, a list of tokens, or a list of one of these."""
    text = bytes(prompt) if prompt is not None else b""
    if not text.startswith(b"[") or text[1:].lstrip()[:1] not in {b'"', b"["}:
        return True  # or a mistake, which every engine would find
    return len(_LIST.decode(text)) == 1


def _encode(fields: Fields, told: dict[str, object]) -> bytes:
    parameters = {**_harmless(fields.get("kv_transfer_params")), **told}
    kept = {name: value for name, value in fields.items() if name not in _TRANSFERS}
    if parameters:
        kept["kv_transfer_params"] = msgspec.Raw(msgspec.json.encode(parameters))
    # Joined here: msgspec's encoder grows as it goes, and copies megabytes many times.
    parts: list[bytes | msgspec.Raw] = []
    for name, value in kept.items():
        parts += (b"," if parts else b"{", msgspec.json.encode(name), b":", value)
    return b"".join((*parts, b"}" if parts else b"{}"))


def _harmless(parameters: msgspec.Raw | None) -> dict[str, object]:
    """Of a client's own parameters what says how long chunks are worth keeping. The rest could make
    an engine connect to wherever the client likes."""
    try:
        given = _DECODER.decode(parameters) if parameters is not None else {}
    except _MALFORMED:  # no object: the engine would refuse the request
        return {}
    return {name: value for name, value in given.items() if name == "lamina"}
