"""What a hit costs that another engine of this machine has saved, beside a hit in an engine's own
host memory: one engine saves prompts, and both are asked for them in turn.

    python bench/neighbours.py '{"kind": "directory", "path": "/dev/shm/lamina-bench"}'
    python bench/neighbours.py '{"kind": "valkey", "url": "unix:///tmp/valkey.sock"}'

A hit through the store is kept in host memory from then on, so each prompt is asked for once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from lamina_kv.bench.engine import Engine
from lamina_kv.bench.serving import Serving
from lamina_kv.bench.settings import Connector, EngineSpec, PromptSource
from lamina_kv.bench.shapes import Dtype, LlamaShape

OBJECTS = 1.2
"""Room that a chunk takes beyond its bytes, at most: headers and padding of small objects."""


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("tier", type=json.loads, help="the tier's configuration, as JSON")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()

    shape = LlamaShape(options.layers, 1024, 8, 128, 128, Dtype.BFLOAT16)
    tokens, size = options.tokens, shape.kv_bytes(options.tokens)
    tier = {"name": "shared", "keep": "all", **options.tier}
    source = PromptSource()
    prompts = [[*source.prompt(tokens), 1] for _ in range(options.repeat + 1)]

    def spec(work: Path, name: str, held: int) -> EngineSpec:
        lamina: dict[str, Any] = {
            "host": {"capacity": int(held * size * OBJECTS)},
            "tiers": [tier],
            "load": {"deadline": 60},
        }
        return EngineSpec(
            name=name,
            shape=shape,
            model=work,
            tokens=tokens + 2 * shape.block_size,
            step_tokens=2048,
            connector=Connector.LAMINA,
            lamina=lamina,
        )

    found: dict[str, list[float]] = {"host": [], "shared": [], "step": [], "copy": []}
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as name:
        work = Path(name)
        shape.write_config(work)
        first = Engine(spec(work, "first", len(prompts)), work)
        second = Engine(spec(work, "second", 2), work)
        with first, second:
            first.ready()
            second.ready()
            for prompt in prompts:
                first.first_token(prompt, hit=0)
                first.call(Serving.drain)
            for turn, prompt in enumerate(prompts):
                first.call(Serving.forget)
                second.call(Serving.forget)
                host = first.first_token(prompt, hit=tokens, place="host").seconds
                step = first.first_token(prompt, hit=tokens, place="engine").seconds
                shared = second.first_token(prompt, hit=tokens, place="shared").seconds
                second.call(Serving.drain)
                copy = first.call(Serving.copy_memory, size)
                if turn:  # the first one touches memory for the first time
                    for key, took in zip(found, (host, shared, step, copy), strict=True):
                        found[key].append(took)
    print(f"{tokens} tokens, {size / 1e6:.0f} MB, load of the machine {os.getloadavg()[0]:.1f}")
    for key, seconds in found.items():
        each = " ".join(f"{1000 * second:.0f}" for second in seconds)
        print(f"{key:7} median {1000 * statistics.median(seconds):6.0f} ms: {each}")
    ratios = [a / b for a, b in zip(found["shared"], found["host"], strict=True)]
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    print(f"shared / host: median {middle:.2f}, {least:.2f} to {most:.2f}")


if __name__ == "__main__":
    main()
