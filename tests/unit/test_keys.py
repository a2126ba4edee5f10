"""Guards: chunk keys are the same in every process and everywhere else, and name all that
changes the bytes of a chunk."""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import pytest

import lamina_kv.keys
from lamina_kv.keys import KEY_BYTES, MAX_TOKEN, ChunkChain, Namespace, Packable, pack

NAMESPACE = Namespace(
    model="LlamaForCausalLM",
    checkpoint="0123",
    model_dtype="bfloat16",
    cache_dtype="auto",
    quantization="",
    groups=(("full", 16, 0),),
    chunk_tokens=64,
    layout="flash/NHD",
    page_bytes=(4096, 4096),
    tensor_parallel=2,
    pipeline_parallel=1,
    context_parallel=1,
    speculation="",
    engine="vllm",
    engine_format="0.32",
)

SCRIPT = """
import sys
from lamina_kv.keys import ChunkChain, Namespace, pack
namespace = eval(sys.argv[1])
chain = ChunkChain(namespace.fingerprint, 64, pack(("salt", "")))
chain.extend(range(200))
print(namespace.hex, *(key.hex() for key in chain.keys))
"""


class Constant(Sequence[int]):
    """A sequence that is not a list, as engines hand out; knows what it was asked for."""

    def __init__(self, values: list[int]) -> None:
        self._values = values
        self.asked: list[int | slice] = []

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        self.asked.append(index)
        return self._values[index]

    def __len__(self) -> int:
        return len(self._values)


def keys(tokens: Sequence[int], chunk_tokens: int = 64) -> list[bytes]:
    chain = ChunkChain(NAMESPACE.fingerprint, chunk_tokens, pack(("salt", "")))
    chain.extend(tokens)
    return [bytes(key) for key in chain.keys]


