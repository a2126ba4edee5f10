"""Names of chunks: two chunks have the same key only if their bytes may stand for each other.

A key is a hash chain over token ids, rooted in everything else that changes the bytes. It is the
same in every process, on every machine and after a restart: no pickle, no ``hash()``, nothing
that depends on the environment.

What is hashed is encoded by :func:`pack`, under which two different values never have the same
bytes, so that nothing can slide from one field into the next.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from typing import cast

import numpy as np
import numpy.typing as npt

from lamina_kv.plan import ChunkKey

KEY_BYTES = 20
"""Length of a chunk key: 160 bits, so that chance never makes two keys equal."""

NAMESPACE_BYTES = 16
"""Length of a namespace fingerprint."""

MAX_TOKEN = 2**32 - 1
"""The largest token id that can be part of a key."""

_NO_EXTRA = bytes(4)

_TOKEN_BYTES = array("I").itemsize

_SCHEME = "lamina keys 2"  # to be changed with anything that changes what is hashed, or how

Packable = None | int | str | bytes | tuple["Packable", ...]
"""What :func:`pack` encodes."""


def key_array(keys: Sequence[ChunkKey]) -> npt.NDArray[np.uint8]:
    """Chunk keys as an array of shape ``(n, KEY_BYTES)``."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def pack(value: Packable) -> bytes:
    """``value`` as bytes, such that different values have different bytes.

    Every item is its type, its length and its content; ``1``, ``"1"``, ``b"1"`` and ``(1,)`` all
    differ, and so do ``("ab", "c")`` and ``("a", "bc")``.

    Raises:
        TypeError: for any other type; a bool is one.
    """
    match value:
        case None:
            kind, content = b"N", b""
        case bytes():
            kind, content = b"B", value
        case str():
            kind, content = b"S", value.encode("utf-8", "surrogatepass")
        case tuple():
            kind, content = b"T", b"".join(map(pack, value))
        case int() if not isinstance(value, bool):
            kind, content = b"I", str(value).encode()
        case _:
            raise TypeError(f"a {type(value).__name__} cannot be part of a key: {value!r}")
    return kind + len(content).to_bytes(8, "little") + content


@dataclass(frozen=True)
class Namespace:
    """Everything but tokens that changes the bytes of a chunk.

    The rank is not part of it: all ranks of an engine share keys, because the scheduler looks a
    chunk up once for all of them, and what a rank keeps under a key is its own shard, in its own
    store. For the same reason every field must have the same value on every rank.

    Attributes:
        model: what the engine computes: architecture and resolved configuration, with the
            operator's overrides. Never a path, so that a moved checkpoint still hits.
        checkpoint: which weights; a fingerprint of :mod:`lamina_kv.checkpoint` or what the operator
            gives for one.
        model_dtype: type of the activations.
        cache_dtype: type of the cache's elements, with its scaling.
        quantization: how weights are quantised; empty if they are not.
        groups: kind, tokens of a block and window of each cache group.
        chunk_tokens: tokens in one chunk.
        layout: how bytes are arranged inside a page: attention backend and cache layout.
        page_bytes: bytes of one page, for each row.
        tensor_parallel: ranks over which heads are divided.
        pipeline_parallel: ranks over which layers are divided.
        context_parallel: ranks over which tokens are divided.
        speculation: what drafts tokens with rows in this cache, weights included; empty if
            nothing does.
        engine: name of the engine.
        engine_format: the engine's version, as far as it decides what the cache's bytes mean.
    """

    model: str
    checkpoint: str
    model_dtype: str
    cache_dtype: str
    quantization: str
    groups: tuple[tuple[str, int, int], ...]
    chunk_tokens: int
    layout: str
    page_bytes: tuple[int, ...]
    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    speculation: str
    engine: str
    engine_format: str

    def __post_init__(self) -> None:
        """Refuse a namespace in which unknown things would look equal.

        Raises:
            ValueError: if a field is empty that cannot be.
        """
        for name in ("model", "checkpoint", "model_dtype", "cache_dtype", "layout", "engine"):
            if not getattr(self, name):
                raise ValueError(f"a namespace without {name} would mix caches that differ in it")

    @cached_property
    def fingerprint(self) -> bytes:
        """The namespace as :data:`NAMESPACE_BYTES` bytes."""
        named = tuple((field.name, getattr(self, field.name)) for field in fields(self))
        return blake2b(pack((_SCHEME, *sorted(named))), digest_size=NAMESPACE_BYTES).digest()

    @cached_property
    def hex(self) -> str:
        """:attr:`fingerprint` as the name of a directory."""
        return self.fingerprint.hex()

    def describe(self) -> dict[str, str]:
        """Field names and values for people."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Epoch:
    """Which weights compute, where an engine changes them while it runs.

    Without arguments: the weights of the namespace's checkpoint, which a start begins with.

    Attributes:
        weights: the operator's name for the weights; empty where nobody has named them.
        run: for weights that nobody has named, which ones: a word that no other epoch of any
            process has.
    """

    weights: str = ""
    run: str = ""

    @property
    def lasting(self) -> bool:
        """Whether a later process may serve the same weights, so that their chunks are of use to
        it."""
        return not self.run

    @property
    def mark(self) -> tuple[str, ...]:
        """What the epoch adds to whatever is hashed; nothing for the checkpoint's own weights."""
        return ("epoch", self.weights, self.run) if self.weights or self.run else ()


