"""One rank of transformers' continuous batching: ``python -m engine.batching_rank FOLDER RANK
RANKS``, with what to do in ``FOLDER/orders.json``.

Of ranks that share a model rank 0 asks, and the others compute with it until it stops.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from engine.batching import Engine, Workload, live_through
from engine.workload import prompt
from lamina_kv.engines.ranks import Ranks

ROOMY = ContinuousBatchingConfig(page_size=16, num_blocks=160, max_batch_tokens=64)


def follow(
    model: Any, batching: ContinuousBatchingConfig, lamina: Mapping[str, object] | None
) -> dict[str, object]:
    """Compute with rank 0 until that stops; what is left then."""
    with Engine(model, batching, lamina) as engine:
        engine.manager._generation_thread.join()
        return engine.left() if lamina is not None else {}


def conversations(
    model: Any, follows: bool, *, seed: int, tier: Mapping[str, object] | None
) -> object:
    """A workload, with Lamina if there is a far tier."""
    workload = Workload.draw(seed)
    lamina = None if tier is None else workload.lamina | {"tiers": [tier]}
    if not follows:
        return asdict(live_through(model, workload, lamina))
    return [follow(model, workload.batching, lamina) for _ in ("before", "after the restart")]


def cancellations(model: Any, follows: bool, *, lamina: Mapping[str, object]) -> object:
    """Many requests are cancelled at once, again and again; what the others answer."""
    if follows:
        return follow(model, ROOMY, lamina)
    with Engine(model, ROOMY, lamina, max_new_tokens=48) as engine:
        answers = []
        for turn in range(6):
            names = [engine.submit(prompt(i, 120 + turn)) for i in range(8)]
            while not engine.computed.keys() >= set(names):  # until all have blocks
                time.sleep(0.005)
            for name in names[2:]:
                engine.manager.cancel_request(name)
            found = engine.await_answers(names[:2])
            answers.append([found[name] for name in names[:2]])
        engine.rest()
        return {"answers": answers, "left": engine.left()}


def death(model: Any, follows: bool, *, lamina: Mapping[str, object]) -> object:
    """A rank dies while the other waits for its word; what that one makes of it."""
    if follows:
        tell = Ranks.tell

        def tell_or_die(ranks: Ranks, occasion: str, word: object) -> list[object]:
            if occasion == "after a step":
                os.kill(os.getpid(), signal.SIGKILL)
            return tell(ranks, occasion, word)

        with patch.object(Ranks, "tell", tell_or_die):
            return follow(model, ROOMY, lamina)
    with Engine(model, ROOMY, lamina) as engine:
        engine.submit(prompt(1, 100))
        engine.manager._generation_thread.join()
        return str(engine.manager.background_thread_status.fatal_error)


def main(folder: Path, rank: int, ranks: int) -> None:
    """See the module. ``FOLDER/RANK.json`` has what came of every order."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    orders = json.loads((folder / "orders.json").read_text())
    share = {"tp_plan": "auto"} if orders["share"] else {}
    model = AutoModelForCausalLM.from_pretrained(orders["model"], dtype=torch.float32, **share)
    follows = bool(share) and rank > 0
    kinds = {"conversations": conversations, "cancellations": cancellations, "death": death}
    results = [kinds[kind](model, follows, **options) for kind, options in orders["runs"]]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
