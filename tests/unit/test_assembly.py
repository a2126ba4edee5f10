"""A bound that nothing could ever pass is an error of the rank, at its start."""

from __future__ import annotations

import pytest

from lamina.config import load_config
from lamina.data.assembly import assemble
from lamina.data.replicas import Replicas
from lamina.geometry import CacheGeometry, Row


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"save": {"max_inflight": 10}}, r"save\.max_inflight: 10 bytes is less than one chunk"),
        (
            {"disk": {"path": "/s", "capacity": 4096, "max_inflight": 10}},
            r"disk\.max_inflight: 10 bytes is less than one chunk",
        ),
    ],
)
def test_a_bound_smaller_than_a_chunk_is_an_error(settings: dict[str, object], key: str) -> None:
    geometry = CacheGeometry((Row(("a",), 0, 0, 64, 64),), 4, 16, 32, (256,))
    with pytest.raises(ValueError, match=key):
        assemble(
            load_config(settings, {}),
            geometry,
            (),
            rank=0,
            replicas=Replicas(0, 1, lambda word: [word]),
            slabs=1,
            place=None,
        )