class TestStability:
    def test_keys_never_change(self) -> None:
        # A change here orphans every store in the field: make it on purpose, and give the
        # scheme in lamina_kv.keys another number.
        assert NAMESPACE.hex == "bff5c14f565b322967cb3a6908878079"
        assert [key.hex() for key in keys(range(128))] == [
            "d337ff2a04a6e9ef516c2299306cd6b703ea5d1f",
            "cb590d63a213a5d423dce8087ccaa9880cff00e6",
        ]

    @pytest.mark.parametrize("seed", ["0", "1", "4242"])
    def test_another_process_has_the_same_keys(self, seed: str) -> None:
        printed = subprocess.run(
            [sys.executable, "-c", SCRIPT, repr(NAMESPACE)],
            env={
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": str(Path(lamina_kv.keys.__file__).parents[1]),
            },
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        assert printed == [NAMESPACE.hex, *(key.hex() for key in keys(range(200)))]

    @pytest.mark.parametrize("kind", [list, tuple, Constant, lambda ids: array("q", ids)])
    def test_any_sequence_of_ids_has_the_same_keys(self, kind: type) -> None:
        ids = list(range(150))
        assert keys(kind(ids)) == keys(ids)
        assert len(keys(ids)) == 2
        assert {len(key) for key in keys(ids)} == {KEY_BYTES}


class TestNamespace:
    @pytest.mark.parametrize("name", [field.name for field in fields(Namespace)])
    def test_every_field_changes_the_fingerprint(self, name: str) -> None:
        value = getattr(NAMESPACE, name)
        other: Any = {str: f"{value}x", int: 7, tuple: (4096, 8192)}[type(value)]
        assert replace(NAMESPACE, **{name: other}).fingerprint != NAMESPACE.fingerprint

    def test_rows_do_not_merge(self) -> None:
        shapes = [(12, 3), (1, 23), (123,), (3, 12), (12, 3, 0)]
        assert len({replace(NAMESPACE, page_bytes=shape).hex for shape in shapes}) == len(shapes)

    def test_hex_names_a_directory(self) -> None:
        assert NAMESPACE.hex == NAMESPACE.fingerprint.hex()
        assert len(NAMESPACE.hex) == 32

    def test_describe_is_for_people(self) -> None:
        described = NAMESPACE.describe()
        assert described["page_bytes"] == "(4096, 4096)"
        assert list(described) == [field.name for field in fields(Namespace)]

    @pytest.mark.parametrize("name", ["model", "checkpoint", "cache_dtype", "layout", "engine"])
    def test_what_is_unknown_is_no_namespace(self, name: str) -> None:
        empty: Any = ""
        with pytest.raises(ValueError, match=name):
            replace(NAMESPACE, **{name: empty})


class TestPack:
    def test_types_do_not_mix(self) -> None:
        values: list[Packable] = [None, 1, "1", b"1", (1,), ("1",), ((1,),), (), "", b"", 0, -1]
        assert len({pack(value) for value in values}) == len(values)

    def test_text_that_is_no_unicode_can_be_packed(self) -> None:
        assert pack("\ud800") != pack("\ud801")

    @pytest.mark.parametrize("value", [True, 1.0, [1], {"a": 1}, ("a", [1])])
    def test_other_types_are_refused(self, value: object) -> None:
        with pytest.raises(TypeError, match="cannot be part of a key"):
            pack(value)  # type: ignore[arg-type]


class TestChain:
    def test_only_whole_chunks_have_keys(self) -> None:
        assert [len(keys(range(n))) for n in (0, 63, 64, 127, 128)] == [0, 0, 1, 1, 2]

    def test_hashed_tokens_are_not_looked_at_again(self) -> None:
        chain = ChunkChain(b"n" * 16, 64)
        chain.extend(range(70))
        tokens = Constant(list(range(400)))
        chain.extend(tokens, end=200)
        chain.extend(tokens, end=201)
        chain.extend(tokens)
        first, last = slice(0, 64), slice(128, 192)
        asked = [first, slice(64, 192), last, last, slice(192, 384)]
        assert tokens.asked == asked, "but for the last chunk"

    @pytest.mark.parametrize("more", [0, 3, 20])
    def test_what_was_taken_back_is_not_built_upon(self, more: int) -> None:
        chain = ChunkChain(b"n" * 16, 4, groups=2)
        chain.extend(range(13))
        later = [*range(11), 99, *range(more)]
        chain.extend(later)
        fresh = ChunkChain(b"n" * 16, 4, groups=2)
        fresh.extend(later)
        assert chain.groups == fresh.groups
        assert all(len(keys) == 3 + more // 4 for keys in chain.groups)

    def test_what_is_no_token_id_takes_no_key_away(self) -> None:
        chain = ChunkChain(b"n" * 16, 4)
        chain.extend(range(8))
        before = list(chain.keys)
        with pytest.raises(ValueError, match="token ids must be integers"):
            chain.extend([-1, *range(6), 99])
        assert chain.keys == before

    def test_fewer_tokens_than_hashed_change_nothing(self) -> None:
        chain = ChunkChain(b"n" * 16, 4)
        chain.extend(range(12))
        before = list(chain.keys)
        chain.extend(range(5))
        assert chain.keys == before

    def test_extras_are_asked_for_by_position(self) -> None:
        asked = []

        def extra_of(start: int, end: int) -> bytes:
            asked.append((start, end))
            return b""

        chain = ChunkChain(b"n" * 16, 4)
        chain.extend(range(5), extra_of)
        chain.extend(range(13), extra_of)
        assert asked == [(0, 4), (4, 8), (8, 12)]

    @staticmethod
    def same_extra(extra: bytes, start: int, end: int) -> bytes:
        return extra

    def test_inputs_that_differ_in_one_bit_have_different_keys(self) -> None:
        found = set()
        for root, extra in [(b"a", b"a"), (b"c", b"a"), (b"a", b"c"), (b"c", b"c")]:
            chain = ChunkChain(b"n" * 16, 4, root)
            chain.extend(range(4), partial(self.same_extra, extra))
            found |= {*chain.keys}
        assert len(found) == 4

    def test_an_empty_extra_is_none(self) -> None:
        with_extra, without = ChunkChain(b"n" * 16, 4), ChunkChain(b"n" * 16, 4)
        with_extra.extend(range(8), lambda start, end: b"")
        without.extend(range(8))
        assert with_extra.keys == without.keys

    def test_the_largest_token_id(self) -> None:
        assert keys([MAX_TOKEN] * 64) != keys([MAX_TOKEN - 1] * 64)

    @pytest.mark.parametrize(
        "tokens", [[-1] * 4, [MAX_TOKEN + 1] * 4, [1.5] * 4, ["1"] * 4, "abcd", b"abcdabcdabcdabcd"]
    )
    def test_what_is_no_token_id_is_refused_and_adds_no_key(self, tokens: Sequence[int]) -> None:
        chain = ChunkChain(b"n" * 16, 4)
        with pytest.raises(ValueError, match="token ids must be integers"):
            chain.extend(tokens)
        assert chain.keys == []

    @pytest.mark.parametrize("size", [0, -64])
    def test_a_chunk_has_tokens(self, size: int) -> None:
        with pytest.raises(ValueError, match="at least one token"):
            ChunkChain(b"n" * 16, size)

    def test_chunk_size_is_part_of_the_key(self) -> None:
        roots = []
        for size in (4, 8):
            chain = ChunkChain(b"n" * 16, size)
            chain.extend([7] * size, lambda start, end: bytes(32))
            roots.append(chain.keys[0])
        assert roots[0] != roots[1]
