"""Guards: a key names exactly the prefix up to its chunk's end and all that the prefix depends
on. Equal means equal, and any difference shows from its chunk on."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lamina_kv.keys import MAX_TOKEN, ChunkChain, Packable, pack
from lamina_kv.plan import ChunkKey

CHUNK = 4
tokens_of = st.lists(st.integers(0, MAX_TOKEN), max_size=8 * CHUNK)
whole_chunks = st.integers(1, 8).flatmap(
    lambda n: st.lists(st.integers(0, MAX_TOKEN), min_size=n * CHUNK, max_size=n * CHUNK)
)
roots = st.binary(max_size=12)
extras = st.dictionaries(st.integers(0, 7), st.binary(max_size=8), max_size=8)
packables: st.SearchStrategy[Packable] = st.recursive(
    st.none() | st.integers() | st.text(max_size=6) | st.binary(max_size=6),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


def different(value: bytes) -> st.SearchStrategy[bytes]:
    """Other bytes, as often as not of the same length."""
    same_length = st.binary(min_size=len(value), max_size=len(value))
    return (st.binary(max_size=12) | same_length).filter(lambda other: other != value)


def extra_of(given: dict[int, bytes]) -> Callable[[int, int], bytes]:
    return lambda start, end: given.get(start // CHUNK, b"")


def keys(
    tokens: list[int],
    extra: dict[int, bytes] | None = None,
    root: bytes = b"",
    namespace: bytes = b"n" * 16,
) -> list[ChunkKey]:
    chain = ChunkChain(namespace, CHUNK, root)
    chain.extend(tokens, extra_of(extra or {}))
    return chain.keys


@settings(deadline=None)
@given(tokens=tokens_of, extra=extras, length=st.integers(0, 99))
def test_keys_of_a_prefix_are_a_prefix(
    tokens: list[int], extra: dict[int, bytes], length: int
) -> None:
    assert keys(tokens[:length], extra) == keys(tokens, extra)[: len(tokens[:length]) // CHUNK]


@settings(deadline=None)
@given(tokens=tokens_of, extra=extras, lengths=st.lists(st.integers(0, 40), max_size=8))
def test_any_way_to_get_there_gives_the_same_keys(
    tokens: list[int], extra: dict[int, bytes], lengths: list[int]
) -> None:
    chain = ChunkChain(b"n" * 16, CHUNK)
    for length in lengths:
        chain.extend(tokens[:length], extra_of(extra))
        assert chain.keys == keys(tokens, extra)[: len(chain.keys)]
    chain.extend(tokens, extra_of(extra))
    assert chain.keys == keys(tokens, extra)


@settings(deadline=None)
@given(tokens=tokens_of, data=st.data())
def test_a_token_changes_its_chunk_and_all_later_ones(
    tokens: list[int], data: st.DataObject
) -> None:
    assume(tokens)
    position = data.draw(st.integers(0, len(tokens) - 1))
    other = list(tokens)
    other[position] = data.draw(st.integers(0, MAX_TOKEN).filter(lambda t: t != tokens[position]))
    ours, theirs = keys(tokens), keys(other)
    same = position // CHUNK
    assert ours[:same] == theirs[:same]
    assert not set(ours[same:]) & set(theirs[same:])


@settings(deadline=None)
@given(tokens=whole_chunks, extra=extras, data=st.data())
def test_an_extra_changes_its_chunk_and_all_later_ones(
    tokens: list[int], extra: dict[int, bytes], data: st.DataObject
) -> None:
    chunk = data.draw(st.integers(0, len(tokens) // CHUNK - 1))
    ours = extra.get(chunk, b"")
    other = data.draw(different(ours))
    before, after = keys(tokens, extra), keys(tokens, {**extra, chunk: other})
    assert before[:chunk] == after[:chunk]
    assert not set(before[chunk:]) & set(after[chunk:])


@settings(deadline=None)
@given(tokens=whole_chunks, root=roots, data=st.data())
def test_salt_adapter_and_namespace_change_every_key(
    tokens: list[int], root: bytes, data: st.DataObject
) -> None:
    other = data.draw(different(root))
    assert not set(keys(tokens, root=root)) & set(keys(tokens, root=other))
    assert not set(keys(tokens, namespace=root)) & set(keys(tokens, namespace=other))


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, MAX_TOKEN), min_size=CHUNK, max_size=CHUNK),
    first=st.binary(max_size=24),
    second=st.binary(max_size=24),
    cut=st.integers(0, 48),
)
def test_nothing_slides_between_root_extra_and_tokens(
    tokens: list[int], first: bytes, second: bytes, cut: int
) -> None:
    together = first + second
    moved = (together[:cut], together[cut:])
    assume(moved != (first, second))
    assert keys(tokens, {0: second}, root=first) != keys(tokens, {0: moved[1]}, root=moved[0])
    assert keys(tokens, namespace=first, root=second) != keys(
        tokens, namespace=moved[0], root=moved[1]
    )


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, MAX_TOKEN), min_size=CHUNK, max_size=CHUNK))
def test_an_extra_that_looks_like_tokens_is_not_tokens(tokens: list[int]) -> None:
    raw = b"".join(token.to_bytes(4, "little") for token in tokens)
    assert keys(tokens, {0: b""}) != keys(tokens, {0: raw})
    assert keys(tokens * 2)[1] != keys(tokens, {0: raw})[0]


@settings(deadline=None)
@given(one=packables, other=packables)
def test_different_values_pack_differently(one: Packable, other: Packable) -> None:
    assert (pack(one) == pack(other)) == (one == other)
    assert pack((one, other)) != pack((one, (other,)))
