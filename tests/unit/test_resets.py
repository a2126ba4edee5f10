"""vLLM's block pool forgets its hashes whatever Lamina still reads, and not while a request has
blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_events import AllBlocksCleared
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from lamina_kv.control.leases import LeaseBook
from lamina_kv.engines.vllm.requests import VllmBlockPool
from lamina_kv.engines.vllm.resets import reset_despite_readers

HASH = make_block_hash_with_group_id(BlockHash(b"k" * 32), 0)


class Cache:
    """vLLM's pool, with one request that has put a block under a hash."""

    def __init__(self, *, mended: bool = True) -> None:
        self.pool = BlockPool(8, True, 16, enable_kv_cache_events=True)
        self.tables: dict[str, list[Any]] = {"r": self.pool.get_new_blocks(2)}
        self.pool._insert_block_hash(HASH, self.tables["r"][0], 16)
        self.leaving: list[str] = []
        single = SimpleNamespace(block_pool=self.pool, req_to_blocks=self.tables)
        manager: Any = SimpleNamespace(
            coordinator=SimpleNamespace(single_type_managers=(single, single))
        )
        if mended:
            reset_despite_readers(manager, lambda: self.leaving)
        self.book = LeaseBook(VllmBlockPool(self.pool))

    @property
    def found(self) -> bool:
        return self.pool.cached_block_hash_to_block.get_one_block(HASH) is not None


def test_leased_blocks_lose_their_hash_and_stay_leased() -> None:
    cache = Cache()
    blocks = tuple(block.block_id for block in cache.tables["r"])
    lease = cache.book.take(blocks)
    cache.pool.free_blocks(cache.tables.pop("r"))
    assert cache.pool.get_num_free_blocks() == 5
    assert cache.pool.reset_prefix_cache()
    assert not cache.found
    assert cache.pool.get_num_free_blocks() == 5, "what is still read was given away"
    assert cache.pool.take_events() == [AllBlocksCleared()]
    taken = cache.pool.get_new_blocks(5)
    assert not {block.block_id for block in taken} & set(blocks)
    lease.release()
    assert cache.pool.get_num_free_blocks() == 2
    assert not cache.found


def test_what_vllm_will_free_when_a_step_is_over_is_not_waited_for() -> None:
    cache = Cache()
    kept = cache.tables.pop("r")  # as in Scheduler.deferred_frees
    assert cache.pool.reset_prefix_cache()
    cache.pool.free_blocks(reversed(kept))
    assert cache.pool.get_num_free_blocks() == 7
    assert not cache.found


def test_vllm_alone_waits_for_readers() -> None:
    """Else there is nothing to mend any more."""
    cache = Cache(mended=False)
    cache.book.take(tuple(block.block_id for block in cache.tables["r"]))
    cache.pool.free_blocks(cache.tables.pop("r"))
    assert not cache.pool.reset_prefix_cache()
    assert cache.found


@pytest.mark.parametrize("leased", [False, True])
def test_a_request_is_waited_for(leased: bool) -> None:
    cache = Cache()
    if leased:
        cache.book.take(tuple(block.block_id for block in cache.tables["r"]))
    assert not cache.pool.reset_prefix_cache()
    assert cache.found


def test_a_request_that_has_ended_under_its_load_is_not_waited_for() -> None:
    cache = Cache()
    cache.leaving.append("r")
    assert cache.pool.reset_prefix_cache()
    assert not cache.found


def test_a_pool_without_readers_is_reset_as_ever() -> None:
    cache = Cache()
    cache.pool.free_blocks(cache.tables.pop("r"))
    assert cache.pool.reset_prefix_cache()
    assert (cache.found, cache.pool.get_num_free_blocks()) == (False, 7)
