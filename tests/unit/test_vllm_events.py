"""Events of tiers name blocks as vLLM's own events do, so that a router can match the two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    maybe_convert_block_hash,
)
from vllm.v1.request import Request

from lamina_kv.config import load_config
from lamina_kv.control.reporting.residency import Change
from lamina_kv.engines.vllm.events import Blocks, KvEvents
from lamina_kv.engines.vllm.idle import IdleScheduler
from lamina_kv.engines.vllm.requests import VllmRequest
from lamina_kv.engines.vllm.resets import reset_despite_readers
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.plan import NEAR, TierName
from lamina_kv.tiers.regard import USUAL

HASH, CHUNK = 16, 64
FULL = Group(GroupKind.FULL, HASH)
WIDE = Group(GroupKind.FULL, 2 * HASH)
STATE = Group(GroupKind.STATE, CHUNK)
SMALL_STATE = Group(GroupKind.STATE, 2 * HASH)
GROUPS = (FULL, WIDE, STATE, SMALL_STATE)
SPECS = (("full_attention", None), ("sliding_window", 128), ("mamba", None), ("mamba", None))
TIERS = {
    "tiers": [
        {"kind": "disk", "name": "ssd", "path": "/store", "capacity": "1GiB"},
        {"kind": "directory", "name": "nfs", "path": "/shared"},
    ]
}
SSD, NFS = TierName("ssd"), TierName("nfs")

init_none_hash(sha256_cbor)


def request(tokens: int = 3 * CHUNK, **more: Any) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=list(range(tokens)),
        sampling_params=SamplingParams(max_tokens=50),
        pooling_params=None,
        block_hasher=get_request_block_hasher(HASH, sha256_cbor),
        **more,
    )


def image(name: str, offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier=name,
        mm_position=PlaceholderRange(offset=offset, length=length),
        mm_hash=name,
    )


class Cache:
    """vLLM's pool, and what listens to tiers beside it."""

    def __init__(self) -> None:
        self.pool = BlockPool(64, True, HASH, enable_kv_cache_events=True)
        self.events = KvEvents(load_config(TIERS, {}).tiers, CHUNK, GROUPS)
        self.tables: dict[str, list[Any]] = {}  # of requests
        single = SimpleNamespace(block_pool=self.pool, req_to_blocks=self.tables)
        manager: Any = SimpleNamespace(
            block_pool=self.pool,
            kv_cache_event_metadata=SPECS,
            coordinator=SimpleNamespace(single_type_managers=(single,)),
        )
        self.events.bind(manager)
        reset_despite_readers(manager, list, self.events.pool_was_reset)

    def describe(self, of: Request, group: int, index: int) -> Blocks | None:
        view = VllmRequest(of, lambda: ((), (), ()), GROUPS, "", False, 1, None, USUAL)
        return self.events.describe(view, group, index)

    def label(self, of: Request, group: int, index: int) -> Blocks:
        label = self.describe(of, group, index)
        assert label is not None
        return label

    def take(self, *changes: Change, again: list[str] | None = None) -> list[Any]:
        said = [] if again is None else again
        source: Any = SimpleNamespace(
            take=lambda: list(changes), tell_again=lambda: said.append("again")
        )
        return self.events.take(source)

    def engines_own(self, of: Request, group: int) -> list[Any]:
        """What vLLM itself announces when the request's blocks are in its cache."""
        size = GROUPS[group].block_tokens
        count = of.num_tokens // size
        self.pool.cache_full_blocks(
            of, self.pool.get_new_blocks(count), 0, count, size, kv_cache_group_id=group
        )
        return self.pool.take_events()


def told(label: Blocks) -> tuple[object, ...]:
    """Hashes as events have them."""
    return tuple(maybe_convert_block_hash(each) for each in label.hashes)


def by_block(events: list[BlockStored]) -> dict[object, tuple[object, ...]]:
    """Each block that is stored, with all that tells what it is."""
    found: dict[object, tuple[object, ...]] = {}
    for event in events:
        parent = event.parent_block_hash
        for number, block in enumerate(event.block_hashes):
            extra = None if event.extra_keys is None else event.extra_keys[number]
            tokens = event.token_ids[number * event.block_size : (number + 1) * event.block_size]
            found[block] = (
                event.group_idx, parent, tokens, event.block_size, event.lora_id,
                event.lora_name, extra, event.session_id,
            )  # fmt: skip
            parent = block
    return found