CHECKPOINT = Epoch()
"""The weights that a start begins with."""


class ChunkChain:
    """The keys of one request's whole chunks, extended as its tokens become known.

    The key of a chunk is the hash of the key before it, of what else the chunk depends on, and of
    its token ids. So it names the whole prefix up to the end of the chunk.

    A model with several cache groups has a chunk of each for the same tokens, each with its own
    key, derived from the common one. For a group of recurrent states it names the state behind the
    chunk's last token.

    Attributes:
        chunk_tokens: tokens in one chunk.
        epoch: which weights.
        groups: per group, keys of the chunks hashed so far, in prefix order; not to be changed by
            the reader.
    """

    __slots__ = ("_last", "_links", "_root", "chunk_tokens", "epoch", "groups")

    def __init__(
        self,
        namespace: bytes,
        chunk_tokens: int,
        root_extra: bytes = b"",
        groups: int = 1,
        epoch: Epoch = CHECKPOINT,
    ) -> None:
        """Start without tokens.

        Args:
            namespace: :attr:`Namespace.fingerprint`.
            chunk_tokens: tokens in one chunk.
            root_extra: what the whole request depends on (cache salt, adapter), from
                :func:`pack`.
            groups: cache groups of the model.
            epoch: which weights.

        Raises:
            ValueError: if ``chunk_tokens`` is not positive.
        """
        if chunk_tokens <= 0:
            raise ValueError(f"a chunk must have at least one token, got {chunk_tokens}")
        self.chunk_tokens = chunk_tokens
        self.epoch = epoch
        self._links: list[ChunkKey] = []
        self._last: list[int] = []
        self.groups: tuple[list[ChunkKey], ...] = (self._links,)
        if groups > 1:
            self.groups = tuple([] for _ in range(groups))
        self._root = blake2b(
            pack((_SCHEME, namespace, chunk_tokens, root_extra, *epoch.mark)),
            digest_size=KEY_BYTES,
        ).digest()

    @property
    def keys(self) -> list[ChunkKey]:
        """Keys of the first group's chunks."""
        return self.groups[0]

    def extend(
        self,
        tokens: Sequence[int],
        extra_of: Callable[[int, int], bytes] | None = None,
        *,
        end: int | None = None,
    ) -> None:
        """Hash the whole chunks of ``tokens`` that are not hashed yet, and all of them anew if the
        last one that was has changed.

        Args:
            tokens: all token ids of the request, from its first one on. If fewer are whole chunks
                than were before, nothing changes.
            end: tokens to look at; all if it is None.
            extra_of: for the token positions ``[start, end)`` of a chunk, what the chunk depends
                on beyond its token ids (multimodal inputs, embeddings), from :func:`pack`, or
                empty.

        Raises:
            ValueError: if a token id is not in ``0 .. MAX_TOKEN``; the keys stay as they
                were then.
        """
        size = self.chunk_tokens
        start = len(self._links) * size
        end = (len(tokens) if end is None else end) // size * size
        if start > end:
            return
        changed = start > 0 and list(tokens[start - size : start]) != self._last
        if start == end and not changed:
            return
        width = size * _TOKEN_BYTES
        if changed:
            start = 0
        fresh = tokens[start:end]
        content = _token_bytes(fresh)
        if changed:
            for keys in (self._links, *self.groups):
                keys.clear()
        parent: bytes = self._links[-1] if self._links else self._root
        hashed: list[bytes] = []
        for offset in range(0, len(content), width):
            # Parent and tokens have a fixed length here, so only the extra needs its own.
            head = _NO_EXTRA
            if extra_of is not None:
                first = start + offset // _TOKEN_BYTES
                if extra := extra_of(first, first + size):
                    head = len(extra).to_bytes(4, "little") + extra
            parent = blake2b(
                parent + head + content[offset : offset + width], digest_size=KEY_BYTES
            ).digest()
            hashed.append(parent)
        self._last = list(fresh[-size:])
        added = cast(list[ChunkKey], hashed)
        self._links += added
        if len(self.groups) > 1:
            for group, keys in enumerate(self.groups):
                keys += [_key_of_group(link, group) for link in added]


def prompt_digest(
    tokens: Sequence[int], root_extra: bytes, extra: bytes, epoch: Epoch = CHECKPOINT
) -> bytes:
    """Names a whole prompt: two engines that were given the same one, and compute it with the same
    weights, have the same digest.

    Args:
        tokens: its token ids.
        root_extra: what it depends on as a whole, see :class:`ChunkChain`.
        extra: what it depends on beyond that (multimodal inputs).
        epoch: which weights.

    Raises:
        ValueError: if a token id is not in ``0 .. MAX_TOKEN``.
    """
    return blake2b(
        pack((_SCHEME, root_extra, extra, _token_bytes(tokens), *epoch.mark)), digest_size=KEY_BYTES
    ).digest()


def _token_bytes(tokens: Sequence[int]) -> bytes:
    try:
        ids = array("I", tokens)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers in 0 .. {MAX_TOKEN}: {error}") from error
    if len(ids) != len(tokens):  # bytes count as a sequence of integers, but not here
        raise ValueError(f"token ids must be integers, got {type(tokens).__name__}")
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def _key_of_group(link: ChunkKey, group: int) -> ChunkKey:
    return ChunkKey(blake2b(b"%b group %d" % (link, group), digest_size=KEY_BYTES).digest())
