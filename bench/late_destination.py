"""A destination that becomes known while a long step of the prefill engine runs: how long until
the decode engine goes on.

Two engines of one machine, with a wire of a given rate between them. Each prompt is computed in one
step. The decode engine hears of it when a part of that step is over, and announces where it goes.

    python bench/late_destination.py --tokens 1024 --after 0.3 --link 1Gbit

It prints medians over ``--rounds``: from when the decode engine is asked until its forward begins,
until the prefill engine's forward ends, and the difference of the two. ``--after 0`` asks both at
once. Needs NIXL, root and iproute2, and a machine that does nothing else: in a step that is over
before the decode engine is asked nothing can be bound.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from lamina_kv.bench.engine import Engine
from lamina_kv.bench.network import DEVICE, PacedNetwork, bits_per_second
from lamina_kv.bench.ports import free_port
from lamina_kv.bench.serving import Part, Serving
from lamina_kv.bench.settings import Connector, EngineSpec, PromptSource
from lamina_kv.bench.shapes import Dtype, LlamaShape


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--after", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--link", default="1Gbit")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shape = LlamaShape(options.layers, 1024, 8, 128, 128, Dtype.BFLOAT16)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        work = Path(directory)
        shape.write_config(work)
        network = stack.enter_context(PacedNetwork(bits_per_second(options.link)))
        address = f"{network.addresses[0]}:{free_port()}"

        def start(end: int, push: dict[str, Any]) -> Engine:
            spec = EngineSpec(
                name=("prefill", "decode")[end],
                shape=shape,
                model=work,
                tokens=3 * options.tokens,
                step_tokens=options.tokens,
                connector=Connector.LAMINA,
                lamina={"host": {"capacity": 4 * shape.kv_bytes(shape.chunk_tokens)}, "push": push},
                role=("kv_producer", "kv_consumer")[end],
                environment={"UCX_TLS": "tcp", "UCX_NET_DEVICES": DEVICE},
                network=network.names[end],
            )
            return stack.enter_context(Engine(spec, work))

        prefill, decode = start(0, {"listen": address}), start(1, {"min_tokens": 0})
        for engine in (prefill, decode):
            engine.ready()
            engine.call(Serving.touch_cache)
        prompts = PromptSource()

        def serve(after: float) -> tuple[float, Part, Part]:
            """When the decode engine was asked, and both parts."""
            prompt, push = prompts.prompt(options.tokens), {"id": uuid.uuid4().hex}
            there = {"lamina_push": {**push, "prefill": address}}
            prefill.call(Serving.warm_up)
            prefill.begin(Serving.serve_part, prompt, {"lamina_push": push})
            time.sleep(after)
            asked = time.perf_counter()
            decode.begin(Serving.serve_part, prompt, there)
            computed = cast(Part, prefill.answer())
            prefill.begin(Serving.drain)
            pushed = cast(Part, decode.answer())
            prefill.answer()
            decode.call(Serving.drain)
            if (computed.computed, pushed.computed) != (options.tokens, 1):
                raise SystemExit(
                    f"the engines computed {computed.computed} and {pushed.computed} tokens"
                )
            return asked, computed, pushed

        serve(0.0)
        seconds = min(
            computed.forward_ended - computed.forward_began
            for _, computed, _ in (serve(0.0) for _ in range(3))
        )
        print(f"the step takes {seconds * 1e3:.0f} ms")
        for part in options.after:
            served = [serve(part * seconds) for _ in range(options.rounds)]
            delivered = [pushed.forward_began - asked for asked, _, pushed in served]
            ended = [computed.forward_ended - asked for asked, computed, _ in served]
            tails = [one - other for one, other in zip(delivered, ended, strict=True)]
            print(
                f"asked after {part:.0%} of it: "
                + ", ".join(
                    f"{name} {statistics.median(figures) * 1e3:.0f} ms "
                    f"({min(figures) * 1e3:.0f} to {max(figures) * 1e3:.0f})"
                    for name, figures in (
                        ("delivered after", delivered),
                        ("step ended after", ended),
                        ("tail", tails),
                    )
                )
            )


if __name__ == "__main__":
    main()
