"""Guards that a rank knows how many ranks its server has exactly where vLLM says so: parts of a
store whose number is higher are given up. And that data-parallel ranks, which have slots of their
own, have the same part of a chunk: by key each finds what the other has saved."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from vllm.config import VllmConfig

from lamina_kv.engines.vllm.worker_side import ranks_of_server, tenant_of
from lamina_kv.keys import Namespace
from lamina_kv.tiers.contract import Tenant


@pytest.mark.parametrize(
    ("engines", "index", "engine_id", "ranks"),
    [
        pytest.param(1, 0, "cafe", 2, id="one engine"),
        pytest.param(4, 3, "cafe_dp3", 8, id="mixture of experts"),
        pytest.param(1, 0, "cafe_dp0", None, id="dense, the first of several"),
        pytest.param(1, 3, "cafe_dp3", None, id="dense, the last of several"),
        pytest.param(1, 3, "named by hand", None, id="dense, in another connector"),
        pytest.param(1, 0, None, 2, id="no name"),
    ],
)
def test_ranks_of_server(
    engines: int, index: int, engine_id: str | None, ranks: int | None
) -> None:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=engines, data_parallel_index=index, world_size=2
        ),
        kv_transfer_config=SimpleNamespace(engine_id=engine_id),
    )
    assert ranks_of_server(cast(VllmConfig, config)) == ranks


NAMESPACE = cast(Namespace, SimpleNamespace(hex="ab" * 16, describe=dict))


def tenant(engines: int, index: int, rank: int) -> Tenant:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=engines, data_parallel_index=index, world_size=2, rank=rank
        ),
        kv_transfer_config=SimpleNamespace(engine_id=f"cafe_dp{index}"),
    )
    return tenant_of(cast(VllmConfig, config), NAMESPACE, object_bytes=4096)


@pytest.mark.parametrize(
    "engines",
    [
        pytest.param(1, id="dense, of which each engine believes that it is alone"),
        pytest.param(2, id="mixture of experts"),
    ],
)
def test_data_parallel_ranks_have_the_same_parts_of_a_chunk(engines: int) -> None:
    tenants = [tenant(engines, index, rank) for index in (0, 1) for rank in (0, 1)]
    assert [each.rank for each in tenants] == [0, 1, 2, 3]
    assert [each.shard for each in tenants] == [0, 1, 0, 1]
    assert {each.namespace for each in tenants} == {NAMESPACE.hex}