@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"cache_salt": "salt"},
        {"lora_request": LoRARequest("name", 3, "/somewhere")},
        {"mm_features": [image("a", 10, 40), image("b", 60, 100)]},
        {"session_id": "session"},
    ],
    ids=["plain", "salt", "adapter", "images", "session"],
)
def test_blocks_are_what_vllm_calls_them(group: int, more: dict[str, Any]) -> None:
    cache, asked = Cache(), request(**more)
    labels = [cache.label(asked, group, index) for index in range(3)]
    stored = cache.take(*(Change(NEAR, label, stored=True) for label in labels))
    assert by_block(stored) == by_block(cache.engines_own(asked, group))
    assert len(stored) == 3
    assert {(e.kv_cache_spec_kind, e.kv_cache_spec_sliding_window) for e in stored} == {
        SPECS[group]
    }


def test_of_states_a_chunk_has_the_block_that_ends_where_it_ends() -> None:
    cache, asked = Cache(), request()
    (stored,) = cache.take(Change(NEAR, cache.label(asked, 3, 1), stored=True))
    own = list(by_block(cache.engines_own(asked, 3)).items())
    assert list(by_block([stored]).items()) == own[3:4]


def test_each_tier_is_named_in_vllms_words() -> None:
    cache = Cache()
    label = cache.label(request(), 0, 1)
    events = cache.take(
        *(Change(tier, label, stored) for stored in (True, False) for tier in (NEAR, SSD, NFS))
    )
    assert [type(event) for event in events] == [BlockStored] * 3 + [BlockRemoved] * 3
    assert [(event.medium, event.locality, event.ownership) for event in events] == [
        ("CPU", "LOCAL", None),
        ("STORAGE", "LOCAL", "ssd"),
        ("STORAGE", "REMOTE", "nfs"),
    ] * 2
    assert {tuple(event.block_hashes) for event in events} == {told(label)}


def test_neighbours_that_go_are_one_event_and_the_order_stays() -> None:
    cache, asked = Cache(), request()
    first, second, third = (cache.label(asked, 0, index) for index in range(3))
    wide = cache.label(asked, 1, 0)
    events = cache.take(
        Change(NEAR, third, stored=False),
        Change(NEAR, second, stored=False),
        Change(NEAR, wide, stored=False),
        Change(NEAR, first, stored=True),
        Change(NEAR, first, stored=False),
    )
    assert [(type(event), event.group_idx, tuple(event.block_hashes)) for event in events] == [
        (BlockRemoved, 0, told(third) + told(second)),
        (BlockRemoved, 1, told(wide)),
        (BlockStored, 0, told(first)),
        (BlockRemoved, 0, told(first)),
    ]


def test_a_request_without_hashes_is_not_spoken_of() -> None:
    assert Cache().describe(request(), 0, 2) is not None
    asked = request()
    asked.block_hashes.pop()
    assert Cache().describe(asked, 0, 1) is not None
    assert Cache().describe(asked, 0, 2) is None


def test_names_are_equal_where_vllm_cannot_tell_blocks_apart() -> None:
    cache, other = Cache(), request(cache_salt="salt")
    labels = [cache.label(request(), group, index) for group in range(3) for index in range(3)]
    assert len({label.name for label in labels}) == 9
    assert cache.label(request(), 0, 1).name == labels[1].name
    assert cache.label(other, 0, 1).name != labels[1].name


def test_when_vllm_says_that_all_is_cleared_tiers_are_announced_again() -> None:
    cache, said = Cache(), list[str]()
    cache.take(again=said)
    blocks = cache.pool.get_new_blocks(1)
    assert cache.pool.reset_prefix_cache()
    assert cache.pool.take_events() == [AllBlocksCleared()]
    cache.take(again=said)
    cache.take(again=said)
    assert said == ["again"]
    cache.pool.free_blocks(blocks)


def test_a_reset_that_vllm_refuses_is_none() -> None:
    cache, said = Cache(), list[str]()
    cache.tables["r"] = cache.pool.get_new_blocks(1)
    assert not cache.pool.reset_prefix_cache()
    cache.take(again=said)
    assert said == []


def test_the_idle_side_says_nothing() -> None:
    assert IdleScheduler().take_events() == ()
