"""What the copies of saves cost a prefill, with and without them in one and the same process.

Two processes with the same engine differ by a tenth of their throughput here, whatever runs in them
(where their memory lies decides), so that what a save costs cannot be seen by comparing processes.
In this one saves are planned, ordered, leased and received as always, and in every other round the
mover copies nothing.

    python bench/save_copies.py --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lamina_kv.bench.settings import PromptSource
from lamina_kv.bench.shapes import Dtype, LlamaShape
from lamina_kv.data.movers.base import Pairs
from lamina_kv.data.movers.cpu import CpuMover, PassedFence
from lamina_kv.data.movers.fences import Fence
from peers.protocol import Arrival, Start
from peers.serving import PeerServing
from peers.systems import Store, System

PROMPTS, TOKENS, STEP_TOKENS = 4, 1024, 2048


class Switch:
    """Copies, or does not."""

    def __init__(self) -> None:
        self.copies = True
        copy = CpuMover.save

        def save(
            mover: CpuMover,
            rows: Sequence[int],
            pairs: Pairs,
            after: Fence,
            *,
            urgent: bool = False,
        ) -> Fence:
            if self.copies:
                return copy(mover, rows, pairs, after, urgent=urgent)
            return PassedFence()

        CpuMover.save = save  # type: ignore[method-assign, assignment]


def main() -> None:
    """Measure, and print tokens a second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--generate", type=int, default=16)
    options = parser.parse_args()
    switch = Switch()
    shape = LlamaShape(16, 1024, 8, 128, 128, Dtype.BFLOAT16)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        shape.write_config(work)
        store = Store(2 * shape.kv_bytes(PROMPTS * TOKENS))
        cache = PROMPTS * (TOKENS + options.generate + shape.block_size)
        serving = PeerServing(Start(System.LAMINA, shape, str(work), cache, STEP_TOKENS, store, {}))
        serving.warm_up()
        source = PromptSource(seed=5)
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(-1, options.rounds):
            for copies in (False, True):
                switch.copies = copies
                serving.forget()
                prompts = [source.prompt(TOKENS) for _ in range(PROMPTS)]
                served = serving.serve([Arrival(0.0, each, options.generate) for each in prompts])
                if number >= 0:
                    last = max(response.last for response in served)
                    speeds[copies].append(PROMPTS * TOKENS / last)
        serving.close()
    for copies, figures in speeds.items():
        name = "with copies" if copies else "without"
        print(
            f"{name:12} {statistics.median(figures):6.0f} tokens/s "
            f"({min(figures):.0f} to {max(figures):.0f})"
        )
    ratio = statistics.median(speeds[True]) / statistics.median(speeds[False])
    print(f"with ÷ without {ratio:.3f}")


if __name__ == "__main__":
    main()
