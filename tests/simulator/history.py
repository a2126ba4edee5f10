"""Random histories: a seed decides the engine, the weather and everything that happens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
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


def run_crowd(seed: int, store: Path | None = None, *, hand_off: bool = False) -> Counter[str]:
    """Let several requests about one document come at once, in fair weather, while another one
    runs.

    Args:
        seed: decides how many there are, how long everything is, and what engine it is; one that
            has a prefix cache.
        store: a directory for a disk tier, on which the document is then.
        hand_off: whether the engine's scheduler knows nothing of loads.

    Returns:
        What has happened how often.

    Raises:
        Violation: if a promise was broken, or if more was loaded than the document once.
    """
    random = Random(seed)
    options = replace(
        Options.draw(random, disk=store is not None),
        blocks=64,
        chunk_blocks=random.randint(1, 2),
        max_running=6,
        prefix_caching=True,
        host_slots=100,
        disk_slots=100 if store is not None else 0,
        when="always",
        min_tokens=0,
        saves_in_flight=64,
        save_tokens="all",
        deadline=1.0,
    )
    if hand_off:
        options = replace(options.with_hand_off(random), boundary_blocks=1)
    chunks = random.randint(2, 8)
    document = [random.randrange(50) for _ in range(chunks * options.chunk_tokens)]
    with Simulator(seed, options, store) as simulator:
        simulator.submit([*document, 50], 1)
        _idle(simulator)
        simulator.forget_prefixes()
        if store is not None:
            simulator.empty_host()
        simulator.submit([51] * 5, 30)
        for _ in range(random.randint(0, 3)):
            simulator.step()
        before = simulator.counts["chunks loaded"]
        for number in range(random.randint(2, 5)):
            simulator.submit([*document, *[60 + number] * random.randint(1, 5)], 2)
        _idle(simulator)
        loaded = simulator.counts["chunks loaded"] - before
        if loaded > chunks:
            violation = Violation(f"{loaded} chunks were loaded of a document of {chunks}")
            violation.add_note(f"seed {seed}")
            violation.add_note(simulator.describe())
            raise violation
        simulator.drain()
        return simulator.counts


def _idle(simulator: Simulator) -> None:
    while simulator.has_work:
        simulator.step()


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
