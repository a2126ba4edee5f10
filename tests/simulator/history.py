"""Random histories: a seed decides the engine, the weather and everything that happens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

from simulator.content import Violation
from simulator.engine import Simulator
from simulator.faults import Weather
from simulator.options import Options

_DOCUMENTS = 3
_BUSY = 8


class Prompts:
    """Prompts that share prefixes.

    Args:
        random: chooses.
        longest: tokens of the longest request.
    """

    def __init__(self, random: Random, longest: int) -> None:
        self._random = random
        self._longest = longest
        self._documents = [
            [random.randrange(50) for _ in range(longest)] for _ in range(_DOCUMENTS)
        ]

    def draw(self) -> tuple[list[int], int]:
        """A prompt and how many tokens may follow it."""
        random = self._random
        max_tokens = random.choice((1, 1, 2, 8))
        most = max(2, self._longest - max_tokens - 4)
        document = random.choice(self._documents)
        prompt = document[: random.randint(1, most)]
        if random.random() < 0.3:
            prompt = prompt[: most - 4] + [random.randrange(50, 100) for _ in range(4)]
        return prompt, max_tokens


def run_history(
    seed: int,
    steps: int,
    store: Path | None = None,
    *,
    options: Options | None = None,
    weather: Weather | None = None,
    virtual: bool = True,
) -> Counter[str]:
    """Live through ``steps`` steps, then let everything end.

    Args:
        seed: decides.
        steps: how long.
        store: a directory for a disk tier; without one there is none.
        options: the engine, if the seed is not to decide.
        weather: likewise; does not change then.
        virtual: whether threads and time are virtual.

    Returns:
        What has happened how often.

    Raises:
        Violation: if a promise was broken; its notes say what led to it.
    """
    random = Random(seed)
    options = options or Options.draw(random, disk=store is not None)
    prompts = Prompts(random, options.longest)
    with Simulator(seed, options, store, virtual=virtual) as simulator:
        simulator.weather = weather or Weather()
        try:
            for _ in range(steps):
                if weather is None and random.random() < 0.02:
                    simulator.weather = Weather.draw(random)
                happen(simulator, random, prompts)
                simulator.step()
            simulator.drain()
        except Violation as violation:
            violation.add_note(f"seed {seed}")
            raise
        simulator.counts["steps"] = simulator.steps
        return simulator.counts


def happen(simulator: Simulator, random: Random, prompts: Prompts) -> None:
    """Whatever may happen between two steps."""
    dice = random.random()
    active = simulator.active
    if dice < 0.35 and len(active) < _BUSY:
        prompt, max_tokens = prompts.draw()
        simulator.submit(prompt, max_tokens, salt=int(random.random() < 0.05))
    elif dice < 0.38 and active:
        simulator.abort(random.choice(active))
    elif dice < 0.40:
        simulator.preempt()
    elif dice < 0.42:
        simulator.hurry()
    elif dice < 0.45:
        simulator.forget_prefixes()
    elif dice < 0.454:
        simulator.reset()
    elif dice < 0.456:
        simulator.change_weights()
    elif dice < 0.46:
        simulator.damage_disk()
