"""What an engine publishes of itself at ``/metrics``, as far as routing needs it.

A server's page has thousands of lines, and is read every few seconds: only the lines that are
needed are looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lamina_kv.push.addresses import normalise

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_USAGE = "vllm:kv_cache_usage_perc"
_CACHE = "vllm:cache_config_info"
_TIER = "lamina_tier_capacity_bytes"
_PEER = "lamina_push_peer_in_use"
_LINE = re.compile(
    rf"^({'|'.join((_RUNNING, _WAITING, _USAGE, _CACHE, _TIER, _PEER))})\{{(.*)\}} (\S+)",
    re.MULTILINE,
)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one data-parallel rank is doing.

    Attributes:
        running: requests.
        waiting: requests.
        usage: share of its KV cache in use.
        capacity: tokens that its cache holds; None if it does not say, or if Lamina keeps more in
            tiers behind it.
    """

    running: int = 0
    waiting: int = 0
    usage: float = 0.0
    capacity: int | None = None


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What an engine is doing.

    Attributes:
        ranks: by their number.
        away: addresses of prefill engines from which a decode engine takes no pushes now, because
            they have failed; as ``push.addresses.normalise`` writes them.
    """

    ranks: Mapping[int, RankReport] = field(default_factory=dict)
    away: frozenset[str] = frozenset()


def read_report(page: str) -> EngineReport:
    """What a page says; what it does not say, or says in another way than expected, is missing."""
    lines = [*_lines(page)]
    numbers = {rank for name, rank, _, _ in lines if name == _RUNNING}
    tiers = any(value for name, _, _, value in lines if name == _TIER)
    away = {
        labels.get("peer", "") for name, _, labels, value in lines if name == _PEER and not value
    }

    def value(wanted: str, number: int) -> float:
        return sum(value for name, rank, _, value in lines if (name, rank) == (wanted, number))

    def capacity(number: int) -> int | None:
        if tiers:
            return None
        for name, rank, labels, _ in lines:
            if (name, rank) == (_CACHE, number):
                blocks, size = (labels.get(key, "") for key in ("num_gpu_blocks", "block_size"))
                if blocks.isdecimal() and size.isdecimal():
                    return int(blocks) * int(size)
        return None

    return EngineReport(
        {
            number: RankReport(
                int(value(_RUNNING, number)),
                int(value(_WAITING, number)),
                value(_USAGE, number),
                capacity(number),
            )
            for number in sorted(numbers)
        },
        frozenset(_normalised(away)),
    )


def _lines(page: str) -> Iterator[tuple[str, int, dict[str, str], float]]:
    for name, labels, value in _LINE.findall(page):
        pairs = dict(_LABEL.findall(labels))
        number = pairs.get("engine", "")
        try:
            figure = float(value)
        except ValueError:
            continue
        if math.isfinite(figure):
            yield name, int(number) if number.isdecimal() else 0, pairs, figure


def _normalised(addresses: set[str]) -> Iterator[str]:
    for address in addresses:
        try:
            yield normalise(address)
        except ValueError:
            continue
