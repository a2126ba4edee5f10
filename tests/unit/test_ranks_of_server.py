"""Guards that a rank knows how many ranks its server has exactly where vLLM says so: parts of a
store whose number is higher are given up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from vllm.config import VllmConfig

from lamina.engines.vllm.worker_side import ranks_of_server


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
