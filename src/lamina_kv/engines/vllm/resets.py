"""Resets of vLLM's prefix cache wait for requests, and not for readers of what requests left.

``BlockPool.reset_prefix_cache`` forgets hashes: it touches neither reference counts nor the free
list. vLLM refuses it while any block is in use, because a *request* that goes on would put what it
holds under a hash again. Blocks that no request has are in use, too: Lamina leases what it still
saves or pushes, and quarantines what a peer may still write; under asynchronous scheduling vLLM
itself keeps what a request in flight has left. No hash leads to those blocks after a reset, and
each is freed when its reader is done. So a reset need not wait for them. It could not: an engine
without requests may never step again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager


def reset_despite_readers(
    manager: KVCacheManager,
    leaving: Callable[[], Collection[str]],
    done: Callable[[], None] = lambda: None,
) -> None:
    """Have vLLM's pools reset their hashes whenever no request has blocks.

    Args:
        manager: vLLM's cache manager, whose pools are changed.
        leaving: gives requests that have ended, and whose blocks vLLM keeps until what is loaded
            into them has arrived. They never come under a hash.
        done: called when a pool has been reset.
    """
    managers = manager.coordinator.single_type_managers

    def requests_hold_blocks() -> bool:
        gone = leaving()
        return any(
            blocks and request_id not in gone
            for single in managers
            for request_id, blocks in single.req_to_blocks.items()
        )

    for pool in dict.fromkeys(single.block_pool for single in managers):
        _wrap(pool, requests_hold_blocks, done)


def _wrap(
    pool: BlockPool, requests_hold_blocks: Callable[[], bool], done: Callable[[], None]
) -> None:
    reset = pool.reset_prefix_cache

    def forget() -> bool:
        if requests_hold_blocks():
            return bool(reset())
        # All that the reset asks before it forgets the hashes; the null block is never free.
        pool.get_num_free_blocks = lambda: pool.num_gpu_blocks - 1
        try:
            return bool(reset())
        finally:
            del pool.get_num_free_blocks

    def wrapped() -> bool:
        forgotten = forget()
        if forgotten:
            done()
        return forgotten

    pool.reset_prefix_cache = wrapped
